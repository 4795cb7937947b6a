# SPDX-License-Identifier: Apache-2.0
"""Helpers for torch.save."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "clone_tensors_for_torch_save": "zerod.as_deepspeed.entry:clone_tensors_for_torch_save",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
