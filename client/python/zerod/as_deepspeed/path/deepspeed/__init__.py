# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's names, carried out by zerod: names only, loaded when they are used."""

from zerod.as_deepspeed import face

__version__ = version = face.VERSION
__git_hash__ = __git_branch__ = "zerod"
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8

_EXPORTS = {
    "initialize": "zerod.as_deepspeed.entry:initialize",
    "DeepSpeedEngine": "zerod.engine:Engine",
    "add_config_arguments": "zerod.as_deepspeed.entry:add_config_arguments",
    "init_distributed": "zerod.as_deepspeed.distributed:init_distributed",
    "DeepSpeedConfig": "zerod.as_deepspeed.entry:DeepSpeedConfig",
    "DeepSpeedConfigError": "builtins:ValueError",
    "DeepSpeedOptimizer": "zerod.optimizer:Optimizer",
    "DeepSpeedDataLoader": "zerod.loader:Loader",
    "OnDevice": "zerod.as_deepspeed.entry:OnDevice",
    "log_dist": "zerod.as_deepspeed.entry:log_dist",
    "logger": "zerod.as_deepspeed.entry:log",
    "get_accelerator": "zerod.as_deepspeed.accelerator:get_accelerator",
    "checkpointing": "deepspeed.runtime.activation_checkpointing.checkpointing:",
    "zero": "deepspeed.runtime.zero:",
}
_SUBMODULES = (
    "accelerator",
    "checkpoint",
    "comm",
    "git_version_info",
    "launcher",
    "moe",
    "ops",
    "pipe",
    "runtime",
    "sequence",
    "utils",
)
_NEVER = {
    "init_inference": "kernel-injected inference",
    "InferenceEngine": "kernel-injected inference",
    "DeepSpeedInferenceConfig": "kernel-injected inference",
    "replace_transformer_layer": "kernel-injected inference",
    "DeepSpeedTransformerLayer": "kernel-injected inference",
    "DeepSpeedTransformerConfig": "kernel-injected inference",
    "DeepSpeedHybridEngine": "the hybrid engine",
    "PipelineModule": "pipeline parallelism",
    "PipelineEngine": "pipeline parallelism",
    "tp_model_init": "tensor parallelism",
    "set_autotp_mode": "tensor parallelism",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES, never=_NEVER)
