# SPDX-License-Identifier: Apache-2.0
"""What programs ask of a model's experts. None of them is parallel here: a mixture of experts is
modules as any other."""

from typing import Any

from torch import nn

from zerod.as_deepspeed.face import ABOUT


def is_moe_param(param: Any) -> bool:
    """Whether an expert-parallel layer marked it: ranks then have different ones."""
    return not getattr(param, "allreduce", True)


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether there is a `deepspeed.moe.layer.MoE` in it, which cannot be made here, and its
    experts."""
    return False, 0


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Any, max_group_size: float | None = None
) -> list[dict[str, Any]]:
    """The groups as a list. NotImplementedError where a parameter is expert-parallel."""
    if not isinstance(param_groups, (dict, list, tuple)):
        raise ValueError(f"Unknown param group type of {type(param_groups)}")
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    if any(is_moe_param(param) for group in groups for param in group["params"]):
        raise NotImplementedError(f"there is no expert parallelism ({ABOUT})")
    return groups
