# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "configure": "zerod.as_deepspeed.checkpointing:configure",
    "is_configured": "zerod.as_deepspeed.checkpointing:is_configured",
    "reset": "zerod.as_deepspeed.checkpointing:reset",
    "checkpoint": "zerod.as_deepspeed.checkpointing:checkpoint",
    "non_reentrant_checkpoint": "zerod.as_deepspeed.checkpointing:non_reentrant_checkpoint",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
