# SPDX-License-Identifier: Apache-2.0
"""Training through daemons against PyTorch's DistributedDataParallel and AdamW, and the stages
against each other."""

import re

import pytest

import cluster

STEPS = 50
OPTIONS = ["--steps", str(STEPS), "--gradient-accumulation", "2", "--clip", "0.5"]
WINDOW = ["--stage", "3", "--persistence-threshold", "0", "--live-parameters", "150000"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"".join(p.read_bytes() for p in sorted(cluster.HERE.glob("*.py"))) * 4)
    return ["--text", str(path)]


@pytest.fixture(scope="module")
def ddp(text):
    """The losses of DDP by (world, dtype), each run once."""
    known = {}

    def get(world, dtype):
        if (world, dtype) not in known:
            port = cluster.free_port()
            arguments = {"runs": [OPTIONS + text + ["--dtype", dtype]]}
            running = []
            try:
                for rank in range(world):
                    running.append(cluster.Rank("workers:gpt_ddp", arguments, {
                        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    }))
                cluster.wait_all(running)
                known[world, dtype] = running[0].result()[0]["losses"]
            finally:
                for rank in running:
                    rank.close()
        return known[world, dtype]

    return get


_seen: dict = {}


def results_of(nodes, per_node, text):
    """All stages, and stage 3 with a small window, on one grid; each grid is run once."""
    key = (nodes, per_node)
    if key not in _seen:
        runs = [OPTIONS + text + ["--stage", str(stage)] for stage in range(4)]
        runs.append(OPTIONS + text + WINDOW)
        with cluster.daemons(nodes) as running:
            _seen[key] = cluster.run("workers:gpt", running, nodes * per_node, runs=runs)
    return _seen[key]


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2)])
def test_equals_ddp(nodes, per_node, text, ddp):
    expected = ddp(nodes * per_node, "fp32")
    got = results_of(nodes, per_node, text)[0][0]["losses"]
    assert len(got) == len(expected) == STEPS
    assert expected[-1] < 0.8 * expected[0]  # it learns
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        assert ours == pytest.approx(theirs, rel=1e-5 if i < 10 else 1e-4), f"step {i + 1}"


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1), (2, 2)])
def test_stages_are_equal_bit_for_bit(nodes, per_node, text):
    stages = results_of(nodes, per_node, text)
    first = stages[0][0]
    for result in stages[0][1:]:
        assert result["losses"] == first["losses"]
        assert result["weights_sha256"] == first["weights_sha256"]
        assert result["validation_loss"] == first["validation_loss"]
    for rank in stages[1:]:
        assert rank[0]["losses"] == first["losses"]
    assert stages[0][4]["counters"]["gathers"] > 0


def test_one_node_of_two_ranks_equals_two_nodes_of_one(text):
    one, two = results_of(1, 2, text)[0][0], results_of(2, 1, text)[0][0]
    assert one["losses"] == two["losses"]
    assert one["weights_sha256"] == two["weights_sha256"]


def test_bf16(text, ddp):
    expected = ddp(2, "bf16")
    runs = [OPTIONS + text + ["--dtype", "bf16", "--stage", str(s)] for s in (0, 1, 2, 3)]
    with cluster.daemons(2) as running:
        results = cluster.run("workers:gpt", running, 2, runs=runs)[0]
    for ours, theirs in zip(results[0]["losses"], expected):
        assert ours == pytest.approx(theirs, rel=2e-2)
    assert len({r["weights_sha256"] for r in results}) == 1
    assert all(r["losses"] == results[0]["losses"] for r in results)


def test_node_sum_stages_are_equal(text):
    options = OPTIONS + text + ["--gradient-plan", "node_sum"]
    runs = [options + ["--stage", str(stage)] for stage in (0, 2, 3)] + [options + WINDOW]
    with cluster.daemons(2) as running:
        results = cluster.run("workers:gpt", running, 4, runs=runs)[0]
    assert len({r["weights_sha256"] for r in results}) == 1
    assert all(r["losses"] == results[0]["losses"] for r in results)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_quarter_of_the_model_is_enough_room(nodes, text):
    model = ["--layers", "12", "--width", "48", "--steps", "12"] + text
    room = 12 * 12 * 48 * 48 // 4
    runs = [
        model + ["--stage", "0"],
        model + ["--stage", "3", "--persistence-threshold", "0", "--live-parameters", str(room)],
    ]
    with cluster.daemons(nodes) as running:
        whole, small = cluster.run("workers:gpt", running, nodes, runs=runs)[0]
    assert small["losses"] == whole["losses"]
    assert small["weights_sha256"] == whole["weights_sha256"]
    assert small["counters"]["gathers"] > small["counters"]["gather_hits"]
    found = re.search(r"window ([\d.]+) MiB of ([\d.]+)", small["plan"])
    # 64 KiB chunks round each of the small units up.
    assert float(found[1]) <= 0.5 * float(found[2])
