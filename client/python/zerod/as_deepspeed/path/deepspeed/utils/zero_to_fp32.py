# SPDX-License-Identifier: Apache-2.0
"""Weights out of checkpoints."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "get_fp32_state_dict_from_zero_checkpoint": "zerod.zero_to_fp32:get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint": "zerod.zero_to_fp32:load_state_dict_from_zero_checkpoint",
    "convert_zero_checkpoint_to_fp32_state_dict": "zerod.zero_to_fp32:convert_zero_checkpoint_to_fp32_state_dict",
    "main": "zerod.zero_to_fp32:main",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
