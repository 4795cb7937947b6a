# SPDX-License-Identifier: Apache-2.0
"""What this package was made of and with."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "version": "deepspeed:__version__",
    "git_hash": "deepspeed:__git_hash__",
    "git_branch": "deepspeed:__git_branch__",
    "installed_ops": "zerod.as_deepspeed.builders:COMPATIBLE",
    "compatible_ops": "zerod.as_deepspeed.builders:COMPATIBLE",
    "torch_info": "zerod.as_deepspeed.builders:TORCH_INFO",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
