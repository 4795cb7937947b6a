# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's users read of a parameter: ds_id, ds_shape, ds_numel, ds_persist, ds_status,
ds_active_sub_modules.

There is no `ds_tensor`: it would be this rank's part of the parameter, and no rank has one.
"""

from enum import Enum
from typing import Any

import torch
from torch import nn

# id(parameter) -> (owner, index). The owner is an Engine, or the Nursery of parameters that wait
# for one; its `access` serves GatheredParameters. Entries go when the owner lets go.
owners: dict[int, tuple[Any, int]] = {}

_NAMES = ("ds_id", "ds_shape", "ds_numel", "ds_persist", "ds_active_sub_modules")
_next_id = 0


class ZeroParamStatus(Enum):
    """Of `parameter.ds_status`. Gathers are waited for, so nobody sees INFLIGHT."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class _Status:
    """`parameter.ds_status`, looked up when it is asked for. Not a data descriptor: a parameter's
    own attribute of that name comes first."""

    def __get__(self, parameter: Any, _: Any = None) -> Any:
        if parameter is None:
            return self
        owned = owners.get(id(parameter))
        if owned is None:
            raise AttributeError("'Parameter' object has no attribute 'ds_status'")
        owner, index = owned
        available = owner.access.available(index)
        return ZeroParamStatus.AVAILABLE if available else ZeroParamStatus.NOT_AVAILABLE


def own(parameter: nn.Parameter, owner: Any, index: int, persist: bool = False) -> None:
    """From now on `parameter` is the owner's. It keeps its ds_id if it had one."""
    global _next_id
    owners[id(parameter)] = (owner, index)
    if "ds_status" not in nn.Parameter.__dict__:
        nn.Parameter.ds_status = _Status()  # type: ignore[attr-defined]
    if not hasattr(parameter, "ds_id"):
        parameter.ds_id = _next_id  # type: ignore[attr-defined]
        _next_id += 1
    parameter.ds_shape = torch.Size(parameter.shape)  # type: ignore[attr-defined]
    parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
    parameter.ds_persist = persist  # type: ignore[attr-defined]
    # Modules in whose forward it is held: none where scripts look, between forwards. They clear it.
    parameter.ds_active_sub_modules = set()  # type: ignore[attr-defined]


def disown(parameter: nn.Parameter) -> None:
    """Nobody serves it any more: it is a plain parameter again. Idempotent."""
    owners.pop(id(parameter), None)
    for name in _NAMES:
        parameter.__dict__.pop(name, None)
