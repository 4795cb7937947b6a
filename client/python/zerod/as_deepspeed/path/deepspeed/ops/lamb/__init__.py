# SPDX-License-Identifier: Apache-2.0
"""LAMB."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "FusedLamb": "zerod.as_deepspeed.optimizers:FusedLamb",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
