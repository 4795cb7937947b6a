# SPDX-License-Identifier: Apache-2.0
"""Ranks on different paths under the gradient plan node_sum: staging of one unit's gradient makes
them wait, or have what waits set aside, and changes no bit."""

import pytest
import torch

import cluster

NAMES = ["experts_by_turns", "mixture_of_experts", "unequal_micro_steps"]


def results(running, world, staging_bytes):
    config = {
        "gradient_accumulation_steps": 3,
        "zerod": {"gradient_plan": "node_sum", "staging_bytes": staging_bytes},
    }
    return cluster.run(
        "workers:run_zoo", running, world, names=NAMES, stages=[3], steps=6, config=config
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_staging_for_one_unit_gives_the_same_bits(nodes):
    with cluster.daemons(nodes) as running:
        large = results(running, 2 * nodes, 64 << 20)
        small = results(running, 2 * nodes, 1)
    for of_rank, expected in zip(small, large):
        assert of_rank.keys() == expected.keys()
        for key, (losses, state) in of_rank.items():
            assert losses == expected[key][0], key
            for name, value in state.items():
                assert torch.equal(value, expected[key][1][name]), (key, name)
