# SPDX-License-Identifier: Apache-2.0
"""Process groups: all ranks are one data-parallel group."""

from typing import Any

from zerod.as_deepspeed import face


def _get_data_parallel_group() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    from zerod.launch import Launch

    return Launch.from_environment().world


def _get_data_parallel_rank() -> int:
    from zerod.launch import Launch

    return Launch.from_environment().rank


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank


def _one() -> int:
    return 1


def _zero() -> int:
    return 0


get_model_parallel_world_size = get_tensor_model_parallel_world_size = _one
get_model_parallel_rank = get_tensor_model_parallel_rank = _zero
_get_sequence_parallel_world_size = _one
_get_sequence_parallel_rank = _zero
_NEVER = {
    "_get_sequence_parallel_group": "sequence parallelism",
    "_get_expert_parallel_group": "expert parallelism",
    "get_model_parallel_group": "tensor parallelism",
    "get_tensor_model_parallel_group": "tensor parallelism",
}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
