# SPDX-License-Identifier: Apache-2.0
"""All that a job's next step depends on, read out of one job and put into another: the second one
goes on with the first one's bits. And the same for one parameter at a time."""

import pytest
import torch

import cluster
import restore_workers

WORLD = 2
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
SMALL_WINDOW = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 3000}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2,
                 "hysteresis": 1}}
DTYPES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": FP16}
# Stage and nodes of the job that is read, and of the one that goes on. 1 x 2 and 2 x 1 add the same
# two gradients, but 16 bits round what crosses the network.
CASES = {
    ("fp32", (3, 1), (0, 1)), ("fp32", (0, 1), (2, 1)), ("fp32", (3, 2), (1, 1)),
    ("fp32", (1, 1), (3, 2)), ("fp32", (0, 2), (3, 2)),
    ("bf16", (3, 1), (0, 1)), ("bf16", (1, 2), (3, 2)), ("bf16", (3, 2), (0, 2)),
    ("fp16", (3, 1), (1, 1)), ("fp16", (2, 2), (3, 2)),
}


def config(dtype, stage, job, **keys):
    zero = {"stage": stage, **(SMALL_WINDOW if stage == 3 else {})}
    return {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.5, "optimizer": ADAMW,
            "zero_optimization": zero, "zerod": {"job": job}, **DTYPES[dtype], **keys}


@pytest.fixture(scope="module")
def nodes():
    with cluster.daemons(2) as running:
        yield running


@pytest.fixture(scope="module")
def results(nodes):
    """By (dtype, stage, nodes): six steps of each job, its state read after the third."""
    jobs = sorted({(dtype, *grid) for dtype, first, second in CASES for grid in (first, second)})
    found = {}
    for count in (1, 2):
        chosen = [job for job in jobs if job[2] == count]
        runs = [config(dtype, stage, f"whole-{dtype}-{stage}-{n}") for dtype, stage, n in chosen]
        ranks = cluster.run("restore_workers:train_and_read", nodes[:count], WORLD,
                            job=f"whole-{count}", runs=runs)
        for rank, values in enumerate(ranks):
            found |= {(*job, rank): value for job, value in zip(chosen, values)}
    return found


@pytest.mark.parametrize("dtype, first, second", sorted(CASES))
def test_another_job_goes_on_with_the_same_bits(dtype, first, second, nodes, results):
    read = results[(dtype, *first, 0)]
    whole = results[(dtype, *second, 0)]
    job = "-".join(map(str, ("on", dtype, *first, *second)))
    settings = config(dtype, second[0], job)
    ends = cluster.run("restore_workers:restore_and_train", nodes[: second[1]], WORLD, job=job,
                       config=settings, kept=read["kept"])
    for rank, end in enumerate(ends):
        mine = results[(dtype, *second, rank)]
        assert end["losses"] == mine["losses"][3:]
        assert end["scales"] == mine["scales"][3:]
        assert end["steps"] == mine["end"]["steps"]
        assert end["scaler"] == mine["end"]["scaler"]
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for a, b in zip(end[kind], mine["end"][kind]):
                assert torch.equal(a, b), kind
    if dtype == "fp16":  # it moved, before and after
        assert len(set(whole["scales"][:4])) > 1 and len(set(whole["scales"][3:])) > 1
        assert read["kept"]["scaler"]["cur_iter"] == 3
        assert read["kept"]["scaler"]["last_overflow_iter"] == 1
        assert read["kept"]["steps"] == [2] * len(read["kept"]["steps"])
    else:
        assert read["kept"]["scaler"] is None


@pytest.mark.parametrize("stage, count", [(0, 1), (3, 2)])
def test_what_cannot_be_restored_is_an_error(stage, count, nodes):
    settings = config("fp16", stage, "refused")
    results = cluster.run("restore_workers:refused_restores", nodes[:count], WORLD,
                          job=f"refused-{stage}", config=settings)
    for errors in results:
        assert "the ranks 0 and 1 restore different" in errors["different"]
        assert "calls restore where rank" in errors["barrier"]
        assert "the job has 8" in errors["length"]
        assert "cur_iter" in errors["key"]
        assert "above 0" in errors["scale"]
        assert "the kind of state is" in errors["kind"]
        assert "elements" in errors["range"]


FRAGMENT_CASES = [
    ("fp32", 0, 1, "per_rank"), ("fp32", 3, 2, "per_rank"), ("fp32", 1, 2, "node_sum"),
    ("fp32", 3, 1, "node_sum"), ("bf16", 3, 1, "per_rank"), ("fp16", 3, 2, "per_rank"),
]
TOLERANCE = {"fp32": {"rtol": 1e-5, "atol": 1e-7}, "bf16": {"rtol": 5e-2, "atol": 2e-3},
             "fp16": {"rtol": 2e-2, "atol": 5e-4}}


@pytest.mark.parametrize("dtype, stage, count, plan", FRAGMENT_CASES)
def test_fragments(dtype, stage, count, plan, nodes):
    name = f"fragments-{dtype}-{stage}-{count}"
    settings = config(dtype, stage, name, gradient_accumulation_steps=2, gradient_clipping=0.0)
    settings["zerod"]["gradient_plan"] = plan
    results = cluster.run("restore_workers:fragments", nodes[:count], WORLD, job=name,
                          config=settings)
    for result in results:
        for micro, gradients in enumerate(result["gradients"]):
            # The first of two micro-steps has half of its mean.
            share = 0.5 if micro == 0 else 1.0
            expected = restore_workers.plain_gradients(micro + 1, WORLD)
            assert {n for n, g in gradients.items() if g is not None} == set(expected)
            for key, gradient in expected.items():
                assert gradients[key].dtype == torch.float32
                torch.testing.assert_close(gradients[key], share * gradient, **TOLERANCE[dtype])
                assert torch.equal(gradients[key], results[0]["gradients"][micro][key])
        last = result["gradients"][1]
        norm = torch.stack([g.double().square().sum() for g in last.values() if g is not None])
        assert result["norm"] == pytest.approx(norm.sum().sqrt().item(), rel=1e-6)
        torch.testing.assert_close(result["state"]["exp_avg"], 0.1 * last["own.weight"],
                                   rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(result["state"]["exp_avg_sq"], 0.001 * last["own.weight"] ** 2,
                                   rtol=1e-4, atol=1e-12)
        assert torch.equal(result["idle"], torch.ones(3, 3))
        assert result["steps"]["own.weight"] == 1 and result["steps"]["idle.weight"] == 0
        assert [word in error for word, error in zip(
            ("exp_avg, exp_avg_sq", "shape", "no parameter", "not trained"), result["errors"],
            strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype, stage, count, plan", FRAGMENT_CASES)
def test_gradients_are_set(dtype, stage, count, plan, nodes):
    name = f"set-gradients-{dtype}-{stage}-{count}"
    settings = config(dtype, stage, name, gradient_accumulation_steps=2, gradient_clipping=0.0)
    settings["zerod"]["gradient_plan"] = plan
    results = cluster.run("restore_workers:set_gradients", nodes[:count], WORLD, job=name,
                          config=settings)
    both = restore_workers.plain_gradients(2, WORLD)
    first = restore_workers.plain_gradients(1, WORLD)
    for result in results:
        # What was there was replaced, what came after was added to it.
        torch.testing.assert_close(result["late"], both["first.bias"] - 0.5 * first["first.bias"],
                                   **TOLERANCE[dtype])
        gradients = {n: g for n, g in result["gradients"].items() if g is not None}
        assert set(gradients) == {*both, "idle.weight"}
        assert torch.equal(gradients["own.weight"], torch.full((32, 32), 0.5))
        torch.testing.assert_close(gradients["last.bias"],
                                   torch.arange(gradients["last.bias"].numel()) / 1000 + 1)
        torch.testing.assert_close(gradients["first.weight"], both["first.weight"],
                                   **TOLERANCE[dtype])
        norm = torch.stack([g.double().square().sum() for g in gradients.values()])
        assert result["norm"] == pytest.approx(norm.sum().sqrt().item(), rel=1e-6)
        for key, gradient in gradients.items():
            torch.testing.assert_close(result["exp_avg"][key], 0.1 * gradient, rtol=1e-5,
                                       atol=1e-9)
        assert result["steps"]["idle.weight"] == 1
        assert [word in error for word, error in zip(
            ("shape", "part of 'own.weight'", "not trained"), result["errors"],
            strict=True)] == [True] * 3
        assert "disagree" in result["refused"]
