# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's builders of extensions, as far as programs ask them whether an optimizer can be had.
Nothing is compiled on the user's machine: the kernels are the daemon's."""

from typing import Any, ClassVar

import torch

from zerod.as_deepspeed.face import ABOUT


class OpBuilder:
    """An extension. `NAME` is its key in `deepspeed.ops.__compatible_ops__`."""

    NAME: ClassVar[str] = ""

    def is_compatible(self, verbose: bool = False) -> bool:
        return COMPATIBLE.get(self.NAME, False)

    def load(self, verbose: bool = True) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__}: zerod does not build DeepSpeed's extensions: name the "
            f"optimizer in the configuration, or take it from deepspeed.ops ({ABOUT})"
        )


class CPUAdamBuilder(OpBuilder):
    NAME = "cpu_adam"


class CPUAdagradBuilder(OpBuilder):
    NAME = "cpu_adagrad"


class CPULionBuilder(OpBuilder):
    NAME = "cpu_lion"


class FusedAdamBuilder(OpBuilder):
    NAME = "fused_adam"


class FusedLambBuilder(OpBuilder):
    NAME = "fused_lamb"


class FusedLionBuilder(OpBuilder):
    NAME = "fused_lion"


# What the optimizers of these extensions do is done by the daemon; the other extensions are not.
COMPATIBLE = {builder.NAME: True for builder in OpBuilder.__subclasses__()} | {"async_io": False}

# What DeepSpeed's wheels were made with; nothing here is made against a torch.
TORCH_INFO = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "bf16_support": True,
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": "0.0",
    "hip_version": torch.version.hip or "0.0",
}
