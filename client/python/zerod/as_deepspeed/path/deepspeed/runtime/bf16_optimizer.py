# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a bf16 engine at stage 0."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "BF16_Optimizer": "zerod.as_deepspeed.kinds:BF16_Optimizer",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
