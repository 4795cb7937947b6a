# SPDX-License-Identifier: Apache-2.0
"""What the optimizers have in common."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedOptimizer": "zerod.optimizer:Optimizer",
    "ZeROOptimizer": "zerod.as_deepspeed.kinds:ZeROOptimizer",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
