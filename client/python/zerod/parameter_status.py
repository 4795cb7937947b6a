# SPDX-License-Identifier: Apache-2.0
"""Whose a parameter is, and what DeepSpeed's users read of it at stage 3: ds_id, ds_shape,
ds_numel, ds_persist, ds_status, ds_active_sub_modules.

Scripts take `hasattr(parameter, "ds_id")` for "this is stage 3", so nothing else has them. There is
no `ds_tensor`: it would be this rank's part of the parameter, and no rank has one.
"""

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import nn


class Owned(NamedTuple):
    """The owner is an Engine, or the Nursery of parameters that wait for one; its `access` serves
    GatheredParameters."""

    owner: Any
    index: int  # the owner's own
    order: int  # the same on all ranks, which is what sorts parameters for what is collective


# By id(parameter). Entries go when the owner lets go.
owners: dict[int, Owned] = {}

_NAMES = ("ds_id", "ds_shape", "ds_numel", "ds_persist", "ds_active_sub_modules")
_next_id = 0
_next_order = 0


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
        if owned is None or "ds_id" not in parameter.__dict__:
            raise AttributeError("'Parameter' object has no attribute 'ds_status'")
        available = owned.owner.access.available(owned.index)
        return ZeroParamStatus.AVAILABLE if available else ZeroParamStatus.NOT_AVAILABLE


def own(
    parameter: nn.Parameter, owner: Any, index: int, persist: bool = False, partitioned: bool = True
) -> None:
    """From now on `parameter` is the owner's. Where it is `partitioned`, as at stage 3, it has what
    DeepSpeed's users read, and keeps its ds_id if it had one. All ranks in the same order."""
    global _next_id, _next_order
    owners[id(parameter)] = Owned(owner, index, _next_order)
    _next_order += 1
    if not partitioned:
        _conceal(parameter)
        return
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
    _conceal(parameter)


def _conceal(parameter: nn.Parameter) -> None:
    for name in _NAMES:
        parameter.__dict__.pop(name, None)
