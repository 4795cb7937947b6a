# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism."""

from zerod.as_deepspeed import face

_NEVER = {
    "PipelineModule": "pipeline parallelism",
    "LayerSpec": "pipeline parallelism",
    "TiedLayerSpec": "pipeline parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
