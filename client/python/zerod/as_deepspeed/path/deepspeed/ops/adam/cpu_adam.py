# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedCPUAdam": "zerod.as_deepspeed.optimizers:DeepSpeedCPUAdam",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
