# SPDX-License-Identifier: Apache-2.0
"""Helpers."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "ZeRORuntimeException": "builtins:RuntimeError",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
