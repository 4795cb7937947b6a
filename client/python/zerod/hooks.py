# SPDX-License-Identifier: Apache-2.0
"""When a unit is gathered and released: around its module's forward, and again in the backward
pass.

Forward: the module's pre-forward hook gathers, its forward hook (always called, also where forward
raises) releases. Backward: a hook on every output tensor gathers; the unit is released when its own
gradients have been handed over and the gradients of its inputs are known, at the latest when the
outermost backward pass ends. Two nets catch what has no such hook: reading a parameter of a module
inside any forward gathers its unit, and so does autograd when it unpacks a saved tensor that lies
in a unit's memory. Units that are resident need none of this and get no hook.

What the nets cannot see is a parameter that was looked up before: a checkpoint's recomputation may
have it among its arguments, and the graph that a backward pass with create_graph makes has it as it
was then. The last few units that were looked up outside of their module's forward stay held to the
forward's end, and where something is recomputed from the beginning of the backward pass to its end;
those of a pass that makes a graph are held until step(). So are all units whose module gave a
parameter back, or a view of one (learned queries, expanded to the batch): others go on to read it.

Holds are a set: gathering twice and releasing twice do no harm.
"""

import logging
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zerod.backward import BackwardPass
from zerod.model import ModelDescription, callable_module, paths_of, tensors_in

log = logging.getLogger("zerod")
_task_id = torch._C._current_graph_task_id  # -1 outside of backward
_STRAYS_MAX = 4


class Call:
    """One forward of a unit's module, for the hooks in the graph that it made."""

    __slots__ = ("unit", "gathering", "alone", "inputs", "open_inputs", "task")

    def __init__(self, unit: int, gathering: "Gathering") -> None:
        self.unit = unit
        self.alone: nn.Module | None = None  # a part of the unit's module, called from outside
        self.gathering = gathering
        self.inputs = 0
        self.open_inputs = 0
        self.task = 0  # serial of the backward pass that reached the outputs

    def watch_inputs(self, values: object) -> None:
        for tensor in tensors_in(values):
            if not tensor.requires_grad or isinstance(tensor, nn.Parameter):
                continue
            self.inputs += 1
            handle = tensor.register_hook(lambda _, i=self.inputs: self._on_input(i))
            if tensor.grad_fn is None:  # a leaf may live longer than the graph
                self.gathering.leaf_handles.append(handle)

    def watch_outputs(self, value: object) -> None:
        for tensor in tensors_in(value):
            if tensor.grad_fn is not None and tensor.requires_grad:
                tensor.register_hook(self._on_output)

    def _on_output(self, _: torch.Tensor) -> None:
        gathering = self.gathering
        serial = gathering.backward.enter()
        gathering.gather(self.unit)
        if self.task != serial:
            self.task = serial
            gathering.backward.expect(self.unit)
            self.open_inputs = self.inputs
            if self.inputs:
                gathering.backward.open_calls[self.unit] += 1

    def _on_input(self, _: int) -> None:
        backward = self.gathering.backward
        if self.task != backward.serial or self.open_inputs == 0:
            return
        self.open_inputs -= 1
        if self.open_inputs == 0:
            backward.open_calls[self.unit] -= 1
            self.gathering.release_if_done(self.unit)


class Trace:
    """Says when a step gathers other units than the one before, or in another order: what was
    gathered ahead was then not what was needed."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._last: list[int] | None = None
        self._units: list[int] = []

    def add(self, unit: int) -> None:
        self._units.append(unit)

    def end_step(self) -> None:
        last, self._last, self._units = self._last, self._units, []
        if last is None or last == self._last:
            return
        now = self._last
        place = next((i for i, (a, b) in enumerate(zip(last, now)) if a != b), None)
        if place is None:
            log.warning("the step gathered %d units, the one before %d", len(now), len(last))
        else:
            log.warning(
                "gather %d of the step was of unit %r, in the step before of %r",
                place + 1, self._names[now[place]], self._names[last[place]],
            )


class Gathering:
    """The holds of one client."""

    def __init__(
        self, model: nn.Module, description: ModelDescription, client: Any, backward: BackwardPass
    ) -> None:
        self.client = client
        self.backward = backward
        self.trace: Trace | None = None
        views = client.units
        self.held = bytearray(len(views))
        self.pins = [0] * len(views)  # GatheredParameters
        self.depth = [0] * len(views)  # forwards of the unit's modules under way
        # The last units that were looked up in this step outside of their modules' forwards, and
        # whether a graph was being made then.
        self._strays: dict[int, bool] = {}
        self._returned: set[int] = set()  # those of them that a module gave back
        self._recomputes = False  # after that a module was called whose forward is made again
        self._differentiates = False  # the engine's forward under way
        self._makes_graph = False  # the backward pass under way, of tensors that no net packs
        self._in_graphs: set[int] = set()  # held for such a graph
        self._kept: set[int] = set()  # held whatever releases them
        self.active = 0  # forwards under way, the engine's own included
        self.calls: list[Call] = []
        self.leaf_handles: list[Any] = []
        self.demand_units = [u for u, view in enumerate(views) if not view.resident]
        self._demand = bytearray(0 if view.resident else 1 for view in views)
        self._starts: list[int] = []
        self._start_units: list[int] = []
        self._hooked: list[tuple[int, nn.Module]] = []
        self._hooked_alone: list[tuple[int, nn.Module]] = []
        self.handles: list[Any] = []  # of the hooks that are on the model's modules
        self._watched: list[nn.Module] = []
        self._compiler_seen = False
        if self.demand_units:
            backward.on_begin = self.begin_backward
            backward.on_unit_done = self.release_if_done
            backward.on_end = self.end_backward
            self._index_addresses()
            self._install(model, description)

    # --- Holds.

    def gather(self, unit: int) -> None:
        if not self.held[unit]:
            self.client.gather(unit)
            self.held[unit] = 1
            if self.trace:
                self.trace.add(unit)

    def end_step(self) -> None:
        """After STEP."""
        if self.trace:
            self.trace.end_step()

    def release(self, unit: int) -> None:
        if unit in self._kept:
            return
        if self.held[unit] and not self.depth[unit] and not self.pins[unit]:
            self.held[unit] = 0
            self.client.release(unit)

    def release_idle(self) -> None:
        for unit in self.demand_units:
            if self.held[unit]:
                self.release(unit)

    def release_if_done(self, unit: int) -> None:
        if self._demand[unit] and not self._makes_graph and self.backward.done(unit):
            self.release(unit)

    def begin_backward(self) -> None:
        # Within a pass gradients are enabled where it makes a graph (create_graph). Where the nets
        # are up they pack what that graph saves.
        self._makes_graph = torch.is_grad_enabled() and not _saved_tensor_hooks_present()
        if self._recomputes:
            for unit, in_graph in self._strays.items():
                if in_graph:
                    self.gather(unit)
                    self._kept.add(unit)

    def end_backward(self) -> None:
        for handle in self.leaf_handles:
            handle.remove()
        self.leaf_handles.clear()
        if self._makes_graph:
            self._in_graphs.update(unit for unit in self.demand_units if self.held[unit])
        self._makes_graph = False
        self._let_go()

    def _let_go(self) -> None:
        """Nothing is under way: what is held for nothing later is released."""
        self._kept = set(self._in_graphs)
        self.release_idle()

    def reset(self) -> None:
        """Before STEP, and after an exception that skipped hooks: nothing is under way."""
        self.calls.clear()
        self.active = 0
        for unit in self.demand_units:
            self.depth[unit] = 0
        self._strays.clear()
        self._returned.clear()
        self._in_graphs.clear()
        self._recomputes = self._makes_graph = False
        self.end_backward()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the engine's own forward: the nets are up, and at the end all is released."""
        if not self.demand_units:
            yield
            return
        if not self._compiler_seen and "torch._dynamo" in sys.modules:
            self.register()
        outermost = self.active == 0 and _task_id() == -1
        if outermost:
            self._differentiates = torch.is_grad_enabled()
        self.active += 1
        try:
            if torch.is_grad_enabled() and not _saved_tensor_hooks_present():
                with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                    yield
            else:
                yield
        finally:
            self.active -= 1
            if outermost:
                self.calls.clear()
                self.active = 0
                for unit in self.demand_units:
                    self.depth[unit] = 0
                self._differentiates = False
                self._let_go()

    # --- Hooks.

    def _install(self, model: nn.Module, description: ModelDescription) -> None:
        paths = paths_of(model)
        modules: dict[tuple[int, int], tuple[int, nn.Module]] = {}
        alone: dict[tuple[int, int], tuple[int, nn.Module]] = {}

        def add(unit: int, module: nn.Module) -> None:
            modules.setdefault((unit, id(module)), (unit, module))

        for unit in self.demand_units:
            add(unit, callable_module(model, self.client.units[unit].name))
        for managed in description.parameters:
            unit = self.client.parameters[managed.index].unit
            if not self._demand[unit]:
                continue
            home = self.client.units[unit].name
            for module, attribute in managed.registered:
                self._watch_reads(module, attribute, unit)
                # A module that is also registered elsewhere is called from there too.
                for path in paths[id(module)]:
                    if home and path != home and not path.startswith(f"{home}."):
                        add(unit, callable_module(model, path))
                if len(managed.registered) > 1:
                    # Its unit is the module around all of them, but one alone may be called too,
                    # as generate() calls an encoder.
                    part = callable_module(model, paths[id(module)][0])
                    alone.setdefault((unit, id(part)), (unit, part))
        self._hooked = list(modules.values())
        self._hooked_alone = [part for key, part in alone.items() if key not in modules]
        self.register()

    def register(self) -> None:
        """Hooks for eager mode; once a compiler is loaded, hooks that it leaves alone. (Loading it
        takes longer than all the rest of initialize().)"""
        self._compiler_seen = "torch._dynamo" in sys.modules
        shield = torch._dynamo.disable if self._compiler_seen else lambda function: function
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for unit, module in self._hooked:
            self._register(module, self._pre_forward(unit), self._post_forward(unit), shield)
        for unit, module in self._hooked_alone:
            self._register(module, self._pre_alone(unit), self._post_alone(unit), shield)

    def _register(self, module: nn.Module, before: Any, after: Any, shield: Any) -> None:
        self.handles += [
            module.register_forward_pre_hook(shield(before), prepend=True, with_kwargs=True),
            module.register_forward_hook(shield(after), always_call=True),
        ]

    def _pre_forward(self, unit: int) -> Any:
        def pre_forward(_: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(unit, self)
            self.calls.append(call)
            self.active += 1
            self.depth[unit] += 1
            self.gather(unit)
            if self._strays and not self._recomputes:
                self._recomputes = self._will_recompute()
            if torch.is_grad_enabled():
                call.watch_inputs((args, kwargs))

        return pre_forward

    def _post_forward(self, unit: int) -> Any:
        def post_forward(_: nn.Module, args: Any, output: Any) -> None:
            call = self._pop(unit)
            if call is None:
                return  # its pre-forward hook never ran
            self.active = max(0, self.active - 1)
            self.depth[unit] = max(0, self.depth[unit] - 1)
            if torch.is_grad_enabled():
                call.watch_outputs(output)
            if _task_id() != -1:
                return  # a recomputation: the backward pass needs it next
            if self.active:
                self._keep_returned(output)
            self.release(unit)
            if self.active == 0:
                self._let_go()

        return post_forward

    def _pre_alone(self, unit: int) -> Any:
        """For a module within the unit's: it is called within a forward that gathers the unit, but
        for when none is under way."""
        pre_forward = self._pre_forward(unit)

        def pre_alone(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.active == 0 and _task_id() == -1:
                pre_forward(module, args, kwargs)
                self.calls[-1].alone = module

        return pre_alone

    def _post_alone(self, unit: int) -> Any:
        post_forward = self._post_forward(unit)

        def post_alone(module: nn.Module, args: Any, output: Any) -> None:
            if any(call.alone is module for call in self.calls):
                post_forward(module, args, output)

        return post_alone

    def _will_recompute(self) -> bool:
        """A checkpoint is around: one kind has its own hooks on what is saved, the other saves
        nothing. (no_grad and a user's hooks look the same; then units are held for nothing.)"""
        if _task_id() != -1:
            return False
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] != self._pack:
            return True
        return self._differentiates and not torch.is_grad_enabled()

    def _pop(self, unit: int) -> Call | None:
        for i in range(len(self.calls) - 1, -1, -1):
            if self.calls[i].unit == unit:
                call = self.calls[i]
                del self.calls[i:]
                return call
        return None

    def remove(self) -> None:
        """The model is as it was before: nothing is gathered for it any more."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for module in self._watched:
            module.__dict__["_parameters"] = dict(module._parameters)
        self._watched = []
        self._hooked = []
        self._hooked_alone = []

    # --- Nets.

    def _watch_reads(self, module: nn.Module, attribute: str, unit: int) -> None:
        watched = module._parameters
        if not isinstance(watched, WatchedParameters):
            watched = WatchedParameters(watched)
            watched.gathering = self
            module.__dict__["_parameters"] = watched
            self._watched.append(module)
        watched.units[attribute] = unit

    def on_read(self, unit: int) -> None:
        """A parameter was looked up inside a forward."""
        if self._strays and not self._recomputes:
            self._recomputes = self._will_recompute()  # a checkpoint may be within the module
        if self.held[unit] and self.depth[unit] or not self.active and _task_id() == -1:
            return
        self.gather(unit)
        if not self.depth[unit]:
            self._keep(unit)

    def _keep(self, unit: int) -> None:
        """A forward that only looks at each block before it calls it (for its type, say) is not to
        hold them all."""
        makes_graph = torch.is_grad_enabled() and _task_id() == -1
        self._strays[unit] = self._strays.pop(unit, False) or makes_graph
        self._kept.add(unit)
        passing = [stray for stray in self._strays if stray not in self._returned]
        if len(passing) > _STRAYS_MAX:
            oldest = passing[0]
            del self._strays[oldest]
            self._kept.discard(oldest)
            self._kept |= self._in_graphs
            self.release(oldest)

    def _keep_returned(self, output: object) -> None:
        for tensor in tensors_in(output):
            try:
                unit = self._unit_at(tensor)
            except RuntimeError:
                continue  # no storage (sparse, say)
            if unit >= 0 and self.held[unit] and not self.depth[unit]:
                self._returned.add(unit)
                self._keep(unit)

    def _index_addresses(self) -> None:
        first: dict[int, int] = {}
        for view in self.client.parameters:
            start = view.address - view.offset * (4 if self.client.dtype == "float32" else 2)
            first[view.unit] = start
        ordered = sorted((start, unit) for unit, start in first.items())
        self._starts = [start for start, _ in ordered]
        self._start_units = [unit for _, unit in ordered]
        self._base = self.client.base
        self._end = self._base + self.client.reserved_bytes

    def _unit_at(self, tensor: torch.Tensor) -> int:
        """In whose memory the tensor lies; -1: in none, or in one that stays gathered."""
        address = tensor.data_ptr()
        if not self._base <= address < self._end:
            return -1
        unit = self._start_units[bisect_right(self._starts, address) - 1]
        return unit if self._demand[unit] else -1

    def _pack(self, tensor: torch.Tensor) -> Any:
        # The hooks take torch's own check for in-place changes away, so it is done here.
        try:
            return (tensor, tensor._version, self._unit_at(tensor))
        except RuntimeError:  # no storage (while a compiler traces), or no version
            return tensor

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        tensor, version, unit = packed
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {tensor.type()} {list(tensor.shape)} is at version "
                f"{tensor._version}; expected version {version} instead. A parameter is modified "
                "by engine.step(): a graph from before it cannot be used after it"
            )
        if unit >= 0 and not self.held[unit]:
            if _task_id() != -1:
                self.backward.enter()
            self.gather(unit)
        return tensor


class WatchedParameters(dict[str, Any]):
    """A module's `_parameters` where looking one up gathers its unit, inside of a forward."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.units: dict[str, int] = {}
        self.gathering: Gathering | None = None

    def __getitem__(self, name: str) -> Any:
        unit = self.units.get(name)
        if unit is not None and self.gathering is not None:
            self.gathering.on_read(unit)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        import copy

        return {name: copy.deepcopy(value, memo) for name, value in self.items()}

    def __reduce__(self) -> Any:
        return (dict, (dict(self),))


def _saved_tensor_hooks_present() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
