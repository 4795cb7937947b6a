# SPDX-License-Identifier: Apache-2.0
"""How the modules of the package `deepspeed` get their names: when they are first used."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

ABOUT = "docs/from-deepspeed.md lists what is served"
VERSION = "0.19.8+zerod"  # the DeepSpeed whose face it is; also in the package's metadata


def names(
    module: str,
    exports: Mapping[str, str] | None = None,
    submodules: tuple[str, ...] = (),
    never: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A module's `__getattr__` and `__dir__`. `exports`: name -> "module:attribute", or "module:"
    for the module itself; `never`: name -> what it belongs to, which zerod does not do: using it
    is an error that says so."""
    exports, never = exports or {}, never or {}
    short = module.partition(".")[2] or module

    def get(name: str) -> Any:
        if name in exports:
            home, _, attribute = exports[name].partition(":")
            found = importlib.import_module(home)
            value = getattr(found, attribute) if attribute else found
        elif name in submodules:
            return importlib.import_module(f"{module}.{name}")
        elif name in never:
            value = refused(f"{module}.{name}", never[name])
        else:
            raise AttributeError(
                f"{module!r} has no {name!r}: zerod takes deepspeed's place here, and does not "
                f"have this part of {short} ({ABOUT})"
            )
        setattr(importlib.import_module(module), name, value)
        return value

    def listing() -> list[str]:
        return sorted({*exports, *submodules, *never})

    return get, listing


def refused(name: str, what: str) -> type:
    """A class that can be named and imported. Calling it, or taking anything from it, is an
    error."""
    message = f"{name}: zerod does not do {what} ({ABOUT})"

    class Refusing(type):
        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            raise NotImplementedError(message)

    class Refused(metaclass=Refusing):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError(message)

    Refused.__name__ = Refused.__qualname__ = name.rpartition(".")[2]
    Refused.__doc__ = message
    return Refused
