# SPDX-License-Identifier: Apache-2.0
"""Reading and writing parameters outside of forward and backward."""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zerod.external import register_external_parameter
from zerod.parameter_status import disown, own, owners

if TYPE_CHECKING:
    from zerod.engine import Engine


class Access(Protocol):
    """What an owner of parameters does for GatheredParameters. Writes are collective; what begins
    is ended with what began it."""

    def begin_read(self, indices: list[int]) -> Any: ...
    def end_read(self, begun: Any) -> None: ...
    def begin_write(self, indices: list[int], rank: int) -> Any: ...
    def end_write(self, begun: Any, rank: int, keep: bool) -> None:
        """`keep`: rank's values become everybody's, else the old ones stay."""

    def available(self, index: int) -> bool: ...


class GatheredParameters:
    """`with GatheredParameters(parameters):` the parameters may be read.

    With `modifier_rank` they may also be written, on that rank: inside, `.data` is a private copy;
    at the end the modifier's values become everybody's. Then it is collective: every rank enters
    and leaves, outside of forward and backward. An exception inside discards what was written.

    The parameters may be of several engines, and born under zerod.zero.Init. Those that nobody
    manages are left alone. `fwd_module` is said to use them (register_external_parameter).
    """

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: Any = None,
        enabled: bool = True,
    ) -> None:
        if isinstance(params, torch.Tensor):
            params = [params]
        chosen = {id(p): p for p in params if id(p) in owners} if enabled else {}
        # All ranks in one order, whatever the caller's: it may come out of a set.
        self._parameters = sorted(chosen.values(), key=lambda p: owners[id(p)].order)
        self._modifier_rank = modifier_rank
        self._begun: list[tuple[Access, Any]] = []
        if fwd_module is not None:
            for parameter in self._parameters:
                register_external_parameter(fwd_module, parameter)

    def __enter__(self) -> None:
        accesses: dict[int, tuple[Access, list[int]]] = {}
        for parameter in self._parameters:
            if id(parameter) in owners:  # else its engine has been destroyed meanwhile
                owner, index, _ = owners[id(parameter)]
                accesses.setdefault(id(owner), (owner.access, []))[1].append(index)
        rank = self._modifier_rank
        try:
            for access, indices in accesses.values():
                if rank is None:
                    begun = access.begin_read(indices)
                else:
                    begun = access.begin_write(indices, rank)
                self._begun.append((access, begun))
        except BaseException:
            self._end(keep=False)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(keep=kind is None)

    def _end(self, keep: bool) -> None:
        begun, self._begun = self._begun, []
        for access, token in reversed(begun):
            if self._modifier_rank is None:
                access.end_read(token)
            else:
                access.end_write(token, self._modifier_rank, keep)


class EngineAccess:
    """The parameters of an engine, by their index in its description."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._written: set[int] = set()
        units = engine.client.units
        partitioned = engine.zero_optimization_partition_weights()
        for managed in engine.description.parameters:
            resident = units[engine.client.parameters[managed.index].unit].resident
            own(managed.parameter, engine, managed.index, resident, partitioned)

    def close(self) -> None:
        for managed in self._engine.description.parameters:
            disown(managed.parameter)

    def available(self, index: int) -> bool:
        unit = self._engine.client.parameters[index].unit
        return (
            index in self._written
            or self._engine.client.units[unit].resident
            or bool(self._engine.gathering.held[unit])
        )

    def begin_read(self, indices: list[int]) -> list[int]:
        engine = self._engine
        units = sorted({engine.client.parameters[i].unit for i in indices})
        begun: list[int] = []
        try:
            for unit in units:
                engine.gathering.pins[unit] += 1
                begun.append(unit)
                engine.gathering.gather(unit)
        except BaseException:
            self.end_read(begun)
            raise
        return begun

    def end_read(self, begun: list[int]) -> None:
        for unit in begun:
            self._engine.gathering.pins[unit] -= 1
            self._engine.gathering.release(unit)

    def begin_write(self, indices: list[int], rank: int) -> dict[int, torch.Tensor]:
        """What the parameters pointed to."""
        engine = self._engine
        check_modifier(rank, engine.world_size)
        if engine.backward_pass.has_gradients:
            raise RuntimeError(
                "gradients of the current weights are on their way: write parameters after "
                "engine.step()"
            )
        engine.versions.check()
        engine.gathering.reset()
        mapped: dict[int, torch.Tensor] = {}
        try:
            for index in indices:
                managed = engine.description.parameters[index]
                private = engine.weights.read(managed, dtype=managed.dtype)
                mapped[index] = managed.parameter.data
                managed.parameter.data = private
        except BaseException:
            self._point_back(mapped)
            raise
        self._written.update(mapped)
        return mapped

    def _point_back(self, mapped: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """What they pointed to meanwhile."""
        given = {}
        for index, memory in mapped.items():
            parameter = self._engine.description.parameters[index].parameter
            given[index] = parameter.data
            parameter.data = memory
        return given

    def end_write(self, begun: dict[int, torch.Tensor], rank: int, keep: bool) -> None:
        engine = self._engine
        given = self._point_back(begun)
        self._written.difference_update(begun)
        engine.client.barrier()  # nobody reads the old values any more
        passed_over = engine.passes_over("what is written within GatheredParameters")
        problem = None
        if keep and engine.global_rank == rank and not passed_over:
            problem = self._put(given)
        given.clear()
        engine.client.barrier()
        engine.versions.accept()
        engine.versions.bump(all_parameters=True)
        if problem is not None:
            raise ValueError(problem)

    def _put(self, given: dict[int, torch.Tensor]) -> str | None:
        """What is wrong with it, where nothing is written."""
        parameters = self._engine.description.parameters
        for index, values in given.items():
            managed = parameters[index]
            if tuple(values.shape) != tuple(managed.shape):
                return (
                    f"{managed.name!r} of shape {tuple(managed.shape)} was given a tensor of shape "
                    f"{tuple(values.shape)} inside GatheredParameters; nothing is written"
                )
        for index, values in given.items():
            self._engine.weights.put_edited(parameters[index], values)
        return None


def check_modifier(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"modifier_rank {rank} of a world of {world}")
