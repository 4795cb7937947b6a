# SPDX-License-Identifier: Apache-2.0
"""By what TRL (`unwrap_model_for_generation`) takes the hooks of a stage-3 model off while it
generates with all parameters gathered, and puts them back."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from zerod.external import external_parameters
from zerod.hooks import Gathering


class ParameterOffload:
    """`engine.optimizer.parameter_offload` at stage 3, with DeepSpeed's names.

    Without hooks nothing is gathered: whoever removes them holds the parameters
    (GatheredParameters) until `_register_deepspeed_module` has put them back. The backward pass
    has no hooks of modules.
    """

    def __init__(self, module: nn.Module, gathering: Gathering) -> None:
        self.module = module
        self.backward_hooks: list[Any] = []
        self._gathering = gathering
        if "ds_external_parameters" not in nn.Module.__dict__:
            nn.Module.ds_external_parameters = _named_external_parameters  # type: ignore

    @property
    def forward_hooks(self) -> list[Any]:
        return self._gathering.handles

    @forward_hooks.setter
    def forward_hooks(self, handles: list[Any]) -> None:
        self._gathering.handles = handles

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        if module is not self.module:
            raise ValueError(
                f"hooks can be put back on the engine's {type(self.module).__name__}, not on "
                f"another {type(module).__name__}"
            )
        self._gathering.register()


def _named_external_parameters(module: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """`module.ds_external_parameters()`: those it was said to use, each with its ds_id."""
    for parameter in external_parameters(module):
        yield getattr(parameter, "ds_id", -1), parameter
