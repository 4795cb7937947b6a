# SPDX-License-Identifier: Apache-2.0
"""Version counters: PyTorch's check for stale graphs keeps working; and parameters that a user made
point elsewhere are noticed."""

from zerod.errors import UserWriteError
from zerod.model import ManagedParameter

import torch

_HOW = (
    "use `with zerod.GatheredParameters(parameter, modifier_rank=0):`, or engine.load_state_dict()"
)


class Versions:
    """The daemon's writes are invisible to autograd, so the counters are raised for it at STEP."""

    def __init__(self, parameters: list[ManagedParameter]) -> None:
        self._managed = parameters
        self._parameters = [p.parameter for p in parameters]
        self._expected = [p._version for p in self._parameters]
        self._addresses = [p.data_ptr() for p in self._parameters]

    def bump(self, all_parameters: bool = False) -> None:
        """The weights have changed: of the trainable parameters, or of all."""
        chosen = [i for i, p in enumerate(self._managed) if p.trainable or all_parameters]
        if not chosen:
            return
        for i in chosen:
            self._expected[i] += 1
        torch._C._autograd._unsafe_set_version_counter(
            tuple(self._parameters[i] for i in chosen), tuple(self._expected[i] for i in chosen)
        )

    def accept(self) -> None:
        """What was done to the parameters until now was ours."""
        self._expected = [p._version for p in self._parameters]
        self._addresses = [p.data_ptr() for p in self._parameters]

    def check(self) -> None:
        """UserWriteError names the parameter that was re-pointed.

        A counter that grew by itself says nothing: the memory is read-only, so a write would have
        ended the process. It was set to itself, as by a parametrization that comes and goes.
        """
        for i, parameter in enumerate(self._parameters):
            self._expected[i] = parameter._version
            if parameter.data_ptr() != self._addresses[i]:
                raise UserWriteError(
                    f"{self._managed[i].name!r} points to other memory than the daemon's "
                    f"(.data was assigned, or the model was moved or converted): {_HOW}"
                )
