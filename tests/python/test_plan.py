# SPDX-License-Identifier: Apache-2.0
"""zerodctl plan against runs: what it says of a job's memory and traffic is what the daemons then
count, to the byte."""

import json
import subprocess

import pytest

import cluster
import workers

BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}
CASES = {
    "stage_0": {"zero_optimization": {"stage": 0}},
    "stage_1": {"zero_optimization": {"stage": 1}},
    "stage_2": {"zero_optimization": {"stage": 2}},
    "stage_3": {"zero_optimization": {"stage": 3}},
    "stage_3_bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "stage_3_bf16_states": {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True,
                 "bf16_optimizer_states": True},
    },
    "stage_2_node_sum": {
        "zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2,
        "zerod": {"gradient_plan": "node_sum"},
    },
    "lamb": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lamb"}},
    "muon": {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Muon"}},
    "small_buckets": {
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 300000, "allgather_bucket_size": 300000,
            "stage3_model_persistence_threshold": 150000,
        },
    },
}


def plan(node, path, config, *flags, check=True):
    file = path / "config.json"
    file.write_text(json.dumps(config))
    done = subprocess.run(
        [cluster.zerodctl_binary(), "--address", node.address, "plan", "--config", file, *flags],
        capture_output=True, text=True, timeout=60, check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in flags else done.stdout
    return done


def with_job(name):
    return BASE | CASES[name] | {"zerod": {**CASES[name].get("zerod", {}), "job": f"plan-{name}"}}


@pytest.mark.parametrize("name,world", [
    *((name, 2) for name in CASES if name != "stage_2_node_sum"), ("stage_2_node_sum", 4),
])
def test_a_run_takes_and_moves_what_was_planned(name, world, tmp_path):
    config = with_job(name)
    with cluster.daemons(2) as nodes:
        planned = plan(nodes[0], tmp_path, config, "--json", "--model", "train_gpt", "--nodes", "2",
                       "--ranks", str(world))
        got = cluster.run("workers:measured", nodes, world, job=config["zerod"]["job"],
                          config=config, metrics=[n.metrics for n in nodes], steps=2,
                          settle=True)[0]
    assert planned["local_world"] == world // 2
    for member, memory, traffic in zip(planned["members"], got["memory"], got["traffic"]):
        assert {use["kind"]: use["bytes"] for use in member["memory"]} == memory
        assert {use["tier"] for use in member["memory"]} == {"host"}
        assert member["memory_bytes"] == sum(memory.values())
        assert {k: member[f"bytes_{k}"] for k in workers.TRAFFIC} == traffic
        assert member["rank_bytes"] * (world // 2) <= member["memory_bytes"]


def test_units_that_take_turns_in_the_window(tmp_path):
    """Which of them are still there when they are needed again depends on time a little."""
    config = BASE | {
        "zero_optimization": {
            "stage": 3, "stage3_max_live_parameters": 5500000,
            "stage3_param_persistence_threshold": 0,
        },
        "zerod": {"job": "plan-turns"},
    }
    with cluster.daemons(2) as nodes:
        planned = plan(nodes[0], tmp_path, config, "--json", "--model", "train_gpt", "--nodes", "2",
                       "--ranks", "2")
        got = cluster.run("workers:measured", nodes, 2, job="plan-turns", config=config,
                          metrics=[n.metrics for n in nodes], steps=8, settle=False)[0]
    assert planned["window_bytes"] < planned["window_bytes_all"] * 0.6
    for member, memory, traffic in zip(planned["members"], got["memory"], got["traffic"]):
        window = {use["kind"]: use["bytes"] for use in member["memory"]}["window"]
        assert window == planned["window_bytes"] <= memory["window"]  # it may have grown
        everything_once = planned["window_bytes_all"]
        assert traffic["gathered"] > 1.2 * everything_once
        for kind in workers.TRAFFIC:
            assert traffic[kind] == pytest.approx(member[f"bytes_{kind}"], rel=0.15), kind


def test_what_is_printed(tmp_path):
    config = BASE | {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    with cluster.daemons(1) as (node,):
        text = plan(node, tmp_path, config, "--params", "124000000", "--nodes", "8", "--ranks",
                    "64")
        assert "124000000 parameters: 124000000 parameters in" in text
        assert "ZeRO stage 3, 8 nodes of 8 ranks, gradients per_rank" in text
        assert "least" in text and "sent to other nodes" in text
        text = plan(node, tmp_path, config, "--params", "124000000", "--ranks", "8",
                    "--node-memory", "4gb")
        assert "gradients node_sum" in text
        for name, parameters in (("train_gpt", 10893312), ("gpt2-124m", 124439808),
                                 ("llama-7b", 6738415616), ("llama-70b", 68976648192)):
            planned = plan(node, tmp_path, config, "--json", "--model", name)
            assert planned["parameters"] == parameters
        for parameters in (1, 24575, 24577, 10**9):
            planned = plan(node, tmp_path, config, "--json", "--params", str(parameters))
            assert planned["parameters"] == parameters
        refused = {
            ("--model", "gpt5"): "there is no model gpt5; known are train_gpt",
            ("--params", "1000", "--nodes", "3", "--ranks", "4"): "there are 4 ranks on 3 nodes",
            ("--params", "1000", "--nodes", "65", "--ranks", "65"): "it must be 1 to 64",
            ("--model", "llama-7b", "--node-memory", "1gb"): "node 0 would need",
        }
        for flags, says in refused.items():
            done = plan(node, tmp_path, config, *flags, check=False)
            assert done.returncode == 1 and says in done.stderr, done.stderr
        assert plan(node, tmp_path, config, check=False).returncode != 0  # neither --model nor ...
        leaf = config | {"zero_optimization": {"stage": 3, "leaf_module": {"names": ["h"]}}}
        done = plan(node, tmp_path, leaf, "--params", "1000", check=False)
        assert done.returncode == 0 and "leaf_module" in done.stderr
