# SPDX-License-Identifier: Apache-2.0
"""Where parameters that are born under zerod.zero.Init live until `initialize` takes them over.

A job's layout is fixed when its ranks attach, and nobody knows the model's before it is built. So
births go to *arenas*: jobs without an optimizer whose layout says nothing of the model, a row of
pieces that parameters are laid into one after the other. All ranks do the same in the same order,
so a parameter has the same place everywhere; rank 0 writes its values. Nothing is ever gathered in
an arena: its address range is never mapped, reads and writes copy piece by piece.
"""

import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from zerod import _zerod, at_exit, config as configuration, constructors, peers
from zerod.gathered import check_modifier
from zerod.launch import Launch
from zerod.model import ManagedParameter
from zerod.parameter_status import disown, own, owners

PENDING_BYTES_MAX = 64 << 20  # of parameters that a rank keeps before they are handed over
PIECE_ELEMENTS = 1 << 20  # of a unit of an arena: one PUT or READ
ALIGN_ELEMENTS = 32
ARENA_PIECES_MIN = 16
GROWTH = 4  # an arena has at least this part of all that was born before,
ARENA_PIECES_MAX = 8192  # up to here, beyond which a layout takes long to plan
LINGER_SECONDS = 30  # what died before `initialize` is born again, not taken up
_BUCKET_ELEMENTS = 1 << 18
_MAPPED_BYTES_MIN = 1 << 20
_JOB_ID_MAX = 128
_thread = threading.local()


class Arena:
    """One job: `pieces` times PIECE_ELEMENTS, filled from the front. Collective to make."""

    def __init__(self, client: Any, pieces: int, dtype: torch.dtype) -> None:
        self.client = client
        self.dtype = dtype
        self.elements = pieces * PIECE_ELEMENTS
        self.used = 0
        self.live: set[int] = set()  # ids of parameters
        self.closed = False  # nothing more is laid into it
        size = dtype.itemsize
        self._base = client.parameters[0].address
        for i, view in enumerate(client.parameters):
            if (view.unit, view.offset) != (i, 0) or view.address - self._base != (
                i * PIECE_ELEMENTS * size
            ):
                raise RuntimeError("the pieces of an arena are not in one row: a bug in zerod")
        buffer = (ctypes.c_ubyte * (self.elements * size)).from_address(self._base)
        buffer.owner = client.parameter_tensor(0)  # keeps the address range
        self._memory = memoryview(buffer)

    def take(self, elements: int) -> int | None:
        """The first element of room for so many, or None."""
        begin = self.used
        end = begin + -(-max(elements, 1) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        if end > self.elements:
            return None
        self.used = end
        return begin

    def tensor(self, begin: int, shape: torch.Size) -> torch.Tensor:
        """Must not be read nor written: reads fault."""
        size = self.dtype.itemsize
        if shape.numel() == 0:
            return constructors.empty(shape, dtype=self.dtype)
        memory = self._memory[begin * size : (begin + shape.numel()) * size]
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)

    def cuts(self, begin: int, elements: int) -> Iterator[tuple[int, int, int, int]]:
        """(place among the elements, unit, first element of it, count)."""
        at = 0
        while at < elements:
            unit, first = divmod(begin + at, PIECE_ELEMENTS)
            count = min(elements - at, PIECE_ELEMENTS - first)
            yield at, unit, first, count
            at += count

    def leave(self) -> None:
        """The job ends once all ranks have left."""
        if not self.client.closed:
            self.client.detach()


class Born:
    """A parameter in an arena, or on the way there."""

    def __init__(self, nursery: "Nursery", parameter: nn.Parameter) -> None:
        self.key = id(parameter)
        self.shape = torch.Size(parameter.shape)
        self.dtype = parameter.dtype
        self.arena: Arena | None = None  # None: pending
        self.begin = 0
        self.gathered = False
        self._nursery = nursery
        self._parameter = weakref.ref(parameter, self._on_death)

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self._parameter()
        assert parameter is not None
        return parameter

    def _on_death(self, _: Any) -> None:
        self._nursery.died(self)

    def values(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, up to PIECE_ELEMENTS values in fp32), which the caller may keep until
        this thread reads or writes the next ones. Needs no other rank."""
        assert self.arena is not None
        scratch = _scratch()
        for at, unit, first, count in self.arena.cuts(self.begin, self.shape.numel()):
            self.arena.client.read(unit, first, scratch.data_ptr(), count)
            yield at, scratch[:count]

    def read(self) -> torch.Tensor:
        """In memory of its own."""
        result = _empty(self.shape, self.dtype)
        flat = result.view(-1)
        for at, values in self.values():
            flat[at : at + values.numel()].copy_(values)
        return result

    def write(self, values: torch.Tensor) -> None:
        """A barrier orders it for other ranks."""
        assert self.arena is not None
        flat = values.detach().reshape(-1)
        for at, unit, first, count in self.arena.cuts(self.begin, self.shape.numel()):
            piece = _scratch()[:count].copy_(flat[at : at + count])
            self.arena.client.put(unit, first, piece.data_ptr(), count)

    def settle(self) -> None:
        """The rank's own copy is let go."""
        assert self.arena is not None
        parameter = self.parameter
        parameter.data = self.arena.tensor(self.begin, self.shape)
        self.gathered = False
        # Else these two would read it. A bound method of this object: no cycle with the parameter.
        parameter.__deepcopy__ = self._copy  # type: ignore[method-assign]
        parameter.__reduce_ex__ = self._reduce  # type: ignore[method-assign]

    def _copy(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy is a plain parameter of this process."""
        parameter = self.parameter
        values = parameter.data.clone() if self.gathered else self.read()
        result = nn.Parameter(values, parameter.requires_grad)
        memo[id(parameter)] = result
        return result

    def _reduce(self, protocol: Any) -> Any:
        return self._copy({}).__reduce_ex__(protocol)


class Nursery:
    """All born parameters of this process. What is said to be collective is called by all ranks in
    the same order; the rest needs nobody."""

    def __init__(self) -> None:
        self.access = self  # for GatheredParameters
        self.born: dict[int, Born] = {}  # by id of the parameter
        self.arenas: list[Arena] = []
        self.pending_bytes_max = PENDING_BYTES_MAX
        self._pending: list[nn.Parameter] = []
        self._pending_bytes = 0
        self._open: dict[torch.dtype, Arena] = {}
        self._born_elements = 0
        self._arenas_made = 0
        self._place: dict[str, Any] | None = None  # where arenas are made: options of attach()
        self._attach_timeout_seconds = 600.0
        self._process = os.getpid()

    # --- Births.

    def locate(self, job: str, address: str, attach_timeout_seconds: float) -> None:
        """Before the first birth: which daemons, in the name of which job. Once for a process."""
        if self._place is not None:
            if address and address != self._place["address"]:
                raise ValueError(
                    f"parameters of this process are born at {self._place['address']} already, "
                    f"not at {address}"
                )
            return
        launch = Launch.from_environment()
        base = peers.job_id(job, 0, launch)
        found = peers.find_peers(base, launch, address)
        # Not each arena's own: an embedded daemon is found by the name of its job.
        daemon = _zerod.ensure_daemon(
            address=address,
            job=base,
            node_rank=launch.node_rank,
            local_rank=launch.local_rank,
            attach_timeout_seconds=attach_timeout_seconds,
        )
        self._attach_timeout_seconds = attach_timeout_seconds
        self._base = base
        self._launch = launch
        self._place = {
            "address": daemon.address,
            "attempt": launch.attempt,
            "rank": launch.rank,
            "world": launch.world,
            "local_rank": launch.local_rank,
            "local_world": launch.local_world,
            "node_rank": launch.node_rank,
            "peers": found.addresses,
            "job_token": found.job_token,
            "attach_timeout_seconds": attach_timeout_seconds,
        }

    def add(self, parameter: nn.Parameter) -> None:
        """Collective where the pending ones have become too many. After locate()."""
        born = Born(self, parameter)
        self.born[born.key] = born
        own(parameter, self, born.key)
        self._pending.append(parameter)
        self._pending_bytes += parameter.numel() * parameter.element_size()
        if self._pending_bytes >= self.pending_bytes_max:
            self.flush()

    def flush(self) -> None:
        """What is pending goes to the daemon. Collective."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return
        waiting = [self.born[id(parameter)] for parameter in pending]
        elements_left: dict[torch.dtype, int] = {}
        for born in waiting:
            elements_left[born.dtype] = elements_left.get(born.dtype, 0) + _room(born)
        try:
            while waiting:
                born = waiting[0]
                self._lay(born, elements_left[born.dtype])
                elements_left[born.dtype] -= _room(born)
                if self._launch.rank == 0:
                    born.write(born.parameter.data)
                born.settle()
                waiting.pop(0)
        except BaseException:
            for born in waiting:
                self._forget(born)
                disown(born.parameter)
            raise
        self._barrier()
        _zerod.trim_heap()

    def abandon_pending(self) -> None:
        """After an exception on who knows how many ranks: they stay plain parameters."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        for parameter in pending:
            self._forget(self.born[id(parameter)])
            disown(parameter)

    def _lay(self, born: Born, elements_left: int) -> None:
        """Gives it its place. Which one depends on nothing that differs between ranks: what is
        garbage on one may live on another, so no room is used twice."""
        arena = self._open.get(born.dtype)
        begin = arena.take(born.shape.numel()) if arena is not None else None
        if arena is None or begin is None:
            if arena is not None:
                del self._open[born.dtype]
                arena.closed = True
                self._leave_if_empty(arena)
            pieces = -(-elements_left // PIECE_ELEMENTS)
            growth = min(self._born_elements // GROWTH // PIECE_ELEMENTS, ARENA_PIECES_MAX)
            arena = self._make(max(pieces, growth, ARENA_PIECES_MIN), born.dtype)
            self._open[born.dtype] = arena
            begin = arena.take(born.shape.numel())
            assert begin is not None
        born.arena, born.begin = arena, begin
        arena.live.add(born.key)
        self._born_elements += _room(born)

    def _make(self, pieces: int, dtype: torch.dtype) -> Arena:
        assert self._place is not None
        name = str(dtype).removeprefix("torch.")
        # It says all of the layout, so that what an earlier attempt left is either the same or
        # not in the way.
        launch = self._launch
        tail = f".born.{self._arenas_made}.{name}.{pieces}.{launch.world}x{launch.nodes}"
        base = self._base
        if len(base) + len(tail) > _JOB_ID_MAX:
            digest = hashlib.sha256(base.encode()).hexdigest()[:16]
            base = base[: _JOB_ID_MAX - len(tail) - 17] + "-" + digest
        units = [f"piece_{i}" for i in range(pieces)]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": PIECE_ELEMENTS,
                "stage3_prefetch_bucket_size": 0,
                # So that several nodes stage little: each arena has its own.
                "allgather_bucket_size": _BUCKET_ELEMENTS,
                "reduce_bucket_size": _BUCKET_ELEMENTS,
            },
            "zerod": {
                "job": base + tail,
                "guard_pages": True,
                "linger_seconds": LINGER_SECONDS,
                "attach_timeout_seconds": self._attach_timeout_seconds,
                "client_state_bytes_max": 1,
            },
        }
        resolved = configuration.resolve(json.dumps(config), launch.world).config
        client = _zerod.Client.attach(
            modules=[_zerod.ModuleInfo("", "zerod.zero.Init")]
            + [_zerod.ModuleInfo(unit, "zerod.zero.Init") for unit in units],
            parameters=[
                _zerod.ParameterInfo(
                    f"born under zerod.zero.Init, {unit}", [PIECE_ELEMENTS], False, 0, [unit]
                )
                for unit in units
            ],
            groups=[],
            config=json.dumps(resolved),
            dtype=name,
            job=base + tail,
            **self._place,
        )
        self._arenas_made += 1
        arena = Arena(client, pieces, dtype)
        if not self.arenas:
            at_exit.leave_at_exit(self)
        self.arenas.append(arena)
        client.barrier()  # all ranks have come
        return arena

    def _barrier(self) -> None:
        """Any of the arenas' clients will do: a rank's own requests are answered when it comes."""
        next(iter(self._open.values())).client.barrier()

    # --- What happens to the born.

    def prepare(self) -> None:
        """For `initialize`. Collective."""
        if any(born.gathered for born in self.born.values()):
            raise RuntimeError("initialize() was called inside GatheredParameters: leave it first")
        self.flush()

    def find(self, parameter: nn.Parameter) -> Born | None:
        return self.born.get(id(parameter))

    def take_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """They are this rank's own again, and may be converted. Needs no other rank; that they
        are added again is collective."""
        for parameter in parameters:
            born = self.born[id(parameter)]
            if born.arena is None:
                self._pending = [p for p in self._pending if p is not parameter]
                self._pending_bytes -= parameter.numel() * parameter.element_size()
            else:
                parameter.data = born.read()
            self._let_go(born, parameter)

    def by_arena(
        self, parameters: list[ManagedParameter]
    ) -> list[tuple[Arena | None, list[ManagedParameter]]]:
        """In the order of birth; those that are not born come last."""
        groups: dict[int, tuple[Arena | None, list[ManagedParameter]]] = {
            id(arena): (arena, []) for arena in self.arenas
        }
        plain: list[ManagedParameter] = []
        for managed in parameters:
            born = self.find(managed.parameter)
            if born is None:
                plain.append(managed)
            else:
                groups[id(born.arena)][1].append(managed)
        return [group for group in groups.values() if group[1]] + [(None, plain)]

    def hand_over(self, parameters: list[ManagedParameter]) -> None:
        """They have been taken over, and have memory of another's."""
        for managed in parameters:
            born = self.find(managed.parameter)
            if born is not None:
                self._let_go(born, managed.parameter)

    def close_arenas(self) -> None:
        """What is born later gets arenas of its own. Collective."""
        self._open.clear()
        for arena in list(self.arenas):
            arena.closed = True
            self._leave_if_empty(arena)

    def died(self, born: Born) -> None:
        """The last reference to the parameter is gone, here."""
        if os.getpid() != self._process or sys.is_finalizing():
            return
        if self.born.get(born.key) is not born:
            return  # it was taken over
        owners.pop(born.key, None)
        arena = born.arena
        self._forget(born)
        if arena is not None:
            try:
                self._leave_if_empty(arena)
            except Exception as error:  # wherever the garbage collector came by
                print(f"zerod: leaving {arena.dtype} arena failed: {error}", file=sys.stderr)

    def _forget(self, born: Born) -> None:
        self.born.pop(born.key, None)
        if born.arena is not None:
            born.arena.live.discard(born.key)

    def _let_go(self, born: Born, parameter: nn.Parameter) -> None:
        """What is read of it stays: the next owner keeps its ds_id."""
        self._forget(born)
        owners.pop(born.key, None)
        for name in ("__deepcopy__", "__reduce_ex__"):
            parameter.__dict__.pop(name, None)

    def _leave_if_empty(self, arena: Arena) -> None:
        if arena.closed and not arena.live and arena in self.arenas:
            self.arenas.remove(arena)
            arena.leave()
            if not self.arenas:
                at_exit.forget(self)
                _thread.__dict__.clear()

    def leave(self) -> None:
        """At the end of the script: what nobody has taken over is freed."""
        arenas, self.arenas = self.arenas, []
        self._open.clear()
        for arena in arenas:
            arena.leave()

    # --- GatheredParameters.

    def available(self, index: int) -> bool:
        born = self.born[index]
        return born.arena is None or born.gathered

    def begin_read(self, indices: list[int]) -> list[Born]:
        """Collective only while some are pending: under Init, before its end."""
        return self._gather(indices)

    def end_read(self, begun: list[Born]) -> None:
        for born in begun:
            born.settle()

    def begin_write(self, indices: list[int], rank: int) -> list[Born]:
        check_modifier(rank, Launch.from_environment().world)
        again = [i for i in indices if self.born[i].gathered]
        if again:
            raise RuntimeError(
                f"a parameter of shape {tuple(self.born[again[0]].shape)} is gathered by an outer "
                "GatheredParameters already"
            )
        return self._gather(indices)

    def end_write(self, begun: list[Born], rank: int, keep: bool) -> None:
        given = [born.parameter.data for born in begun]
        for born in begun:
            born.settle()
        if not begun:
            return
        if keep and self._launch.rank == rank:
            for born, values in zip(begun, given):
                if values.shape != born.shape:
                    raise ValueError(
                        f"a parameter of shape {tuple(born.shape)} was given a tensor of shape "
                        f"{tuple(values.shape)} inside GatheredParameters"
                    )
        arena = begun[0].arena
        assert arena is not None
        arena.client.barrier()  # nobody reads the old values any more
        if keep and self._launch.rank == rank:
            for born, values in zip(begun, given):
                born.write(values)
        arena.client.barrier()

    def _gather(self, indices: list[int]) -> list[Born]:
        if any(self.born[i].arena is None for i in indices):
            self.flush()
        begun: list[Born] = []
        try:
            for index in indices:
                born = self.born[index]
                if not born.gathered:
                    born.parameter.data = born.read()
                    born.gathered = True
                    begun.append(born)
        except BaseException:
            self.end_read(begun)
            raise
        return begun


def _scratch() -> torch.Tensor:
    """PIECE_ELEMENTS of this thread's."""
    if not hasattr(_thread, "scratch"):
        _thread.scratch = constructors.empty(PIECE_ELEMENTS, dtype=torch.float32)
    scratch: torch.Tensor = _thread.scratch
    return scratch


def _empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Past the heap where it is large: copies that come and go would leave holes there, as large
    as the model after a while."""
    size = shape.numel() * dtype.itemsize
    if size < _MAPPED_BYTES_MIN:
        return constructors.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _room(born: Born) -> int:
    return -(-max(born.shape.numel(), 1) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS


nursery = Nursery()
