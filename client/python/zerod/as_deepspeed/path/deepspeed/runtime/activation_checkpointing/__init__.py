# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing."""

from zerod.as_deepspeed import face

_SUBMODULES = ("checkpointing",)
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
