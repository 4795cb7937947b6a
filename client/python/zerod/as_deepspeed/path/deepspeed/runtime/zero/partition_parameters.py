# SPDX-License-Identifier: Apache-2.0
"""Partitioned parameters."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "Init": "zerod.as_deepspeed.birth:Init",
    "GatheredParameters": "zerod.zero:GatheredParameters",
    "register_external_parameter": "zerod.zero:register_external_parameter",
    "unregister_external_parameter": "zerod.zero:unregister_external_parameter",
    "ZeroParamStatus": "zerod.zero:ZeroParamStatus",
    "get_accelerator": "zerod.as_deepspeed.accelerator:get_accelerator",
    "zero_wrapper_for_fp_tensor_constructor": (
        "zerod.as_deepspeed.constructors:zero_wrapper_for_fp_tensor_constructor"
    ),
    "_orig_torch_arange": "torch:arange",
    "_orig_torch_empty": "torch:empty",
    "_orig_torch_zeros": "torch:zeros",
    "_orig_torch_ones": "torch:ones",
    "_orig_torch_full": "torch:full",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
