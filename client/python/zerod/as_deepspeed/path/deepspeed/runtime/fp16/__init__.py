# SPDX-License-Identifier: Apache-2.0
"""Training in fp16."""

from zerod.as_deepspeed import face

_SUBMODULES = ("fused_optimizer", "unfused_optimizer")
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
