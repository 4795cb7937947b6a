# SPDX-License-Identifier: Apache-2.0
"""Copies and pickles of a model, or of a part of it, while its parameters are an engine's: plain
ones, whole in the process that asked."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from zerod.model import ManagedParameter

if TYPE_CHECKING:
    from zerod.engine import Engine

_NAMES = ("__deepcopy__", "__reduce_ex__")


class PlainCopies:
    """copy.deepcopy() and pickle ask an object before its class. A parameter answers with one that
    has its values in memory of its own; a module leaves out the engine's hooks, which lead to the
    daemon. `hooks` are the handles of those that are there now."""

    def __init__(self, engine: "Engine", hooks: Callable[[], Iterable[Any]]) -> None:
        self._engine = engine
        self._hooks = hooks
        self._parameters = [managed.parameter for managed in engine.description.parameters]
        self._modules = list(engine.module.modules())
        for managed in engine.description.parameters:
            parameter: Any = managed.parameter
            parameter.__deepcopy__ = partial(self._copy, managed)
            parameter.__reduce_ex__ = partial(self._reduce_parameter, managed)
        for module in self._modules:
            module.__dict__["__reduce_ex__"] = partial(self._reduce_module, module)

    def remove(self) -> None:
        for thing in [*self._parameters, *self._modules]:
            for name in _NAMES:
                thing.__dict__.pop(name, None)
        self._parameters, self._modules = [], []

    def _copy(self, managed: ManagedParameter, memo: dict[int, Any]) -> nn.Parameter:
        parameter = managed.parameter
        if self._engine.access.available(managed.index):
            values = parameter.data.clone()
        else:
            values = self._engine.weights.read(managed, dtype=managed.dtype)
        result = nn.Parameter(values, parameter.requires_grad)
        memo[id(parameter)] = result
        return result

    def _reduce_parameter(self, managed: ManagedParameter, protocol: Any) -> Any:
        return self._copy(managed, {}).__reduce_ex__(protocol)

    def _reduce_module(self, module: nn.Module, protocol: Any) -> Any:
        constructor, arguments, state, *rest = type(module).__reduce_ex__(module, protocol)
        if isinstance(state, dict):
            ours = {handle.id for handle in self._hooks()}
            state = {
                name: _without(value, ours) if "_hooks" in name else value
                for name, value in state.items()
                if name not in _NAMES
            }
        return (constructor, arguments, state, *rest)


def _without(hooks: Any, ours: set[int]) -> Any:
    """A module's hooks of one kind, or what it knows of them, by their handles' ids."""
    if not isinstance(hooks, dict) or ours.isdisjoint(hooks):
        return hooks
    return type(hooks)((key, hook) for key, hook in hooks.items() if key not in ours)
