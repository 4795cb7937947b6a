# SPDX-License-Identifier: Apache-2.0
"""Helpers."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "get_z3_leaf_modules": "zerod.leaf:get_z3_leaf_modules",
    "set_z3_leaf_module": "zerod.leaf:set_z3_leaf_module",
    "set_z3_leaf_modules": "zerod.leaf:set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name": "zerod.leaf:set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix": "zerod.leaf:set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules": "zerod.leaf:unset_z3_leaf_modules",
    "z3_leaf_module": "zerod.leaf:z3_leaf_module",
    "safe_get_full_fp32_param": "zerod.fragments:safe_get_full_fp32_param",
    "safe_get_full_grad": "zerod.fragments:safe_get_full_grad",
    "safe_get_full_optimizer_state": "zerod.fragments:safe_get_full_optimizer_state",
    "safe_get_local_fp32_param": "zerod.fragments:safe_get_local_fp32_param",
    "safe_get_local_grad": "zerod.fragments:safe_get_local_grad",
    "safe_get_local_optimizer_state": "zerod.fragments:safe_get_local_optimizer_state",
    "safe_set_full_fp32_param": "zerod.fragments:safe_set_full_fp32_param",
    "safe_set_full_grad": "zerod.fragments:safe_set_full_grad",
    "safe_set_full_optimizer_state": "zerod.fragments:safe_set_full_optimizer_state",
    "safe_set_local_fp32_param": "zerod.fragments:safe_set_local_fp32_param",
    "safe_set_local_grad": "zerod.fragments:safe_set_local_grad",
    "safe_set_local_optimizer_state": "zerod.fragments:safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized": "zerod.fragments:safe_update_full_grad_vectorized",
    "logger": "zerod.as_deepspeed.entry:log",
    "set_log_level_from_string": "zerod.as_deepspeed.entry:set_log_level_from_string",
    "log_dist": "zerod.as_deepspeed.entry:log_dist",
    "OnDevice": "zerod.as_deepspeed.entry:OnDevice",
    "RepeatingLoader": "zerod.as_deepspeed.entry:RepeatingLoader",
    "see_memory_usage": "zerod.as_deepspeed.accelerator:see_memory_usage",
    "instrument_w_nvtx": "zerod.as_deepspeed.entry:instrument_w_nvtx",
}
_SUBMODULES = ("groups", "logging", "tensor_fragment", "torch", "zero_to_fp32")
__getattr__, __dir__ = face.names(__name__, _EXPORTS, submodules=_SUBMODULES)
