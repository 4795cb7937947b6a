# SPDX-License-Identifier: Apache-2.0
"""What the configuration says of the types that the model computes in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zerod import config as configuration

_AUTOCAST = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


class Precision:
    """`inputs` casts what goes into the model, `autocast` is what its forward runs in."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._cast_to: torch.dtype | None = None
        if config["fp16"]["enabled"] and config["fp16"]["auto_cast"]:
            self._cast_to = configuration.dtype(config)
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        section = config["torch_autocast"]
        if section["enabled"]:
            name = section.get("dtype") or "bfloat16"
            if name.lower() not in _AUTOCAST:
                raise ValueError(
                    f"torch_autocast.dtype is {name!r}; on CPUs it must be \"bfloat16\""
                )
            dtype = _AUTOCAST[name.lower()]
            self._autocast = lambda: torch.autocast("cpu", dtype=dtype)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._cast_to is None:
            return args, kwargs
        return pytree.tree_map_only(torch.Tensor, self._cast, (args, kwargs))

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._cast_to) if tensor.is_floating_point() else tensor

    def autocast(self) -> AbstractContextManager[Any]:
        return self._autocast()
