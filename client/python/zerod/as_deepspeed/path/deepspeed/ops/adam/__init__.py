# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedCPUAdam": "zerod.as_deepspeed.optimizers:DeepSpeedCPUAdam",
    "FusedAdam": "zerod.as_deepspeed.optimizers:FusedAdam",
}
_SUBMODULES = ("cpu_adam", "fused_adam")
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES)
