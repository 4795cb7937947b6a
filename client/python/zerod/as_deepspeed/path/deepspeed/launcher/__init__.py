# SPDX-License-Identifier: Apache-2.0
"""What Accelerate's launcher asks for."""

from zerod.as_deepspeed import face

_SUBMODULES = ("runner",)
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
