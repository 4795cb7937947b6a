# SPDX-License-Identifier: Apache-2.0
"""Weights out of checkpoints."""

from zerod.as_deepspeed import face

_NAMES = (
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "main",
)
_EXPORTS = {name: f"zerod.zero_to_fp32:{name}" for name in _NAMES}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)

if __name__ == "__main__":
    from zerod.zero_to_fp32 import main

    main()
