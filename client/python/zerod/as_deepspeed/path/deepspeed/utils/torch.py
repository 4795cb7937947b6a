# SPDX-License-Identifier: Apache-2.0
"""What torch there is."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "required_torch_version": "zerod.as_deepspeed.entry:required_torch_version",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
