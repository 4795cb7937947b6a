# SPDX-License-Identifier: Apache-2.0
"""What a model and an optimizer say about keys of the configuration whose value is "auto"."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_WRAPPERS_MAX = 8


def hidden_sizes(model: nn.Module) -> list[int]:
    """`hidden_size` of the model's configuration, else its `hidden_sizes`, else those of its
    `text_config`; [] where it says nothing. Of a wrapped model the outermost that says it."""
    for module in _unwrapped(model):
        config = _get(module, "config")
        for part in (config, _get(config, "text_config")):
            sizes = _sizes(_get(part, "hidden_size")) or _sizes(_get(part, "hidden_sizes"))
            if sizes:
                return sizes
    return []


def of_optimizer(optimizer: Any) -> dict[str, Any]:
    """Values by dotted path of an optimizer object that the caller passes: the rates of its groups
    and its defaults. Of a function that makes one nothing is known yet."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return {}
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    values: dict[str, Any] = {
        f"optimizer.params.{name}": optimizer.defaults[name]
        for name in ("lr", "betas", "eps", "weight_decay")
        if isinstance(optimizer.defaults.get(name), (int, float, list, tuple))
    }
    if rates and len(rates) == len(optimizer.param_groups):
        same = len(set(rates)) == 1
        values["scheduler.params.warmup_max_lr"] = rates[0] if same else rates
    return values


def _unwrapped(model: nn.Module) -> Iterator[Any]:
    """The model and what it wraps, as DistributedDataParallel, PEFT and torch.compile do."""
    seen: list[int] = []
    module: Any = model
    while module is not None and id(module) not in seen and len(seen) < _WRAPPERS_MAX:
        seen.append(id(module))
        yield module
        inner = _base_model(module)
        for name in ("module", "_orig_mod"):
            if inner is None and isinstance(_get(module, name), nn.Module):
                inner = _get(module, name)
        module = inner


def _base_model(module: Any) -> Any:
    base = _get(module, "get_base_model")
    try:
        inner = base() if callable(base) and not isinstance(base, nn.Module) else None
    except Exception:  # something else of that name
        return None
    return inner if isinstance(inner, nn.Module) else None


def _get(holder: Any, name: str) -> Any:
    """An attribute or an item, or None. A property that fails is as good as none."""
    if holder is None:
        return None
    if isinstance(holder, Mapping):
        return holder.get(name)
    try:
        return getattr(holder, name, None)
    except Exception:
        return None


def _sizes(value: Any) -> list[int]:
    """Of one whole number or a list of them; [] for anything else."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
    return [int(item) for item in items] if whole and all(item > 0 for item in items) else []
