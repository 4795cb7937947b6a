# SPDX-License-Identifier: Apache-2.0
"""The optimizers."""

from zerod.as_deepspeed import face

_EXPORTS = {"__compatible_ops__": "zerod.as_deepspeed.builders:COMPATIBLE"}
_SUBMODULES = ("adagrad", "adam", "aio", "lamb", "lion", "op_builder")
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES)
