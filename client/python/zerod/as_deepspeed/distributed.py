# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.comm`: torch.distributed under DeepSpeed's name.

Training needs none of it: the daemons have their own data plane. Scripts and Accelerate use it for
their own small collectives.
"""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zerod.as_deepspeed.rendezvous import agree
from zerod.launch import Launch
from zerod.peers import find_store, has_agent_store

DEFAULT_PORT = 29500
_ACCELERATE = "accelerate.state"


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Makes torch.distributed's default group from the launcher's variables, unless there is one.

    `dist_backend`: "gloo" where there is no GPU, else "nccl". Without a launcher it is a group of
    this process alone. Ranks are not asked of MPI: torchrun, Slurm or Kubernetes tell them.
    """
    if dist.is_initialized() or dist_init_required is False:
        return
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timeout
    if init_method is not None:
        options["init_method"] = init_method
    if rank >= 0 and world_size > 0:
        options |= {"rank": rank, "world_size": world_size}
    elif "RANK" not in os.environ and init_method is None:
        launch = Launch.from_environment()  # a process of its own
        options |= {"rank": launch.rank, "world_size": launch.world, "store": dist.HashStore()}
    elif "MASTER_PORT" not in os.environ and init_method is None:
        os.environ["MASTER_PORT"] = str(distributed_port)
    if init_method is None and has_agent_store():
        options = _group_of_this_attempt(options)
    dist.init_process_group(backend, **options)
    if dist_backend is None:
        _tell_accelerate(backend)


def _group_of_this_attempt(options: dict[str, Any]) -> dict[str, Any]:
    launch = Launch.from_environment()
    rank, world = options.get("rank", launch.rank), options.get("world_size", launch.world)
    timeout = options.get("timeout", dist.distributed_c10d.default_pg_timeout)
    store = dist.PrefixStore("zerod/group", find_store(launch))
    name = agree(store, rank, world, timeout)
    own = dist.PrefixStore(name, store)
    return options | {"rank": rank, "world_size": world, "store": own}


def _tell_accelerate(backend: str) -> None:
    """Accelerate asks for no backend where it finds no accelerator, and takes a job without one for
    a single process, although the group that it asked for is there."""
    state = sys.modules.get(_ACCELERATE)
    if state is None or not _is_making_state():
        return
    shared = getattr(getattr(state, "PartialState", None), "_shared_state", None)
    if not isinstance(shared, dict) or "backend" not in shared:
        version = getattr(sys.modules.get("accelerate"), "__version__", "unknown")
        raise RuntimeError(
            f"accelerate {version} keeps its state otherwise than zerod knows (PartialState without"
            ' a shared "backend"): pass backend="gloo" to Accelerator by InitProcessGroupKwargs, or'
            " use a version of zerod that knows it"
        )
    if shared["backend"] is None:
        shared["backend"] = backend


def _is_making_state() -> bool:
    """Called by Accelerate's own constructor, not by a script that uses both."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == _ACCELERATE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_initialized() -> bool:
    """As torch.distributed's. Accelerate asks it before anything else."""
    if dist.is_initialized():
        _tell_accelerate(dist.get_backend())
    return dist.is_initialized()


def get_local_rank() -> int:
    return Launch.from_environment().local_rank


def get_world_group() -> Any:
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)


def inference_all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
) -> Any:
    return dist.all_reduce(tensor, op, group)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> None:
    """DeepSpeed prints what it has timed. Here the daemon's metrics count the bytes."""
    raise NotImplementedError(
        "log_summary: nothing is timed in the training process; see the daemon's metrics"
    )


def get(name: str) -> Any:
    """What deepspeed.comm has by this name: the above, else torch.distributed's."""
    if name.startswith("_"):
        raise AttributeError(name)
    own = globals().get(name)
    if callable(own) and getattr(own, "__module__", "") == __name__:
        return own
    if not hasattr(dist, name):
        raise AttributeError(f"deepspeed.comm.{name}: neither zerod nor torch.distributed has it")
    return getattr(dist, name)
