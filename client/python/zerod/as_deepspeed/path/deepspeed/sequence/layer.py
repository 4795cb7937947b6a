# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism."""

from zerod.as_deepspeed import face

_NEVER = {
    "DistributedAttention": "sequence parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
