# SPDX-License-Identifier: Apache-2.0
"""Parameters that a module uses without holding them, as DeepSpeed's scripts announce them.

A parameter belongs to the smallest unit whose module contains all its uses; `initialize` fixes the
units. An announced use counts among them.
"""

import logging
from typing import Any

from torch import nn

from zerod.parameter_status import owners

log = logging.getLogger("zerod")
_ATTRIBUTE = "_zerod_external_parameters"  # of the module: a list, so that copies of it are right


def external_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that `module` was said to use."""
    return list(module.__dict__.get(_ATTRIBUTE, ()))


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Says that the forward of `module` reads `parameter`, which another module holds. Before
    `initialize`: the two are then gathered by a module around both.

    After `initialize` it changes nothing, and says so in the log: the units are fixed, and a
    parameter that is looked up inside any forward is gathered anyway. RuntimeError where
    `parameter` is no Parameter.
    """
    _check(parameter)
    if any(p is parameter for p in external_parameters(module)):
        return
    module.__dict__.setdefault(_ATTRIBUTE, []).append(parameter)
    _say_if_late(module, parameter, "register")


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Takes it back. RuntimeError where it was not registered, or is no Parameter."""
    _check(parameter)
    kept = [p for p in external_parameters(module) if p is not parameter]
    if len(kept) == len(external_parameters(module)):
        raise RuntimeError(
            f"the parameter is not registered as an external one of this {type(module).__name__}"
        )
    module.__dict__[_ATTRIBUTE] = kept
    _say_if_late(module, parameter, "unregister")


def _check(parameter: Any) -> None:
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(f"{type(parameter).__name__} is not a torch.nn.Parameter")


def _say_if_late(module: nn.Module, parameter: nn.Parameter, what: str) -> None:
    owned = owners.get(id(parameter))
    # Of an engine; the nursery has none.
    description = getattr(owned.owner, "description", None) if owned is not None else None
    if owned is not None and description is not None:
        log.warning(
            "%s_external_parameter(%s, %r) after initialize() changes nothing: the units are "
            "fixed, and a parameter that a forward looks up is gathered anyway",
            what, type(module).__name__, description.parameters[owned.index].name,
        )
