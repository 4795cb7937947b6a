# SPDX-License-Identifier: Apache-2.0
"""The log."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "logger": "zerod.as_deepspeed.entry:log",
    "set_log_level_from_string": "zerod.as_deepspeed.entry:set_log_level_from_string",
    "log_dist": "zerod.as_deepspeed.entry:log_dist",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
