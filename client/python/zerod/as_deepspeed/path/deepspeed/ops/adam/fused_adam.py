# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "FusedAdam": "zerod.as_deepspeed.optimizers:FusedAdam",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
