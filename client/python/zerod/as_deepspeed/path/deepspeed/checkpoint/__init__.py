# SPDX-License-Identifier: Apache-2.0
"""Checkpoints."""

from zerod.as_deepspeed import face

_SUBMODULES = ("utils",)
_NEVER = {
    "DeepSpeedCheckpoint": "the reading of DeepSpeed's own checkpoint files yet",
    "ds_to_universal": "universal checkpoints: its own load with any number of ranks",
}
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES, never=_NEVER)
