# SPDX-License-Identifier: Apache-2.0
"""Linear layers: DeepSpeed wraps them so that backward gathers again; here any function may keep
what it likes."""

from zerod.as_deepspeed import face

_EXPORTS = {
    "zero3_linear_wrap": "torch.nn.functional:linear",
    "LinearModuleForZeroStage3": "torch.nn:Linear",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
