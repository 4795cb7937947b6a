# SPDX-License-Identifier: Apache-2.0
"""Tiled layers."""

from zerod.as_deepspeed import face

_NEVER = {
    "TiledLinear": "tiled layers: parameters need not be split to be gathered",
    "TiledLinearReturnBias": "tiled layers: parameters need not be split to be gathered",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
