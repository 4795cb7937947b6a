# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism."""

from zerod.as_deepspeed import face

_NEVER = {
    "MoE": "expert parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
