# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism."""

from zerod.as_deepspeed import face

_NEVER = {
    "UlyssesSPAttentionHF": "sequence parallelism",
    "UlyssesSPDataLoaderAdapter": "sequence parallelism",
    "TiledMLP": "sequence parallelism",
    "sequence_tiled_compute": "sequence parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
