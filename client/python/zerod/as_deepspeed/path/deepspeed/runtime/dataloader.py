# SPDX-License-Identifier: Apache-2.0
"""Loaders."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedDataLoader": "zerod.loader:Loader",
    "RepeatingLoader": "zerod.as_deepspeed.entry:RepeatingLoader",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
