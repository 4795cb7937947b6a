# SPDX-License-Identifier: Apache-2.0
"""Parameters, their state and gradients, whole and in parts."""

from zerod.as_deepspeed import face

_NAMES = (
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
)
_EXPORTS = {name: f"zerod.fragments:{name}" for name in _NAMES}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
