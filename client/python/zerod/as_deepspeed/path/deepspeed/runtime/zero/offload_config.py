# SPDX-License-Identifier: Apache-2.0
"""Where state is kept."""

from enum import Enum


class OffloadDeviceEnum(str, Enum):
    """`device` of offload_param and offload_optimizer."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """What engine.offload_states() takes."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"
