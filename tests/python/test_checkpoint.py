# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is saved comes back at any stage and on any number of ranks; a folder is whole
or not there; the weights can be had without a daemon."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import cluster
import pytest
import torch

from zerod import checkpoint_folder as folders
from zerod.errors import CheckpointError

STEPS = 3


def config(stage: int, dtype: str = "fp32", **more) -> dict:
    precision = {"bf16": {"enabled": dtype == "bf16"}, "fp16": {"enabled": dtype == "fp16"}}
    if dtype == "fp16":
        precision["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2}
    return {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5,
                                                     "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **precision, **more,
    }


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def saved(tmp_path, stage=2, dtype="fp32", world=2, **more):
    with cluster.daemons(1) as nodes:
        return cluster.run("checkpoint_workers:save_and_go_on", nodes, world,
                           config=config(stage, dtype, **more), directory=str(tmp_path / "save"),
                           before=STEPS, after=STEPS)


def loaded(tmp_path, nodes=1, world=2, stage=2, dtype="fp32", steps_first=0, more=None, **options):
    with cluster.daemons(nodes) as running:
        return cluster.run("checkpoint_workers:load_and_go_on", running, world,
                           config=config(stage, dtype, **(more or {})),
                           directory=str(tmp_path / "save"), after=STEPS,
                           steps_first=steps_first, **options)


@pytest.mark.parametrize("stage, dtype, optimizer", [
    (0, "fp32", "AdamW"), (2, "bf16", "AdamW"), (3, "fp16", "AdamW"),
    (3, "fp32", "Lamb"), (2, "fp32", "Muon"),  # Muon's matrices and what it leaves to Adam
    # Three states, and what torch keeps beside them.
    (3, "fp32", "RMSprop"), (1, "fp32", "NAdam"), (3, "bf16", "ASGD"), (0, "fp32", "Rprop"),
])
def test_goes_on_bit_for_bit(stage, dtype, optimizer, tmp_path):
    more = {"RMSprop": {"momentum": 0.9, "centered": True}, "ASGD": {"lambd": 0.1, "t0": 2}}
    decay = {} if optimizer == "Rprop" else {"weight_decay": 0.1}
    section = {"type": optimizer, "params": {"lr": 1e-2, **decay, **more.get(optimizer, {})}}
    first = saved(tmp_path, stage, dtype, optimizer=section)
    second = loaded(tmp_path, stage=stage, dtype=dtype, steps_first=2, more={"optimizer": section})
    for before, after in zip(first, second):
        assert equal(after["loaded"], before["saved"])
        assert after["losses"] == before["losses"]
        assert equal(after["final"], before["final"])
        assert after["steps"] == before["steps"]
        assert (after["lr"], after["scale"]) == (before["lr"], before["scale"])
        assert after["counters"] == (STEPS, after["counters"][1])
    assert [r["client_state"] for r in second] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.parametrize("nodes, world, stage", [(1, 1, 0), (2, 2, 3), (2, 4, 1), (3, 3, 3)])
def test_any_number_of_ranks_and_any_stage(nodes, world, stage, tmp_path):
    first = saved(tmp_path)
    for i, rank in enumerate(loaded(tmp_path, nodes, world, stage)):
        # Buffers are each rank's own where there are as many as before, else rank 0's.
        assert equal(rank["loaded"], first[i if world == 2 else 0]["saved"])
        assert rank["counters"][0] == STEPS


def test_nodes_share_the_writing(tmp_path):
    with cluster.daemons(2) as nodes:
        first = cluster.run("checkpoint_workers:save_and_go_on", nodes, 2, config=config(3),
                            directory=str(tmp_path / "save"), before=STEPS, after=0)
    folder = tmp_path / "save" / f"global_step{STEPS}"
    names = {path.name for path in folder.glob("*.safetensors")}
    assert {name.split("-")[1] for name in names} == {"0000", "0001"}
    assert equal(loaded(tmp_path, 1, 1, 0)[0]["loaded"], first[0]["saved"])


def test_parts_of_a_checkpoint(tmp_path):
    expected = saved(tmp_path)[0]["saved"]
    weights = {key: value for key, value in expected.items() if "/" not in key}
    for options in ({"load_optimizer_states": False}, {"load_module_only": True}):
        rank = loaded(tmp_path, world=1, more={"optimizer": {"type": "Lion", "params": {}}},
                      **options)[0]
        assert equal({k: v for k, v in rank["loaded"].items() if "/" not in k}, weights)
        assert rank["counters"][0] == (0 if "load_module_only" in options else STEPS)
    assert set(rank["steps"]) == {0}


@pytest.fixture(scope="module")
def a_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    ranks = saved(path, world=1)
    return path / "save", ranks[0]["saved"]


def refuse(directory, tag="", world=2, settings=None):
    with cluster.daemons(1) as nodes:
        results = cluster.run("checkpoint_workers:refused_load", nodes, world,
                              config=settings or config(2), directory=str(directory), change=tag)
    assert all(error and unchanged for error, unchanged in results), results
    return [error for error, _ in results]


def test_damage_is_told_and_nothing_is_changed_before(a_checkpoint, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(a_checkpoint[0], directory)
    assert "doesn't exist" in refuse(directory, "global_step99")[0]
    folder = directory / f"global_step{STEPS}"
    (folder / folders.MANIFEST).write_text("{")
    assert "cannot be read" in refuse(directory)[1]
    (folder / folders.MANIFEST).unlink()
    (folder / "mp_rank_00_model_states.pt").touch()
    assert "written by DeepSpeed" in refuse(directory)[0]
    settings = config(2) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    assert "its optimizer was adam" in refuse(a_checkpoint[0], settings=settings)[0]


def test_a_flipped_bit_is_found(a_checkpoint, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(a_checkpoint[0], directory)
    file = next((directory / f"global_step{STEPS}").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    manifest = folders.read_manifest(file.parent)
    with pytest.raises(CheckpointError, match="damaged"):
        list(folders.fp32_weights(file.parent, manifest))
        with folders.TensorReader(file.parent) as reader:
            for parameter in manifest.parameters:
                for entry in parameter.state.values():
                    reader.read(entry, parameter.shape)


def test_no_latest_is_no_checkpoint(tmp_path):
    with cluster.daemons(1) as nodes:
        rank = cluster.run("checkpoint_workers:load_and_go_on", nodes, 1, config=config(2),
                           directory=str(tmp_path), after=1)[0]
    assert (rank["path"], rank["client_state"]) == (None, None)


@pytest.mark.parametrize("tags, told", [
    (["a", "b"], "different tags"), (["../x", "../x"], "cannot be the name of a folder"),
])
def test_bad_tags_are_refused_on_every_rank(tags, told, tmp_path):
    with cluster.daemons(1) as nodes:
        errors = cluster.run("checkpoint_workers:refused_save", nodes, 2, config=config(2),
                             directory=str(tmp_path / "save"), tags=tags)
    assert all(errors) and told in errors[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "save").write_text("a file is in the way")
    with cluster.daemons(1) as nodes:
        errors = cluster.run("checkpoint_workers:refused_save", nodes, 2, config=config(2),
                             directory=str(tmp_path / "save"), tags=["a", "a"])
    assert "cannot be made" in errors[0] and "another rank failed" in errors[1]


def test_killed_while_saving_over_a_checkpoint(tmp_path):
    """At any moment the tag is a whole checkpoint, and what the dead left is cleared."""
    directory = tmp_path / "save"
    for attempt in range(3):
        announce = tmp_path / f"started.{attempt}"
        with cluster.daemons(1) as nodes, cluster.ranks(
            "checkpoint_workers:save_again_and_again", nodes, 2, job=f"killed-{attempt}",
            config=config(2), directory=str(directory), announce=str(announce),
        ) as ranks:
            while not announce.exists():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks[0].process.wait(0.05)
                    raise AssertionError(ranks[0].text())
            for rank in ranks:
                os.kill(rank.pid, signal.SIGKILL)
                rank.wait()
        folder = directory / folders.latest_tag(directory)
        manifest = folders.read_manifest(folder)
        assert len(list(folders.fp32_weights(folder, manifest))) > 10
    with cluster.daemons(1) as nodes:
        cluster.run("checkpoint_workers:save_and_go_on", nodes, 1, config=config(2), before=1,
                    after=0, directory=str(directory), tag="same")
    assert {path.name for path in directory.iterdir()} == {"same", "latest", "zero_to_fp32.py"}


# --- Weights without a daemon.


def test_the_script_beside_a_checkpoint(a_checkpoint, tmp_path):
    directory, expected = a_checkpoint
    for flags, files in (
        ([], {"pytorch_model.bin"}),
        (["--safe_serialization"], {"model.safetensors"}),
        (["--max_shard_size", "6KB", "--exclude_frozen_parameters"], None),
    ):
        output = tmp_path / f"out{len(flags)}"
        subprocess.run([sys.executable, str(directory / "zero_to_fp32.py"), str(directory),
                        str(output), *flags], check=True, timeout=120)
        names = {path.name for path in output.iterdir()}
        if files is not None:
            assert names == files
        state = read_output(output)
        for name, value in state.items():
            assert torch.equal(value, expected[name]), name
        missing = {name for name in expected if "/" not in name} - state.keys()
        if "--safe_serialization" in flags:
            assert missing == {"head.weight"}  # tied: once
        elif flags:
            assert missing == {"frozen.weight", "frozen.bias"} and len(names) > 3
            assert all(path.stat().st_size < 12_000 for path in output.iterdir())
        else:
            assert not missing


def read_output(output) -> dict:
    from safetensors.torch import load_file

    state = {}
    for path in output.iterdir():
        if path.suffix == ".safetensors":
            state |= load_file(path)
        elif path.suffix == ".bin":
            state |= torch.load(path, weights_only=True)
    index = list(output.glob("*.index.json"))
    if index:
        assert json.loads(index[0].read_text())["weight_map"].keys() == state.keys()
    return state


def test_into_a_model(tmp_path):
    with cluster.daemons(1) as nodes:
        rank = cluster.run("checkpoint_workers:released_model", nodes, 1, config=config(3),
                           directory=str(tmp_path))[0]
    assert rank["gradients"]
    for name, value in rank["state"].items():
        assert torch.equal(value, rank["expected"][name]), name
