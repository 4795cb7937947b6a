# SPDX-License-Identifier: Apache-2.0
"""The log."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "logger": "zerod.as_deepspeed.entry:log",
    "log_dist": "zerod.as_deepspeed.entry:log_dist",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
