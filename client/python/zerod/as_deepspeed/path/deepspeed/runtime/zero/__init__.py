# SPDX-License-Identifier: Apache-2.0
"""Partitioned parameters."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "Init": "zerod.as_deepspeed.birth:Init",
    "GatheredParameters": "zerod.zero:GatheredParameters",
    "register_external_parameter": "zerod.zero:register_external_parameter",
    "unregister_external_parameter": "zerod.zero:unregister_external_parameter",
    "ZeroParamStatus": "zerod.zero:ZeroParamStatus",
    "unwrap_model_for_generation": "zerod.as_deepspeed.entry:unwrap_model_for_generation",
}
_SUBMODULES = (
    "config",
    "linear",
    "offload_config",
    "partition_parameters",
    "stage3",
    "stage_1_and_2",
    "tiling",
    "utils",
)
_NEVER = {
    "TiledLinear": "tiled layers: parameters need not be split to be gathered",
    "ZeRoTraceMode": "DeepSpeed's trace: the daemon keeps its own",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES, never=_NEVER)
