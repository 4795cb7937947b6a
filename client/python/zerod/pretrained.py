# SPDX-License-Identifier: Apache-2.0
"""What transformers reads of parameters that are born in the daemon, where it expects DeepSpeed's
empty ones.

It does two things outside of GatheredParameters that do nothing to an empty tensor and would end
the process here: it pads the bias of a tied head to the head's size (BERT's kind), and looks up
weights that are parametrized to initialize what is loaded already (Wav2Vec2's kind). Both see the
values here.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from zerod.gathered import GatheredParameters
from zerod.nursery import nursery

_TYING = ("_adjust_bias", "_tie_embedding_weights", "_tie_or_clone_weights")
_adapted: set[type] = set()


def adapt() -> None:
    """Its model class, if it is loaded and this was not done before."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None or kind in _adapted:
        return
    _adapted.add(kind)
    for name in _TYING:
        if name in kind.__dict__:
            setattr(kind, name, _tying(kind.__dict__[name]))
    if "_initialize_weights" in kind.__dict__:
        kind._initialize_weights = _initializing(kind.__dict__["_initialize_weights"])


def _tying(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tie(self: nn.Module, output: nn.Module, *others: Any, **options: Any) -> Any:
        bias = getattr(output, "bias", None)
        if not _unreadable(bias):
            return original(self, output, *others, **options)
        with GatheredParameters([bias], modifier_rank=0):
            return original(self, output, *others, **options)

    return tie


def _initializing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize(self: nn.Module, module: nn.Module, *others: Any, **options: Any) -> Any:
        parameters = [p for p in _behind_parametrizations(module) if _unreadable(p)]
        if not parameters:
            return original(self, module, *others, **options)
        with GatheredParameters(parameters):
            return original(self, module, *others, **options)

    return initialize


def _behind_parametrizations(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in (module, *module.children()):
        if parametrize.is_parametrized(part):
            yield from part.parameters()


def _unreadable(parameter: Any) -> bool:
    born = nursery.find(parameter) if isinstance(parameter, nn.Parameter) else None
    return born is not None and born.arena is not None and not born.gathered
