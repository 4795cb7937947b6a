# SPDX-License-Identifier: Apache-2.0
"""Models born under zerod.zero.Init: the same as others, in less memory."""

import json
import re

import pytest
import torch

import cluster
from zero_init_workers import CONFIG, wait_for_no_arenas

WORKERS = "zero_init_workers:"
PRETRAINED = "pretrained_workers:"
BUFFERS = "buffer_workers:"


def run(function: str, nodes: int = 1, world: int = 2, workers: str = WORKERS, **arguments) -> list:
    with cluster.daemons(nodes) as running:
        return cluster.run(workers + function, running, world, **arguments)


@pytest.mark.parametrize(("nodes", "world"), ((1, 1), (1, 2), (2, 4)))
def test_a_born_model_trains_as_a_plain_one(nodes, world):
    cases = [
        ({}, 0), ({}, 100_000), ({"bf16": {"enabled": True}}, 64 << 20),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, 0),
        ({"zero_optimization": {"stage": 2}}, 0),
    ]
    for results in run("born_and_plain", nodes, world,
                       cases=[(CONFIG | precision, limit) for precision, limit in cases]):
        for plain, born in results:
            assert born[0] == plain[0]
            assert born[1].keys() == plain[1].keys()
            assert all(torch.equal(born[1][k], plain[1][k]) for k in plain[1])


@pytest.mark.parametrize(("nodes", "world"), ((1, 3), (2, 2)))
def test_gathered_parameters_reads_and_writes_before_and_after_initialize(nodes, world):
    results = run("gathered", nodes, world)
    for result in results:
        # Rank 0's where it was to write, the last one's where that was.
        assert result["values"] == [96 * 64 * 2.0, 256 * 3.0, float(world - 1), 9.0, 7.0]
        now = "AVAILABLE" if nodes == 1 else "NOT_AVAILABLE"  # one member's window has all
        assert result["status"] == ["NOT_AVAILABLE", "AVAILABLE", "NOT_AVAILABLE", now,
                                    "AVAILABLE", "AVAILABLE", now]
        assert result["attributes"] == results[0]["attributes"]  # ds_id too
        assert result["attributes"][1:] == [(96, 64), 96 * 64, False, False]
        assert result["kept_id"]


def test_a_read_outside_is_loud():
    with cluster.daemons(1) as running, \
            cluster.ranks(WORKERS + "read_outside", running, 1) as ranks:
        assert ranks[0].wait() == -11
        place = "read parameter 'born under zerod.zero.Init, piece_0'"
        assert re.search(f"{place}.*GatheredParameters", ranks[0].text())


def test_torch_is_left_as_it_was():
    run("patches")


def test_where_the_dtype_comes_from():
    run("types_of_values")


def test_buffers_fit_what_a_model_of_16_bits_computes():
    """As under DeepSpeed's Init: what torch's constructors make is of the job's type, but for what
    the model or the configuration lists."""
    plain, listed = ["0.frequencies"], ["0.frequencies", "0.score_bias"]
    scores = ["0.frequencies", "0.score_bias", "0.score_scale"]
    every = ["0.frequencies", "0.old", "0.score_bias", "0.score_scale", "0.table"]
    chosen = ["0.frequencies", "0.old", "0.table"]
    results = run("buffers_of_16_bits", workers=BUFFERS)
    assert results[0] == results[1]
    assert [(born, after) for born, after, _ in results[0]] == [
        (plain, plain), (plain, plain), (listed, listed), (scores, scores), (plain, plain),
        (chosen, chosen), (listed, every), (listed, ["0.score_bias"]),
    ]
    assert results[0][0][2] == 5.0  # bfloat16's nearest to 5.01


def test_an_engine_that_is_made_inside():
    run("initialized_within", workers=BUFFERS)


def test_what_is_not_served_is_refused():
    run("refusals")


def test_copies_conversions_and_replacements_before_initialize():
    for result in run("conversions", nodes=2):
        assert result["first"] == pytest.approx(result["expected"], rel=1e-5)
        assert 0 < result["moved"] < 1


def test_what_is_not_taken_over_is_freed():
    with cluster.daemons(1) as running:
        [[before, born, left]] = cluster.run(WORKERS + "garbage", running, 1,
                                             metrics=running[0].metrics)
        assert before == 0
        assert born > 12 * 2048 * 2048
        assert left == 1
        wait_for_no_arenas(running[0].metrics)  # the script has ended
        assert running[0].value("zerod_memory_bytes") == 0


def test_several_models():
    for one, two, three, four in run("two_models"):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert not torch.equal(three, four)


def test_a_restart_is_not_held_up_by_what_died_in_init(tmp_path):
    with cluster.daemons(2) as running:
        for attempt in range(3):
            with cluster.ranks(WORKERS + "killed_in_init", running, 2, attempt=attempt,
                               marker=str(tmp_path / "marker")) as ranks:
                if attempt == 0:
                    for rank in ranks:
                        assert rank.wait() == -9
                else:
                    cluster.wait_all(ranks)
                    assert len(ranks[0].result()) == 3
        assert (tmp_path / "marker.1").exists()


def test_a_resumed_job_drops_what_was_born_for_it():
    with cluster.daemons(2) as running:
        with cluster.ranks(WORKERS + "resumed", running, 2, job="undisturbed", steps=9) as ranks:
            cluster.wait_all(ranks)
            whole = ranks[0].result()
        with cluster.ranks(WORKERS + "resumed", running, 2, steps=3) as ranks:
            for rank in ranks:
                assert rank.wait() == -9
        with cluster.ranks(WORKERS + "resumed", running, 2, attempt=1, steps=9) as ranks:
            cluster.wait_all(ranks)
            for rank in ranks:
                result = rank.result()
                assert result["started"] == 3
                assert result["arenas"] == 0
                assert all(torch.equal(result["state"][k], whole["state"][k])
                           for k in whole["state"])


@pytest.mark.parametrize("born", (False, True))
def test_an_external_parameter_belongs_to_a_module_around_both(born):
    assert run("external", world=1, born=born) == [["around", "around.owner"]]


@pytest.mark.parametrize("nodes", (1, 2))
def test_no_rank_ever_has_the_model(nodes):
    world = 2 * nodes
    blocks, width = 25, 2048  # 400 MB
    with cluster.daemons(nodes) as running:
        results = cluster.run(WORKERS + "memory", running, world, blocks=blocks, width=width,
                              metrics=[d.metrics for d in running])
    for result in results:
        assert result["model"] == blocks * width * width * 4
        assert result["building"] < result["model"] / 8
        assert result["handing"] < result["model"] / 8
        assert result["resident"] < result["model"] / 4  # and with what the arenas share
        assert result["sum"] == results[0]["sum"]
        before, born, after = result["daemon"]
        shard = result["model"] / nodes
        # While it is born: one copy (its first part in room that was there before), a quarter of
        # room, and what each arena has for itself. After that one copy and, on several nodes, the
        # window and staging.
        assert shard - (64 << 20) <= born - before <= shard * 1.25 + (96 << 20)
        assert after <= shard * 1.05 + (32 << 20) + (nodes > 1) * (result["model"] + (96 << 20))


def make_pretrained(folder, shard_size: str, **sizes) -> dict:
    """A model in several safetensors files, made here; its weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(9)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder, max_shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model.state_dict()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, make_pretrained(folder, "4MB", vocab_size=512, hidden_size=128,
                                   intermediate_size=512, num_hidden_layers=12)


def pretrained_config() -> dict:
    config = json.loads(json.dumps(CONFIG))
    config["optimizer"]["params"]["lr"] = 0.0  # the weights are still those of the files
    # As transformers hands it over.
    return config | {"gradient_accumulation_steps": 1, "train_batch_size": "auto",
                     "scheduler": None}


@pytest.mark.parametrize(("kind", "nodes"), (("loaded", 1), ("loaded", 2), ("resized", 1),
                                             ("scratch", 1)))
def test_from_pretrained_streams_a_folder(kind, nodes, pretrained, tmp_path):
    folder, expected = pretrained
    results = run("from_pretrained", nodes, 2, PRETRAINED, folder=str(folder), kind=kind,
                  config=pretrained_config(), store=str(tmp_path / "store"))
    state = results[0]["state"]
    for result in results:
        assert result["arenas"] == 0
        assert result["names"] == results[0]["names"]
        assert all(torch.equal(v, state[k]) for k, v in result["state"].items())
    if kind == "scratch":
        assert not torch.equal(state["lm_head.weight"], expected["lm_head.weight"])
        assert float(state["lm_head.weight"].std()) == pytest.approx(0.02, rel=0.1)
        return
    assert [result["read_to"] for result in results] == [{"cpu"}, {"meta"}]  # one reads
    for name, value in expected.items():
        got = state[name]
        if kind == "resized" and got.shape != value.shape:
            assert got.shape[0] == value.shape[0] + 3
            got = got[: value.shape[0]]
        assert torch.equal(got, value), name


def test_no_rank_ever_has_a_pretrained_model(tmp_path):
    make_pretrained(tmp_path, "64MB", vocab_size=2048, hidden_size=768, intermediate_size=3072,
                    num_hidden_layers=8)
    for result in run("from_pretrained", workers=PRETRAINED, folder=str(tmp_path),
                      config=pretrained_config(), kind="loaded", state=False,
                      store=str(tmp_path / "store")):
        assert result["model"] > 250 << 20
        assert result["peak"] < result["model"] / 3
