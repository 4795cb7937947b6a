# SPDX-License-Identifier: Apache-2.0
"""The device of a rank."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "is_current_accelerator_supported": (
        "zerod.as_deepspeed.accelerator:is_current_accelerator_supported"
    ),
    "get_accelerator": "zerod.as_deepspeed.accelerator:get_accelerator",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
