# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism."""

from zerod.as_deepspeed import face

_NEVER = {
    "split_params_into_different_moe_groups_for_optimizer": "expert parallelism",
    "is_moe_param": "expert parallelism",
    "has_moe_layers": "expert parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
