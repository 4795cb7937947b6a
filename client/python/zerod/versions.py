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
        self.accept()

    def bump(self, all_parameters: bool = False) -> None:
        """The weights have changed: of the trainable parameters, or of all."""
        both = zip(self._managed, self._parameters)
        chosen = tuple(p for managed, p in both if managed.trainable or all_parameters)
        if not chosen:
            return
        torch._C._autograd._unsafe_set_version_counter(
            chosen, tuple(p._version + 1 for p in chosen)
        )

    def accept(self) -> None:
        """What was done to the parameters until now was ours."""
        self._addresses = [p.data_ptr() for p in self._parameters]

    def check(self) -> None:
        """UserWriteError names the parameter that was re-pointed.

        A counter that grew by itself says nothing: the memory is read-only, so a write would have
        ended the process. It was set to itself, as by a parametrization that comes and goes.
        """
        for i, parameter in enumerate(self._parameters):
            if parameter.data_ptr() != self._addresses[i]:
                raise UserWriteError(
                    f"{self._managed[i].name!r} points to other memory than the daemon's "
                    f"(.data was assigned, or the model was moved or converted): {_HOW}"
                )
