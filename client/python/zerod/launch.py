# SPDX-License-Identifier: Apache-2.0
"""Which process of the job this is, from what the launcher says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The place of this process: ranks count all processes, nodes count hosts."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node_rank: int = 0
    attempt: int = 0  # how often the launcher has restarted its workers; for messages only

    @property
    def nodes(self) -> int:
        return self.world // self.local_world

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Launch":
        """Reads the variables of torchrun or of DeepSpeed's launcher; without them this is a job of
        one process.

        ValueError where they are incomplete or contradict each other.
        """
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            _check_alone(environment)
            return Launch()
        rank = _number(environment, "RANK")
        world = _number(environment, "WORLD_SIZE")
        if world == 1:
            local_rank, local_world = 0, 1
        else:
            local_rank = _number(environment, "LOCAL_RANK")
            # The second is what DeepSpeed's own launcher calls it.
            deepspeed = "LOCAL_WORLD_SIZE" not in environment and "LOCAL_SIZE" in environment
            local_world = _number(environment, "LOCAL_SIZE" if deepspeed else "LOCAL_WORLD_SIZE")
        if world < 1 or local_world < 1 or world % local_world != 0:
            raise ValueError(
                f"WORLD_SIZE={world} is not a multiple of LOCAL_WORLD_SIZE={local_world}: "
                "zerod needs the same number of ranks on every node"
            )
        node_rank = int(environment.get("GROUP_RANK", rank // local_world))
        if rank != node_rank * local_world + local_rank:
            raise ValueError(
                f"RANK={rank} is not GROUP_RANK={node_rank} x LOCAL_WORLD_SIZE={local_world} "
                f"+ LOCAL_RANK={local_rank}: zerod needs ranks in the order of the nodes"
            )
        attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Launch(rank, world, local_rank, local_world, node_rank, attempt)


# How many processes another launcher has started together with this one.
_OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def _check_alone(environment: Mapping[str, str]) -> None:
    for name, launcher in _OTHER_LAUNCHERS.items():
        if environment.get(name, "1") not in ("", "1"):
            raise ValueError(
                f"{name}={environment[name]}, but RANK and WORLD_SIZE are not set: each of these "
                f"processes would be a job of its own. Have {launcher} start one torchrun on every "
                "node, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None:
        raise ValueError(
            f"{name} is not set, though other variables of a launcher are: start the script with "
            "torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} is not a number") from None
