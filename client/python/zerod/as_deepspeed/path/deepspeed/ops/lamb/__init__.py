# SPDX-License-Identifier: Apache-2.0
"""LAMB."""

from zerod.as_deepspeed import face

_NEVER = {
    "FusedLamb": "LAMB yet",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
