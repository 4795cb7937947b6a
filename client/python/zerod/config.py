# SPDX-License-Identifier: Apache-2.0
"""The configuration as Python sees it: read and checked by the daemon's own parser."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from zerod import _zerod

Source = str | os.PathLike[str] | Mapping[str, Any]


def choose_source(args: Any, config: Source | None, config_params: Source | None) -> Source:
    """The one place that the caller gave the configuration in. ValueError for none or several."""
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    named = {name: source for name, source in given.items() if source is not None}
    if len(named) != 1:
        raise ValueError(
            "give the configuration once, as config=dict or path"
            + (f"; it was given as {' and '.join(named)}" if named else "")
        )
    return next(iter(named.values()))


def read_source(source: Source) -> str:
    """The JSON text of a dict or of a file."""
    if isinstance(source, Mapping):
        return json.dumps(dict(source))
    try:
        with open(source, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"the configuration file {os.fspath(source)!r} does not exist") \
            from None


def dtype(resolved: Mapping[str, Any]) -> torch.dtype:
    """Of the parameters that the model computes with."""
    if resolved["fp16"]["enabled"]:
        return torch.float16
    return torch.bfloat16 if resolved["bf16"]["enabled"] else torch.float32


def resolve(text: str, world: int) -> dict[str, Any]:
    """Every key that has a value, with it. ValueError lists every problem."""
    return json.loads(_zerod.parse_config(text, world))
