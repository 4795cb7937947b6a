# SPDX-License-Identifier: Apache-2.0
"""The types of a model's buffers, as data_types in the configuration says."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zerod import config as configuration

_HALVES = (torch.float16, torch.bfloat16)
_TYPES = {
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
}


def apply_config(model: nn.Module, resolved: Mapping[str, Any]) -> None:
    """For `initialize`: buffers of a 16-bit job that are to be fp32 become it, all others what
    data_types.buffer_dtype says."""
    types = resolved["data_types"]
    kept = keep_in_fp32(model, types["keep_in_fp32_modules"], configuration.dtype(resolved))
    wanted = _TYPES.get((types["buffer_dtype"] or "").lower())
    if wanted is None:
        return
    for _, buffer in _floating_buffers(model):
        if id(buffer) not in kept and buffer.dtype != wanted:
            buffer.data = buffer.data.to(wanted)


def keep_in_fp32(model: nn.Module, names: str | Iterable[str], dtype: torch.dtype) -> set[int]:
    """Makes buffers of a job of `dtype` fp32 that are named so: by `names`, in which * stands for
    anything, found anywhere in a buffer's name; or where it is "auto" by the modules themselves, as
    models of Transformers do. Returns their ids. Parameters have the job's type all the same."""
    patterns = set(_own_patterns(model, dtype) if names == "auto" else map(_pattern, names))
    if not patterns or dtype not in _HALVES:
        return set()
    matching = re.compile("|".join(sorted(patterns)))
    kept = set()
    for name, buffer in _floating_buffers(model):
        if matching.search(name):
            kept.add(id(buffer))
            if buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()
    return kept


def _own_patterns(model: nn.Module, dtype: torch.dtype) -> Iterator[str]:
    attributes = ["_keep_in_fp32_modules_strict"]
    if dtype == torch.float16:
        attributes.append("_keep_in_fp32_modules")
    for path, module in model.named_modules():
        within = rf"^{re.escape(path)}\..*" if path else ""
        for attribute in attributes:
            for name in getattr(module, attribute, None) or ():
                yield within + _pattern(name)


def _pattern(name: str) -> str:
    return name.replace("*", ".*")


def _floating_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer
