# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.checkpointing`: activation checkpointing, by torch.utils.checkpoint."""

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from zerod.as_deepspeed.entry import DeepSpeedConfig

_configured = False


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Every option is refused, here and in `deepspeed_config` (ValueError): what is kept between
    forward and backward is the script's own. `num_checkpoints` sizes what contiguous_checkpointing
    would keep."""
    options = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    chosen = [name for name, value in options.items() if value]
    if mpu_ is not None:
        chosen.append("mpu_")
    if chosen:
        raise NotImplementedError(f"deepspeed.checkpointing.configure: {chosen} is not served")
    if deepspeed_config is not None:
        DeepSpeedConfig(deepspeed_config)
    global _configured
    _configured = True


def is_configured() -> bool:
    return _configured


def reset() -> None:
    """Nothing is kept between calls."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `function`; its activations are computed again in the backward pass."""
    # torch's reentrant kind gives gradients to positional arguments only, and takes no others.
    names = tuple(kwargs)

    def call(*values: Any) -> Any:
        positional = values[: len(args)]
        return function(*positional, **dict(zip(names, values[len(args) :], strict=True)))

    return torch_checkpoint.checkpoint(call, *args, *kwargs.values(), use_reentrant=True)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)
