# SPDX-License-Identifier: Apache-2.0
"""Partitioned parameters."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "Init": "zerod.zero:Init",
    "GatheredParameters": "zerod.zero:GatheredParameters",
    "register_external_parameter": "zerod.zero:register_external_parameter",
    "unregister_external_parameter": "zerod.zero:unregister_external_parameter",
    "ZeroParamStatus": "zerod.zero:ZeroParamStatus",
}
_SUBMODULES = ("config", "offload_config", "partition_parameters")
_NEVER = {
    "TiledLinear": "tiled layers: parameters need not be split to be gathered",
    "ZeRoTraceMode": "DeepSpeed's trace: the daemon keeps its own",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES, never=_NEVER)
