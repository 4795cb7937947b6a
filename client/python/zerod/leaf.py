# SPDX-License-Identifier: Apache-2.0
"""Leaf modules: those whose parameters, all modules' within included, are gathered as one unit.

For mixtures of experts, whose experts are called in another order in each pass, and for modules of
many small parts. The functions and their names are DeepSpeed's; call them before `initialize`,
which fixes the units. `zero_optimization.leaf_module` and `stage3_module_granularity_threshold` of
the configuration are applied there.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import container

log = logging.getLogger("zerod")

# DeepSpeed's name for it, so that what it flagged counts here too.
_FLAG = "_z3_leaf"
_CONTAINERS = tuple(getattr(container, name) for name in container.__all__)
_LEAF_ELEMENTS_MAX = 10**9  # a larger module is no leaf by its granularity
_DEFAULT_CLASSES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)

Classes = Sequence[type | str]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this very module is flagged."""
    return bool(getattr(model, _FLAG, False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The flagged modules of `model`, itself included."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    setattr(model, _FLAG, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Classes, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Flags the modules of these classes, and returns them. A class may be given by its name, with
    or without its module's. ValueError where there is none, unless told otherwise."""
    return _set_by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Classes, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Takes the flag from the modules of these classes, and returns them."""
    return _set_by_class(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module,
    module_names: Iterable[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Flags modules by their names in `named_modules()`. Returns them, and the names that are not
    there; ValueError for those, unless told otherwise."""
    modules = dict(model.named_modules())
    names = list(module_names)
    missing = [name for name in names if name not in modules]
    _refuse(missing and raise_if_not_found, f"there are no modules named {missing}")
    found = [modules[name] for name in names if name in modules]
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: Iterable[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Flags modules by how their names in `named_modules()` end. Returns them, and the suffixes
    that fit no module; ValueError for those, unless told otherwise."""
    suffixes = list(module_name_suffixes)
    modules = dict(model.named_modules())
    missing = [s for s in suffixes if not any(name.endswith(s) for name in modules)]
    _refuse(missing and raise_if_not_found, f"no module's name ends in one of {missing}")
    found = [m for name, m in modules.items() if any(name.endswith(s) for s in suffixes)]
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing


def apply_config(model: nn.Module, zero: dict[str, Any]) -> None:
    """Flags what "zero_optimization" asks for. What it names and the model lacks is a warning;
    that goes for the default classes only where they were chosen."""
    leaf = zero["leaf_module"]
    for name in leaf["classes"]:
        found = set_z3_leaf_modules(model, [name], raise_if_not_found=False)
        if not found and name not in _DEFAULT_CLASSES:
            log.warning("zero_optimization.leaf_module.classes: no module is a %r", name)
    for key, setter in (
        ("names", set_z3_leaf_modules_by_name),
        ("name_suffixes", set_z3_leaf_modules_by_suffix),
    ):
        _, missing = setter(model, leaf[key], raise_if_not_found=False)
        if missing:
            log.warning("zero_optimization.leaf_module.%s: no module fits %s", key, missing)
    threshold = zero["stage3_module_granularity_threshold"]
    if threshold > 0:
        _apply_granularity(model, threshold)


def _apply_granularity(model: nn.Module, threshold: int) -> None:
    granularity: dict[nn.Module, int] = {}
    _measure(model, granularity)
    if not any(value <= threshold for value in granularity.values()):
        finest = min(granularity, key=lambda module: granularity[module], default=None)
        log.warning(
            "zero_optimization.stage3_module_granularity_threshold: no module is as fine as %d%s",
            threshold,
            f"; the finest is a {type(finest).__name__} with {granularity[finest]}"
            if finest is not None
            else "",
        )
        return
    pending = [model]
    while pending:
        module = pending.pop()
        if granularity.get(module, threshold + 1) <= threshold:
            set_z3_leaf_module(module, True)
        else:
            pending += module.children()


def _measure(module: nn.Module, granularity: dict[nn.Module, int]) -> tuple[int, int]:
    """Fills in elements / (1 + modules within) of each module that has others within and is not a
    mere container. Returns (modules, elements) of this one; those without parameters count for
    nothing."""
    if next(module.parameters(), None) is None:
        return 0, 0
    elements = sum(p.numel() for p in module.parameters(recurse=False))
    children = list(module.children())
    if not children:
        return 1, elements
    modules = 0
    for child in children:
        within = _measure(child, granularity)
        modules += within[0]
        elements += within[1]
    if isinstance(module, _CONTAINERS):
        return modules, elements
    modules += 1
    if elements <= _LEAF_ELEMENTS_MAX:
        granularity[module] = elements // modules
    return modules, elements


def _set_by_class(
    model: nn.Module, classes: Classes, flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    if not all(isinstance(c, (type, str)) for c in classes):
        raise TypeError(f"the classes must be types or names of types, not {classes!r}")
    found = [m for m in model.modules() if any(_is_a(m, c) for c in classes)]
    _refuse(not found and raise_if_not_found, f"no module is one of {list(classes)}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _is_a(module: nn.Module, wanted: type | str) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    own = type(module)
    return wanted in (own.__name__, f"{own.__module__}.{own.__qualname__}")


def _refuse(refused: object, what: str) -> None:
    if refused:
        raise ValueError(what)
