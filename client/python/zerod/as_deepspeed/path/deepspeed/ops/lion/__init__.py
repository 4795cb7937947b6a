# SPDX-License-Identifier: Apache-2.0
"""Lion."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedCPULion": "zerod.as_deepspeed.optimizers:DeepSpeedCPULion",
    "FusedLion": "zerod.as_deepspeed.optimizers:FusedLion",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
