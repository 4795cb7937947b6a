# SPDX-License-Identifier: Apache-2.0
"""The optimizer of stage 3."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedZeroOptimizer_Stage3": "zerod.as_deepspeed.kinds:DeepSpeedZeroOptimizer_Stage3",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
