# SPDX-License-Identifier: Apache-2.0
"""Helpers."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "see_memory_usage": "zerod.as_deepspeed.accelerator:see_memory_usage",
    "move_to_device": "zerod.as_deepspeed.entry:move_to_device",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
