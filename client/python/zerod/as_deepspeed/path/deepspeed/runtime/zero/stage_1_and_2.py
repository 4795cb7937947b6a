# SPDX-License-Identifier: Apache-2.0
"""The optimizer of stages 1 and 2."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedZeroOptimizer": "zerod.as_deepspeed.kinds:DeepSpeedZeroOptimizer",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
