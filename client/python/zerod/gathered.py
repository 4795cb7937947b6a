# SPDX-License-Identifier: Apache-2.0
"""Reading and writing parameters outside of forward and backward."""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zerod.engine import Engine

# id(parameter) -> (engine, index); an engine takes its entries out when it is destroyed.
owners: "dict[int, tuple[Engine, int]]" = {}


class GatheredParameters:
    """`with GatheredParameters(parameters):` the parameters may be read.

    With `modifier_rank` they may also be written, on that rank: inside, `.data` is a private copy;
    at the end the modifier's values become everybody's. Then it is collective: every rank enters
    and leaves, outside of forward and backward. An exception inside discards what was written.
    Parameters that no engine manages are left alone.
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
        chosen: dict[int, tuple[Engine, int]] = {}
        for parameter in params if enabled else ():
            owner = owners.get(id(parameter))
            if owner is not None:
                chosen[id(parameter)] = owner
        engines = {id(engine): engine for engine, _ in chosen.values()}
        if len(engines) > 1:
            raise ValueError("the parameters belong to several engines; gather one after the other")
        self._engine: Engine | None = next(iter(engines.values()), None)
        self._indices = [index for _, index in chosen.values()]
        self._modifier_rank = modifier_rank
        self._units: list[int] = []
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> None:
        engine = self._engine
        if engine is None:
            return
        if self._modifier_rank is None:
            client = engine.client
            self._units = sorted({client.parameters[i].unit for i in self._indices})
            for unit in self._units:
                engine.gathering.pins[unit] += 1
                engine.gathering.gather(unit)
            return
        if not 0 <= self._modifier_rank < engine.world_size:
            raise ValueError(
                f"modifier_rank {self._modifier_rank} of a world of {engine.world_size}"
            )
        if engine.backward_pass.has_gradients:
            raise RuntimeError(
                "gradients of the current weights are on their way: write parameters after "
                "engine.step()"
            )
        engine.versions.check()
        engine.gathering.reset()
        for index in self._indices:
            managed = engine.description.parameters[index]
            master = engine.weights.read(managed)
            private = master.to(managed.dtype, copy=True)
            kept = private.clone()
            self._originals[index] = (managed.parameter.data, master, kept)
            managed.parameter.data = private

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        engine = self._engine
        if engine is None:
            return
        if self._modifier_rank is None:
            for unit in self._units:
                engine.gathering.pins[unit] -= 1
                engine.gathering.release(unit)
            return
        written = {}
        for index, (mapped, master, kept) in self._originals.items():
            managed = engine.description.parameters[index]
            private = managed.parameter.data
            # What was not edited keeps its full precision.
            written[index] = torch.where(private == kept, master, private.to(torch.float32))
            managed.parameter.data = mapped
        self._originals.clear()
        engine.client.barrier()  # nobody reads the old values any more
        if kind is None and engine.global_rank == self._modifier_rank:
            for index, values in written.items():
                engine.weights.put(engine.description.parameters[index], values)
        engine.client.barrier()
        engine.versions.accept()
        engine.versions.bump(all_parameters=True)
