# SPDX-License-Identifier: Apache-2.0
"""Adagrad."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "DeepSpeedCPUAdagrad": "zerod.as_deepspeed.optimizers:DeepSpeedCPUAdagrad",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
