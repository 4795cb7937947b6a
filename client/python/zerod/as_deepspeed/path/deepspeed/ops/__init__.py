# SPDX-License-Identifier: Apache-2.0
"""The optimizers."""

from zerod.as_deepspeed import face

# DeepSpeed compiles its kernels on the user's machine; the daemon has its own.
__compatible_ops__: dict[str, bool] = {}

_SUBMODULES = ("adagrad", "adam", "aio", "lamb", "lion", "op_builder")
__getattr__, __dir__ = face.names(__name__, submodules=_SUBMODULES)
