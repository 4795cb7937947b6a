# SPDX-License-Identifier: Apache-2.0
"""Awkward models (zoo.py) at stage 3, with guard pages and a window that must evict, equal the
same at stage 0 bit for bit."""

import pytest
import torch

import cluster
import zoo
import zoo_captured  # noqa: F401  its cases

STEPS = 3
CONFIG = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,  # refused with the smallest that works
        "stage3_prefetch_bucket_size": 4096,
    },
    "zerod": {"guard_pages": True},
}


@pytest.mark.parametrize("nodes,per_node", [(1, 1), (2, 1), (1, 2)])
def test_stage_3_equals_stage_0(nodes, per_node):
    world = nodes * per_node
    names = sorted(zoo.CASES)
    with cluster.daemons(nodes) as running:
        results = cluster.run(
            "workers:run_zoo", running, world, names=names, stages=[0, 3], steps=STEPS,
            config=CONFIG,
        )
    wrong = []
    for rank, result in enumerate(results):
        for name in names:
            losses, state = result[name, 0]
            got_losses, got_state = result[name, 3]
            equal = losses == got_losses and state.keys() == got_state.keys() and all(
                torch.equal(state[key], got_state[key]) for key in state
            )
            if not equal:
                wrong.append((rank, name, losses, got_losses))
    assert not wrong


def test_all_ranks_have_the_same_weights():
    with cluster.daemons(2) as running:
        results = cluster.run(
            "workers:run_zoo", running, 2, names=["stack", "mixture_of_experts"], stages=[1, 2, 3],
            steps=STEPS, config=CONFIG,
        )
    for key, (_, state) in results[0].items():
        other = results[1][key][1]
        assert all(torch.equal(state[name], other[name]) for name in state), key
