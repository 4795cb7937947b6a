# SPDX-License-Identifier: Apache-2.0
"""The configuration as Python sees it: read and checked by the daemon's own parser."""

import base64
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zerod import _zerod

Source = str | os.PathLike[str] | Mapping[str, Any]
_SHOWN_MAX = 80


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
            "give the configuration once, as config=dict, path or base64"
            + (f"; it was given as {' and '.join(named)}" if named else "")
        )
    return next(iter(named.values()))


def read_source(source: Source) -> str:
    """The text of a dict, of a file, or of base64 (URL-safe or not) of a JSON object, which is
    what launchers hand over on a command line. FileNotFoundError for a string that is neither."""
    if isinstance(source, Mapping):
        return json.dumps(dict(source), default=_plain)
    try:
        with open(source, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        # Base64 may look like a path through a file, or be longer than a path can be.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        text = _from_base64(source) if isinstance(source, str) else None
        if text is None:
            raise FileNotFoundError(
                f"the configuration {_shown(source)} is neither a file that exists nor base64 of "
                "a JSON object"
            ) from None
        return text


def _plain(value: Any) -> Any:
    """What scripts put into a dict where JSON has a name or a number."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return dict(value)
    if getattr(value, "ndim", None) == 0:  # numpy's numbers
        return value.item()
    raise TypeError(
        f"the configuration has {value!r}, of type {type(value).__name__}, which is not JSON"
    )


def dtype(resolved: Mapping[str, Any]) -> torch.dtype:
    """Of the parameters that the model computes with."""
    if resolved["fp16"]["enabled"]:
        return torch.float16
    return torch.bfloat16 if resolved["bf16"]["enabled"] else torch.float32


def _from_base64(source: str) -> str | None:
    """The JSON object, or None where `source` is something else."""
    try:
        packed = base64.b64decode(source.strip().replace("-", "+").replace("_", "/"), validate=True)
        text = packed.decode("utf-8")
    except ValueError:  # of the characters, the padding or the encoding
        return None
    return text if text.lstrip().startswith("{") else None


def _shown(source: str | os.PathLike[str]) -> str:
    path = os.fspath(source)
    return repr(path if len(path) <= _SHOWN_MAX else path[:_SHOWN_MAX] + "...")


@dataclass(frozen=True)
class Resolved:
    """What a configuration comes to."""

    config: dict[str, Any]  # every key that has a value; no "auto" is left
    sources: dict[str, str]  # by dotted path: default, file, auto, derived, with a reason
    warnings: list[str]  # what is deprecated or has no effect, a line each
    auto_keys: list[str]  # dotted paths whose value was "auto"


def resolve(
    text: str,
    world: int,
    *,
    deepspeed_file: bool = False,
    hidden_sizes: Sequence[int] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Resolved:
    """Reads and checks `text` for a job of `world` ranks. ValueError lists every problem.

    `deepspeed_file`: the text was written for DeepSpeed, which ignores unknown keys at the top:
    they are warnings unless `zerod.strict` says otherwise. "auto" becomes what `values` has under
    its dotted path, else what follows from `hidden_sizes` of the model and from other keys; what
    is left is one problem. With neither argument every "auto" is refused.
    """
    document = json.loads(
        _zerod.parse_config(
            text,
            world,
            deepspeed_file=deepspeed_file,
            hidden_sizes=None if hidden_sizes is None else list(hidden_sizes),
            values=None if values is None else {k: json.dumps(v) for k, v in values.items()},
        )
    )
    return Resolved(
        document["config"], document["sources"], document["warnings"], document["auto"]
    )
