# SPDX-License-Identifier: Apache-2.0
"""The engine and what belongs to it."""

from zerod.as_deepspeed import face

_SUBMODULES = (
    "activation_checkpointing",
    "config",
    "dataloader",
    "engine",
    "lr_schedules",
    "sequence_parallel",
    "utils",
    "zero",
)
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
