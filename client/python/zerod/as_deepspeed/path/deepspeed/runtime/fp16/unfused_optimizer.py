# SPDX-License-Identifier: Apache-2.0
"""The same where the update goes by tensor."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "FP16_UnfusedOptimizer": "zerod.as_deepspeed.kinds:FP16_UnfusedOptimizer",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
