# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism."""

from zerod.as_deepspeed import face

_EXPORTS = {
    name: f"zerod.as_deepspeed.experts:{name}"
    for name in (
        "split_params_into_different_moe_groups_for_optimizer",
        "is_moe_param",
        "has_moe_layers",
    )
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
