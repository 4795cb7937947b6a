# SPDX-License-Identifier: Apache-2.0
"""The engine and what belongs to it."""

from zerod.as_deepspeed import face

_SUBMODULES = (
    "activation_checkpointing",
    "base_optimizer",
    "bf16_optimizer",
    "config",
    "dataloader",
    "engine",
    "fp16",
    "lr_schedules",
    "sequence_parallel",
    "utils",
    "zero",
)
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
