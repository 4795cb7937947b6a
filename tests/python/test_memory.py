# SPDX-License-Identifier: Apache-2.0
"""What each member holds, by its own metrics and under a real limit; and that one member's copy is
the master itself."""

import os
import re
import secrets
from pathlib import Path

import pytest

import cluster

LAYERS = 8
STATE = ("parameters", "copies", "gradients", "moments")
# Bytes per parameter of each member with N members, fp32, window apart.
FORMULA = {0: lambda n: 16, 1: lambda n: 8 + 8 / n, 2: lambda n: 4 + 12 / n, 3: lambda n: 16 / n}


def config(stage: int, **more) -> dict:
    return {"gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, **more}


def bytes_by_kind(text: str) -> dict[str, float]:
    return {
        kind: float(value)
        for kind, value in re.findall(
            r'^zerod_memory_bytes\{[^}]*kind="(\w+)"[^}]*\} (\S+)$', text, re.MULTILINE)
    }


@pytest.mark.parametrize("stage", FORMULA)
def test_stages_hold_what_zero_says(stage):
    nodes = 2
    with cluster.daemons(nodes) as running:
        results = cluster.run("memory_workers:train", running, nodes, layers=LAYERS, steps=2,
                              config=config(stage), metrics=[d.metrics for d in running])
    for result in results:
        held = bytes_by_kind(result["metrics"])
        per_parameter = sum(held.get(kind, 0) for kind in STATE) / result["parameters"]
        assert per_parameter == pytest.approx(FORMULA[stage](nodes), rel=0.01), held
        assert (held.get("window", 0) > 0) == (stage == 3)
    assert results[0]["losses"] == results[1]["losses"]  # the same data on both


class MemoryCgroup:
    """A memory cgroup of our own, version 1 or 2."""

    def __init__(self, limit_bytes: int) -> None:
        name = f"zerod-test-{secrets.token_hex(4)}"
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.folder = (v1 if v1.is_dir() else v2) / name
        try:
            self.folder.mkdir()
            limit = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
            (self.folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made here: {error}")

    def wrapper(self) -> tuple[str, ...]:
        """Starts a command inside."""
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")

    def close(self) -> None:
        os.rmdir(self.folder)


def run_limited(limit_bytes: int, stage: int):
    """Two daemons, each in a cgroup of its own: the state of both, or the error of the refused."""
    groups = [MemoryCgroup(limit_bytes) for _ in range(2)]
    running = []
    try:
        for group in groups:
            running.append(cluster.Daemon("--memory-reserve-bytes", "0", wrapper=group.wrapper()))
        return cluster.run("memory_workers:train", running, 2, layers=16, steps=2,
                           config=config(stage), metrics=[d.metrics for d in running])
    finally:
        for daemon in running:
            daemon.stop()
        for group in groups:
            group.close()


def test_a_daemon_works_just_above_the_formula_and_refuses_below():
    parameters = 16 * 2 * 256 * 1024
    # Stage 2 of two members: 4 + 12/2 bytes, plus the client's gradient window (4), staging (four
    # pieces of a unit, in and out: 16 MiB), rings and transfer area (13 MiB), and the daemon
    # itself.
    needed = 14 * parameters + (16 << 20) + (13 << 20)
    process = 48 << 20
    assert len(run_limited(needed + process, stage=2)) == 2
    with pytest.raises(AssertionError, match="ResourceExhausted|RESOURCE_EXHAUSTED"):
        run_limited(needed - (16 << 20), stage=2)


def test_one_member_gathers_nothing_and_every_forward_sees_the_step():
    with cluster.daemons(1) as running:
        results = cluster.run("memory_workers:sees_update", running, 2, config=config(3))
    for result in results:
        assert result["same_address"]
        assert result["waits"] == 0
        assert len(set(result["seen"])) == len(result["seen"])
    assert results[0]["seen"] == results[1]["seen"]


def test_writing_parameters_takes_one_copy_in_their_own_type():
    """On the rank that writes too; the fp32 master is read again piece by piece."""
    with cluster.daemons(1) as running:
        results = cluster.run("memory_workers:writes_in_private_copies", running, 2, layers=16,
                              config=config(3, bf16={"enabled": True}))
    for rank, result in enumerate(results):
        assert result["bytes"] <= result["peak"] + (4 << 20), "what was measured?"
        assert result["peak"] < result["bytes"] + (16 << 20), result
        assert result["equal"]
        assert ("nothing is written" in result["error"]) == (rank == 1)
