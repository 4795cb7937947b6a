# SPDX-License-Identifier: Apache-2.0
"""torch's constructors while a model is built under zerod.zero.Init: floating-point tensors are of
the job's type, whatever type the call names. So parameters are never held in fp32, and buffers fit
what the model computes. The constructors are those that DeepSpeed's Init changes: not rand, not
linspace, not the methods .float() and .to()."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAMES = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
empty = torch.empty  # as it was, for this package's own memory
_thread = threading.local()


@contextmanager
def untouched() -> Iterator[None]:
    """Inside, this thread's calls give what they always do."""
    before = getattr(_thread, "untouched", False)
    _thread.untouched = True
    try:
        yield
    finally:
        _thread.untouched = before


class Constructors:
    """In force from its making to undo(), for the thread that made it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._of_thread = threading.get_ident()
        self._active = True
        self._wrapped = {name: self._wrap(getattr(torch, name)) for name in _NAMES}
        self._originals = {name: getattr(torch, name) for name in _NAMES}
        for name, wrapped in self._wrapped.items():
            setattr(torch, name, wrapped)
        self._own_new = torch.Tensor.__dict__.get("__new__")
        inherited = torch.Tensor.__new__
        constructors = self

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            made = inherited(cls, *args, **kwargs)
            return constructors._converted(made) if cls is torch.Tensor else made

        torch.Tensor.__new__ = new  # type: ignore[method-assign]

    def undo(self) -> None:
        self._active = False
        for name, wrapped in self._wrapped.items():
            # Where somebody has put another one on top, ours stays below and does nothing.
            if getattr(torch, name) is wrapped:
                setattr(torch, name, self._originals[name])
        if self._own_new is None:
            del torch.Tensor.__new__
        else:
            torch.Tensor.__new__ = self._own_new  # type: ignore[method-assign]

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def construct(*args: Any, **kwargs: Any) -> Any:
            return self._converted(original(*args, **kwargs))

        return construct

    def _converted(self, made: Any) -> Any:
        if (
            self._active
            and threading.get_ident() == self._of_thread
            and not getattr(_thread, "untouched", False)
            and isinstance(made, torch.Tensor)
            and made.is_floating_point()
            and made.dtype != self._dtype
        ):
            made.data = made.data.to(self._dtype)
        return made
