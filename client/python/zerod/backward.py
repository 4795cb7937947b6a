# SPDX-License-Identifier: Apache-2.0
"""The backward pass: gradients are handed over as they are accumulated, and its end is found.

A pass that another engine's `backward()` began may reach parameters of this one, as a generator's
does through the discriminator. Its gradients stay in `.grad`, where zero_grad() of the module or
the engine finds them; what is there at step() joins the step.

A backward pass can hold others (reentrant checkpointing runs one inside a node of the outer one);
what counts is the outermost. `engine.backward()` says where it ends; for a plain `loss.backward()`
autograd's own end-of-task callback does.

As in DeepSpeed, a plain `loss.backward()` has its gradients divided by the number of accumulation
steps, which engine.backward() divides the loss by. That is done where they are handed over, so it
does not matter which of the model's outputs, or how many, the loss was made of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from zerod.model import ManagedParameter

_task_id = torch._C._current_graph_task_id
_COUNT_MAX = 255
_explicit: "BackwardPass | None" = None  # the engine whose backward() is under way
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Expectation:
    """Tells that a unit's gradients are complete before the backward pass has ended, so that they
    cross the network behind the rest of it.

    A parameter gets one gradient per graph it is used in: one mostly, more under reentrant
    checkpointing, none where it is not used. How many is learned from the passes before. Counts
    only grow, so a model that takes different paths is waited for to the end of its passes, and one
    that does more than ever before is late once: its surplus waits for step(). What was learned
    travels with every STEP, so that a rank that resumes adds in the same order as one that was
    never interrupted.
    """

    def __init__(self, unit_of: list[int], units: int) -> None:
        self._unit_of = unit_of
        self._expected: bytearray | None = None  # per parameter; None before the first pass
        self._in_unit = [0] * units  # parameters with a count above 0
        self._counts = bytearray(len(unit_of))
        self._missing = [0] * units

    def begin(self) -> None:
        self._counts = bytearray(len(self._counts))
        self._missing = list(self._in_unit)

    def add(self, index: int) -> None:
        if self._counts[index] == _COUNT_MAX:
            return
        count = self._counts[index] = self._counts[index] + 1
        if self._expected is not None and count == self._expected[index]:
            self._missing[self._unit_of[index]] -= 1

    def complete(self, unit: int) -> bool:
        return self._in_unit[unit] > 0 and self._missing[unit] == 0

    def end(self) -> None:
        self.restore(bytes(map(max, self._counts, self._expected or bytes(len(self._counts)))))

    def state(self) -> bytes | None:
        return None if self._expected is None else bytes(self._expected)

    def restore(self, state: bytes | None) -> None:
        self._expected = None if state is None else bytearray(state)
        self._in_unit = [0] * len(self._in_unit)
        for index, count in enumerate(state or b""):
            self._in_unit[self._unit_of[index]] += count > 0


class BackwardPass:
    """Lands the gradients of one client, and keeps count of what a unit still waits for."""

    def __init__(
        self, client: Any, parameters: list[ManagedParameter], overlap: bool = True
    ) -> None:
        self.client = client
        self.overlap = overlap  # units are reduced before the pass ends; else after it
        self.serial = 0  # of the outermost pass, from 1
        self.open_calls = [0] * len(client.units)
        self.on_begin: Callable[[], None] | None = None
        self.on_unit_done: Callable[[int], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self.is_last: Callable[[], bool] = lambda: True  # the micro-step is the step's last
        self.steps: Callable[[], int] = lambda: 1  # of accumulation
        self.parameters = parameters
        self.trainable = [p for p in parameters if p.trainable]
        self._unit_of = [view.unit for view in client.parameters]
        self._members: list[frozenset[int]] = [frozenset()] * len(client.units)
        for unit in range(len(client.units)):
            self._members[unit] = frozenset(
                p.index for p in self.trainable if self._unit_of[p.index] == unit
            )
        self.expectation = Expectation(self._unit_of, len(client.units))
        self._pending: dict[int, set[int]] = {}  # unit -> parameters without gradient in this pass
        self._landed: dict[int, None] = {}  # units landed in since they were last scattered
        self._open: dict[int, None] = {}  # units landed in this step, not yet scattered for good
        self._landed_in_step = False
        self._scattered = bytearray(len(client.units))
        self._touched = bytearray(len(parameters))  # landed in this step
        self._tasks: list[int] = []
        self._explicit = False
        self._foreign = False  # the pass is another engine's
        self._divisor = 1  # of the gradients of the pass under way
        self._late: dict[int, int] = {}  # what waits in .grad for step() is divided by then
        self.needs_scale = False  # gradients must come from a loss that was scaled
        self.scaled = False  # it was, for the next pass
        self._handles = [
            managed.parameter.register_post_accumulate_grad_hook(
                partial(self._on_gradient, managed.index)
            )
            for managed in self.trainable
        ]

    def remove(self) -> None:
        """Gradients stay in .grad from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- Where a pass begins and ends.

    def enter(self) -> int:
        """Called by every hook in a backward pass. The serial of the outermost one."""
        task = _task_id()
        if not self._tasks or task not in self._tasks:
            if not self._tasks:
                self._begin()
            self._tasks.append(task)
            if not self._explicit:
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(partial(self._leave, task))
        return self.serial

    @contextmanager
    def explicit(self) -> Iterator[None]:
        """Around the outermost pass, where the caller starts it."""
        global _explicit
        self._tasks.clear()
        self._explicit = True
        self._foreign = False
        around, _explicit = _explicit, self
        try:
            yield
            self.finish()
        finally:
            _explicit = around
            self._explicit = False
            self._tasks.clear()

    def _begin(self) -> None:
        self.serial += 1
        self._pending.clear()
        self.open_calls = [0] * len(self.open_calls)
        self._foreign = _explicit is not None and _explicit is not self
        if self.on_begin:
            self.on_begin()
        if self._foreign:
            return
        if self.needs_scale and not self.scaled:
            raise RuntimeError(
                "Loss scaling is required in fp16: call engine.backward(loss), or "
                "engine.scale(loss).backward()"
            )
        self.scaled = False
        self._divisor = 1 if self._explicit else self.steps()
        self.expectation.begin()

    def _leave(self, task: int) -> None:
        if task in self._tasks:
            del self._tasks[self._tasks.index(task) :]
            if not self._tasks:
                self.finish()

    def finish(self) -> None:
        """The outermost pass is over: hand over what was landed."""
        if not self._foreign:
            last = self.is_last()
            for unit in list(self._open if last else self._landed):
                self._scatter(unit, last)
            self.client.end_micro_step()
            self.expectation.end()
        self._pending.clear()
        if self.on_end:
            self.on_end()

    def abandon(self) -> None:
        """Outside of any pass: forgets one that ended by an exception."""
        if _task_id() == -1:
            self._tasks.clear()

    # --- What a unit waits for.

    def expect(self, unit: int) -> None:
        """A use of the unit is about to be differentiated: its trainable parameters will get
        gradients (again, where each use is a graph of its own)."""
        self._pending[unit] = set(self._members[unit])

    def done(self, unit: int) -> bool:
        return not self._pending.get(unit) and self.open_calls[unit] == 0

    # --- Gradients.

    def _on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        self.enter()
        unit = self._unit_of[index]
        if not self._foreign:
            self.expectation.add(index)
            if not self._scattered[unit]:
                self._land(index, parameter, self._divisor)
            elif self._late.setdefault(index, self._divisor) != self._divisor:
                raise RuntimeError(
                    f"{self.parameters[index].name!r} got gradients from engine.backward() and "
                    "from a plain backward() behind the step's last micro-step: use one of them"
                )
            # else it stays in .grad and adds up there until step()
        pending = self._pending.get(unit)
        if pending is None:
            self.expect(unit)
            pending = self._pending[unit]
        pending.discard(index)
        if not self._foreign:
            complete = self.overlap and self.expectation.complete(unit) and self.is_last()
            if unit in self._landed and (complete or not pending):
                self._scatter(unit, last=complete)
        if not pending and self.on_unit_done:
            self.on_unit_done(unit)

    def _land(self, index: int, parameter: torch.Tensor, divisor: int) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {self.parameters[index].name!r} is {gradient.layout}: only "
                "dense gradients are served"
            )
        if not gradient.is_contiguous():
            gradient = gradient.contiguous()
        if gradient.dtype not in _NAMES:
            gradient = gradient.float()
        if divisor != 1:
            # In place, unless a graph that goes on has it.
            gradient = gradient.detach() / divisor if gradient.requires_grad else gradient.div_(
                divisor
            )
        self.client.land(index, gradient.data_ptr(), _NAMES[gradient.dtype])
        parameter.grad = None
        unit = self._unit_of[index]
        self._landed[unit] = None
        self._open[unit] = None
        self._touched[index] = 1
        self._landed_in_step = True

    def _scatter(self, unit: int, last: bool) -> None:
        self.client.scatter(unit, last)
        self._landed.pop(unit, None)
        if last:
            self._open.pop(unit, None)
            self._scattered[unit] = 1

    def flush(self) -> None:
        """At step(): gradients that came after their unit was handed over, or in another engine's
        pass, or that the user made himself, join it. May wait for other ranks."""
        late: dict[int, list[ManagedParameter]] = {}
        for managed in self.trainable:
            if managed.parameter.grad is not None:
                late.setdefault(self._unit_of[managed.index], []).append(managed)
        for unit, members in late.items():
            if self._scattered[unit]:
                self.client.reclaim(unit)
                self._scattered[unit] = 0
            self._land_all(members)
        for unit in list(self._open):
            self._scatter(unit, last=True)

    def discard(self, set_to_none: bool = True) -> None:
        """zero_grad() of what waits in .grad, where nothing of this step was handed over: it is of
        other engines' passes, or the user's."""
        for managed in () if self._landed_in_step else self.parameters:
            self._late.pop(managed.index, None)
            gradient = managed.parameter.grad
            if set_to_none:
                managed.parameter.grad = None
            elif gradient is not None:
                gradient.detach_().zero_()

    def reduce(self, index: int) -> bool:
        """All ranks' gradients of the parameter, of this step so far, are summed, so that the sum
        may be read on any; what follows in this step waits for step() in `.grad`. False: no rank
        has one. Collective, between passes; ends behind a barrier."""
        unit = self._unit_of[index]
        given = [
            self.parameters[i] for i in self._members[unit]
            if self.parameters[i].parameter.grad is not None
        ]
        late = bool(given) and bool(self._scattered[unit])
        touched = bool(self._touched[index]) or any(p.index == index for p in given)
        if not late:
            self._land_all(given)
        rounds = self._hand_over(unit)
        most, some_late, some_touched = self.client.all_reduce(
            [float(rounds), float(late), float(touched)], "max"
        )
        # Ranks that take different paths are through with different numbers of rounds.
        if some_late or rounds < most:
            self._reduce_again(unit, given if late else [], int(most + some_late))
        self.client.barrier()
        return some_touched != 0

    def reduce_or_make(self, index: int) -> None:
        """As reduce(), but where no rank has a gradient, there is one of zeros from here on."""
        parameter = self.parameters[index].parameter
        touched = bool(self._touched[index]) or parameter.grad is not None
        (some_touched,) = self.client.all_reduce([float(touched)], "max")
        if not some_touched:
            # Of the parameter's own dtype, as .grad must be. The round that follows takes it.
            parameter.grad = torch.zeros_like(parameter)
        self.reduce(index)

    def _reduce_again(self, unit: int, late: list[ManagedParameter], until: int) -> None:
        """Further rounds: all ranks end with `until` of them."""
        rounds = 0
        while rounds < until:
            self.client.reclaim(unit)
            self._scattered[unit] = 0
            self._land_all(late)
            late = []
            rounds = self._hand_over(unit)

    def _land_all(self, members: list[ManagedParameter]) -> None:
        for managed in members:
            self._land(managed.index, managed.parameter, self._late.pop(managed.index, 1))

    def _hand_over(self, unit: int) -> int:
        rounds: int = self.client.hand_over(unit)
        self._landed.pop(unit, None)
        self._open.pop(unit, None)
        self._scattered[unit] = 1
        return rounds

    def check_frozen(self) -> None:
        for managed in self.parameters:
            if managed.frozen and managed.parameter.grad is not None:
                raise RuntimeError(
                    f"{managed.name!r} got a gradient, but was frozen when initialize() was "
                    "called: what is trained is fixed then"
                )

    def committed(self) -> None:
        """After STEP: a new step begins."""
        self._landed.clear()
        self._open.clear()
        self._late.clear()
        self._landed_in_step = False
        self._scattered = bytearray(len(self._scattered))
        self._touched = bytearray(len(self._touched))

    @property
    def has_gradients(self) -> bool:
        """Something was handed over in this step."""
        return self._landed_in_step
