# SPDX-License-Identifier: Apache-2.0
"""Small exchanges between all ranks of a job: no process group is needed for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

if TYPE_CHECKING:
    from zerod.engine import Engine

VALUES_MAX = 64  # kScalarsMax of proto/shm/format.h
Op = Literal["sum", "mean", "min", "max"]
Values = TypeVar("Values", float, Sequence[float], torch.Tensor)
_current: "list[Engine]" = []


def set_current(engine: "Engine | None") -> None:
    """The engine whose job the functions below use: the last one made."""
    _current[:] = [engine] if engine is not None else []


def current() -> "Engine":
    if not _current:
        raise RuntimeError("there is no job yet: call zerod.initialize() first")
    return _current[0]


def all_reduce(values: Values, op: Op = "sum", engine: "Engine | None" = None) -> Values:
    """Element by element over all ranks, in double precision and rank order.

    Gives back what it was given: a number, a list, or a tensor of the same shape and dtype. For a
    few numbers (losses, counts), not for gradients. Collective.
    """
    client = (engine or current()).client
    if isinstance(values, torch.Tensor):
        flat = [float(v) for v in values.detach().reshape(-1).tolist()]
    elif isinstance(values, (int, float)):
        flat = [float(values)]
    else:
        flat = [float(v) for v in values]
    result: list[float] = []
    for begin in range(0, len(flat), VALUES_MAX):
        result += client.all_reduce(flat[begin : begin + VALUES_MAX], op)
    if isinstance(values, torch.Tensor):
        return torch.tensor(result, dtype=values.dtype).reshape(values.shape)
    if isinstance(values, (int, float)):
        return result[0]
    return result


def barrier(engine: "Engine | None" = None) -> None:
    """Returns when all ranks have called it. Collective."""
    (engine or current()).client.barrier()
