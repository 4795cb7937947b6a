# SPDX-License-Identifier: Apache-2.0
"""The engine."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedEngine": "zerod.engine:Engine",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
