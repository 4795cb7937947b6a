# SPDX-License-Identifier: Apache-2.0
"""What a forward pass returned, and a plain `loss.backward()` of it: as in DeepSpeed, its gradients
are divided by the number of accumulation steps, as engine.backward() divides the loss.

Each output's gradient is divided once. One that another output was made of (the logits beside the
loss) is part of that one's backward pass, which is divided already.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch

_current_node = torch._C._current_autograd_node


class Outputs:
    """The hooks on the outputs of one forward pass. `enter` is called by each in any backward
    pass, and says whether a plain backward() began it; it then has a number of its own."""

    def __init__(
        self, tensors: Iterable[torch.Tensor], enter: Callable[[], int | None],
        steps: Callable[[], int],
    ) -> None:
        self._enter = enter
        self._steps = steps
        self._pass = 0
        self._inner: set[int] = set()  # of this pass
        # Each once, however often it is among them; several may come from one node.
        made = {
            (t.grad_fn._sequence_nr(), t.output_nr): t for t in tensors if t.grad_fn is not None
        }
        self._numbers = frozenset(number for number, _ in made)
        for (number, _), tensor in made.items():
            tensor.register_hook(partial(self._on_gradient, number))

    def _on_gradient(self, number: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        plain = self._enter()
        steps = self._steps()
        # Without a gradient: the node has others, and they have one.
        if plain is None or steps == 1 or gradient is None:
            return None
        if plain != self._pass:
            self._pass, self._inner = plain, set()
        if number in self._inner:
            return None
        if len(self._numbers) > 1:
            self._inner |= _reached(_current_node(), self._numbers - {number})
        return gradient / steps


def _reached(node: torch.autograd.graph.Node, numbers: frozenset[int]) -> set[int]:
    """Which of the nodes with these numbers the gradient passes behind `node`. Numbers fall on the
    way, so what is made before all of them is not looked at."""
    found: set[int] = set()
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [node]
    lowest = min(numbers)
    while waiting:
        for child, _ in waiting.pop().next_functions:
            if child is None or child in seen or child._sequence_nr() < lowest:
                continue
            seen.add(child)
            waiting.append(child)
            if child._sequence_nr() in numbers:
                found.add(child._sequence_nr())
    return found
