# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed has an optimizer class for each stage and precision, and programs ask which one they
were given. zerod has one engine for all: these classes can be asked for, not made."""

from collections.abc import Callable
from typing import Any

from zerod.optimizer import Optimizer


class _Kind(type):
    fits: Callable[[int, str, bool], bool]

    def __instancecheck__(cls, candidate: Any) -> bool:
        if not isinstance(candidate, Optimizer) or candidate._engine is None:
            return False
        engine = candidate._engine()
        if engine is None:
            return False
        precision = (
            "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
        )
        return cls.fits(engine.zero_optimization_stage(), precision, candidate.KIND == "lamb")


def _kind(name: str, what: str, fits: Callable[[int, str, bool], bool]) -> _Kind:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name} is made by deepspeed.initialize() alone")

    body = {"__doc__": f"The optimizer {what}.", "__init__": refuse, "fits": staticmethod(fits)}
    return _Kind(name, (), body)


ZeROOptimizer = _kind("ZeROOptimizer", "of stages 1 to 3", lambda stage, *_: stage > 0)
DeepSpeedZeroOptimizer = _kind(
    "DeepSpeedZeroOptimizer", "of stages 1 and 2", lambda stage, *_: stage in (1, 2)
)
DeepSpeedZeroOptimizer_Stage3 = _kind(
    "DeepSpeedZeroOptimizer_Stage3", "of stage 3", lambda stage, *_: stage == 3
)
BF16_Optimizer = _kind(
    "BF16_Optimizer",
    "of bf16 at stage 0",
    lambda stage, precision, _: (stage, precision) == (0, "bf16"),
)
FP16_Optimizer = _kind(
    "FP16_Optimizer",
    "of fp16 at stage 0",
    lambda stage, precision, by_tensor: (stage, precision, by_tensor) == (0, "fp16", False),
)
FP16_UnfusedOptimizer = _kind(
    "FP16_UnfusedOptimizer",
    "of fp16 at stage 0 where it goes by tensor",
    lambda stage, precision, by_tensor: (stage, precision, by_tensor) == (0, "fp16", True),
)
