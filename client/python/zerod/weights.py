# SPDX-License-Identifier: Apache-2.0
"""Weights into and out of the daemon: initial values, state_dict, load_state_dict."""

import logging
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zerod import _zerod, constructors
from zerod.model import ManagedParameter, ModelDescription
from zerod.nursery import nursery
from zerod.parameter_status import owners

log = logging.getLogger("zerod")
PIECE_ELEMENTS_MAX = 1 << 20  # of one PUT or READ: what the transfer area holds


class Weights:
    """Copies values between tensors of this process and the master copy of all daemons."""

    def __init__(self, client: Any, description: ModelDescription) -> None:
        self.client = client
        self.parameters = description.parameters
        self._views = client.parameters
        # Kept: pieces that came and went between a model's copies would leave holes in the heap.
        self._scratch: torch.Tensor | None = None

    def put(
        self, managed: ManagedParameter, values: torch.Tensor, kind: str = "master", begin: int = 0
    ) -> None:
        """From the parameter's element `begin` on. A barrier orders it for other ranks. Of the
        weights: nobody may hold the unit."""
        flat = values.detach().reshape(-1)
        for at in range(0, flat.numel(), PIECE_ELEMENTS_MAX):
            self._put_piece(managed, begin + at, flat[at : at + PIECE_ELEMENTS_MAX], kind)

    def _put_piece(
        self, managed: ManagedParameter, begin: int, values: torch.Tensor, kind: str = "master"
    ) -> None:
        piece = values.to(torch.float32).contiguous()
        view = self._views[managed.index]
        self.client.put(view.unit, view.offset + begin, piece.data_ptr(), piece.numel(), kind)

    def put_edited(self, managed: ManagedParameter, values: torch.Tensor) -> None:
        """`values` is what read() gave in the parameter's own dtype, edited. What was not edited
        keeps its full precision. A barrier orders it; nobody may have written in between."""
        flat = values.detach().reshape(-1)
        for begin, master in self._pieces(managed, "master"):
            piece = flat[begin : begin + master.numel()]
            edited = piece != master.to(managed.dtype)
            if edited.any():
                self._put_piece(managed, begin, torch.where(edited, piece.float(), master))

    def read(
        self, managed: ManagedParameter, kind: str = "master", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """In memory of its own, beside which it needs a piece. Needs no other rank."""
        values = constructors.empty(managed.shape, dtype=dtype)
        flat = values.view(-1)
        if dtype == torch.float32:
            self.read_into(flat, managed, kind)
            return values
        for begin, piece in self._pieces(managed, kind):
            flat[begin : begin + piece.numel()].copy_(piece)
        return values

    def read_into(
        self, out: torch.Tensor, managed: ManagedParameter, kind: str, begin: int = 0
    ) -> None:
        """The parameter's elements from `begin` on, as many as `out` has; that is fp32 and flat."""
        view = self._views[managed.index]
        for at in range(0, out.numel(), PIECE_ELEMENTS_MAX):
            piece = out[at : at + PIECE_ELEMENTS_MAX]
            first = view.offset + begin + at
            self.client.read(view.unit, first, piece.data_ptr(), piece.numel(), kind)

    def _pieces(
        self, managed: ManagedParameter, kind: str
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, up to PIECE_ELEMENTS_MAX values in fp32), which are good until anything
        is read."""
        elements = math.prod(managed.shape)
        if self._scratch is None:
            self._scratch = constructors.empty(PIECE_ELEMENTS_MAX, dtype=torch.float32)
        scratch = self._scratch
        for begin in range(0, elements, PIECE_ELEMENTS_MAX):
            count = min(elements - begin, PIECE_ELEMENTS_MAX)
            piece = scratch[:count]
            self.read_into(piece, managed, kind, begin)
            yield begin, piece

    def adopt(self, write_initial: bool) -> None:
        """Every parameter becomes the daemon's memory, for good. `write_initial`: this process's
        values are the job's initial ones; of born parameters their arena's. An arena is left as
        soon as its last parameter has moved. Collective."""
        for arena, parameters in nursery.by_arena(self.parameters):
            for managed in parameters:
                if write_initial:
                    self._put_initial(managed)
                managed.parameter.data = self.client.parameter_tensor(managed.index)
            nursery.hand_over(parameters)
            if arena is not None:
                self.client.barrier()  # rank 0 has read it
                nursery.close_arenas()
        _zerod.trim_heap()  # of this process's own copies

    def _put_initial(self, managed: ManagedParameter) -> None:
        born = nursery.find(managed.parameter)
        if born is None:
            return self.put(managed, managed.parameter.data)
        view = self._views[managed.index]
        for begin, values in born.values():
            self.client.put(view.unit, view.offset + begin, values.data_ptr(), values.numel())

    def open_resident(self) -> None:
        """Once the initial values are there: units that stay gathered become readable. After that
        every STEP keeps them so."""
        for unit, view in enumerate(self.client.units):
            if view.resident:
                self.client.gather(unit)
                self.client.release(unit)

    def give_back(self) -> None:
        """Every parameter gets memory of this process, with its weights. Needs no other rank. Where
        the daemon does not answer any more, a parameter that is not resident stays unreadable."""
        demand = []
        for managed in self.parameters:
            if self.client.units[self._views[managed.index].unit].resident:
                managed.parameter.data = managed.parameter.data.clone()
            else:
                demand.append(managed)
        for done, managed in enumerate(demand):
            try:
                managed.parameter.data = self.read(managed, dtype=managed.dtype)
            except _zerod.ZerodError as error:
                log.warning(
                    "the module cannot be used again: the weights of %r and %d other parameters "
                    "could not be read: %s", managed.name, len(demand) - done - 1, error,
                )
                return


class StateDictHooks:
    """Makes module.state_dict() give plain copies, and keeps module.load_state_dict() from writing
    into memory that is not the module's."""

    def __init__(self, weights: Weights, model: nn.Module) -> None:
        self._weights = weights
        self._of_module: dict[int, list[tuple[str, ManagedParameter]]] = {}
        self.handles: list[Any] = []
        self._cache: tuple[Any, dict[int, Any]] = (lambda: None, {})
        self.master = False
        self._excludes_frozen = False
        for managed in weights.parameters:
            for module, attribute in managed.registered:
                if id(module) not in self._of_module:
                    self._of_module[id(module)] = []
                    self.handles.append(
                        module._register_state_dict_hook(self._after_state_dict)
                    )
                self._of_module[id(module)].append((attribute, managed))
        self.handles.append(model.register_load_state_dict_pre_hook(self._before_load))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @contextmanager
    def excluding_frozen(self) -> Iterator[None]:
        """Inside, a state_dict has no parameters that require no gradient; they are not read."""
        self._excludes_frozen = True
        try:
            yield
        finally:
            self._excludes_frozen = False

    def _after_state_dict(
        self, module: nn.Module, destination: Any, prefix: str, _: Any
    ) -> None:
        for attribute, managed in self._of_module[id(module)]:
            name = prefix + attribute
            if name not in destination:
                continue
            if self._excludes_frozen and not managed.parameter.requires_grad:
                del destination[name]
            else:
                destination[name] = self._value(destination, managed)

    def _value(self, destination: Any, managed: ManagedParameter) -> torch.Tensor:
        """Tied names share one tensor within one state_dict, as they do in torch."""
        if self._cache[0]() is not destination:
            self._cache = (weakref.ref(destination), {})
        known = self._cache[1].get(managed.index)
        value = known() if known else None
        if value is None:
            dtype = torch.float32 if self.master else managed.dtype
            value = self._weights.read(managed, dtype=dtype)
            if len(managed.registered) > 1:
                self._cache[1][managed.index] = weakref.ref(value)
        return value

    @staticmethod
    def _before_load(module: nn.Module, *_: Any) -> None:
        raise RuntimeError(
            "the parameters are the daemon's: call engine.load_state_dict() instead of "
            f"{type(module).__name__}.load_state_dict()"
        )


def detach_model(model: nn.Module) -> None:
    """A model whose parameters are an engine's gets fp32 ones of its own, without values."""
    from zerod.engine import Engine

    of = [owners[id(p)].owner for p in model.parameters() if id(p) in owners]
    found = {id(owner): owner for owner in of if isinstance(owner, Engine)}
    for engine in found.values():
        engine.release_module()


def check_state(
    model: nn.Module, parameters: list[ManagedParameter], state: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(missing, unexpected) names, as torch reports them. ValueError for a wrong shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected[name] = tuple(parameter.shape)
    persistent = model_buffers(model, persistent_only=True)
    for name, buffer in persistent.items():
        expected[name] = tuple(buffer.shape)
    for name, shape in expected.items():
        value = state.get(name)
        if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
            raise ValueError(
                f"size mismatch for {name}: {tuple(value.shape)} in the state_dict, {shape} in "
                "the model"
            )
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    return missing, unexpected


def model_buffers(model: nn.Module, persistent_only: bool = False) -> dict[str, torch.Tensor]:
    """The buffers by name, each once."""
    result: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or persistent_only and name in module._non_persistent_buffers_set:
                continue
            result[f"{path}.{name}" if path else name] = buffer
    return result
