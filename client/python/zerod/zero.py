# SPDX-License-Identifier: Apache-2.0
"""The names of DeepSpeed's `deepspeed.zero` that are served."""

from zerod.external import register_external_parameter, unregister_external_parameter
from zerod.gathered import GatheredParameters
from zerod.parameter_status import ZeroParamStatus
from zerod.zero_init import Init

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "register_external_parameter",
    "unregister_external_parameter",
]
