# SPDX-License-Identifier: Apache-2.0
"""The configuration."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedConfig": "zerod.as_deepspeed.entry:DeepSpeedConfig",
    "DeepSpeedConfigError": "builtins:ValueError",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
