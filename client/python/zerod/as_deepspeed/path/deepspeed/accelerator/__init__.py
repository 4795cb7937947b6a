# SPDX-License-Identifier: Apache-2.0
"""The device of a rank."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "get_accelerator": "zerod.as_deepspeed.accelerator:get_accelerator",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
