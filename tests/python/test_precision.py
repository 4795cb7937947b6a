# SPDX-License-Identifier: Apache-2.0
"""Optimizers, data types and loss scaling, through daemons and beside plain PyTorch."""

import math

import pytest
import torch

import cluster
import workers
from plain import plain, rounded

WORLD = 2


def config(**keys):
    return {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **keys}


class Lion(torch.optim.Optimizer):
    """The paper's algorithm 2."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                beta1, beta2 = group["betas"]
                update = (beta1 * m + (1 - beta1) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


ADAM = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
CONFIGURED = {
    "adamw": ({"type": "AdamW", "params": ADAM}, lambda p: torch.optim.AdamW(p, **ADAM)),
    "adam-is-adamw": ({"type": "Adam", "params": ADAM}, lambda p: torch.optim.AdamW(p, **ADAM)),
    "adam": ({"type": "Adam", "params": {**ADAM, "adam_w_mode": False}},
             lambda p: torch.optim.Adam(p, **ADAM)),
    "lion": ({"type": "Lion", "params": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}},
             lambda p: Lion(p, 1e-3, (0.9, 0.99), 0.1)),
    "adagrad": ({"type": "Adagrad", "params": {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.1,
                                               "initial_accumulator_value": 0.3}},
                lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1, lr_decay=0.1,
                                              initial_accumulator_value=0.3)),
    "sgd": ({"type": "SGD", "params": {"lr": 0.1}}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "rmsprop": ({"type": "RMSprop", "params": {"lr": 0.01, "alpha": 0.9, "momentum": 0.8,
                                               "centered": True, "weight_decay": 0.1}},
                lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.8, centered=True,
                                              weight_decay=0.1)),
    "rmsprop-alone": ({"type": "RMSprop"}, torch.optim.RMSprop),
    "adadelta": ({"type": "Adadelta"}, torch.optim.Adadelta),
    "adamax": ({"type": "adamax", "params": ADAM}, lambda p: torch.optim.Adamax(p, **ADAM)),
    "nadam": ({"type": "NAdam", "params": {**ADAM, "momentum_decay": 0.1}},
              lambda p: torch.optim.NAdam(p, **ADAM, momentum_decay=0.1)),
    "radam": ({"type": "RAdam", "params": {**ADAM, "decoupled_weight_decay": True}},
              lambda p: torch.optim.RAdam(p, **ADAM, decoupled_weight_decay=True)),
    "asgd": ({"type": "ASGD", "params": {"lr": 0.1, "lambd": 0.1, "t0": 2}},
             lambda p: torch.optim.ASGD(p, lr=0.1, lambd=0.1, t0=2)),
    "rprop": ({"type": "Rprop", "params": {"etas": [0.4, 1.3], "step_sizes": [1e-4, 0.1]}},
              lambda p: torch.optim.Rprop(p, etas=(0.4, 1.3), step_sizes=(1e-4, 0.1))),
    "nesterov": ({"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "nesterov": True,
                                            "weight_decay": 0.1}},
                 lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True,
                                           weight_decay=0.1)),
}
PASSED = {
    "AdamW": ADAM,
    "Adam": ADAM,
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.3},
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1},
    "Adamax": ADAM,
    "NAdam": {**ADAM, "decoupled_weight_decay": True},
    "RAdam": ADAM,
    "ASGD": {"lr": 0.05, "weight_decay": 0.1},
    "Rprop": {"lr": 0.001},
}
# With another rate in every step.
SCHEDULED = {
    "AdamW": ADAM,
    "ASGD": {"lr": 0.1, "lambd": 0.3, "alpha": 0.5, "t0": 1},
    "NAdam": ADAM,
}


ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


def fp16(**keys):
    return config(optimizer=ADAMW, fp16={"enabled": True, **keys})


# DeepSpeed's traces: window 3, first scale 16. Keys of fp16, steps that overflow, scales.
TRACES = {
    "growth": ({"hysteresis": 2}, (), [16, 16, 16, 16, 32, 32, 32, 64]),
    "hysteresis": ({"hysteresis": 2}, (1, 2, 4), [16, 16, 8, 8, 4, 4, 4, 4, 8]),
    "consecutive": ({"hysteresis": 2, "consecutive_hysteresis": True}, (1, 3, 5, 6),
                    [16, 16, 16, 16, 16, 16, 8, 8]),
    "no-hysteresis": ({"hysteresis": 1}, (2,), [16, 16, 8, 8, 8, 8, 16]),
    "static": ({"loss_scale": 128}, (2, 3), [128] * 5),
}
# Where a step whose gradients are not finite is skipped.
SKIPS = {
    "bf16": ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, True),
    "bf16-unchecked": ({"bf16": {"enabled": True, "check_grad_overflow": False},
                        "zero_optimization": {"stage": 2}}, False),
    "bf16-unchecked-stage3": ({"bf16": {"enabled": True, "check_grad_overflow": False}}, True),
    "fp32": ({"zero_optimization": {"stage": 2}}, True),
    "fp32-stage0": ({"zero_optimization": {"stage": 0}}, False),
}
# Without fp32 masters, and with the optimizer's state in 16 bits.
NARROW = {
    "bf16-masters": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "bf16-states": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True,
                             "bf16_optimizer_states": True}},
    "fp16-masters": {"fp16": {"enabled": True, "initial_scale_power": 8, "auto_cast": True,
                              "fp16_master_weights_and_grads": True}},
}
# Bytes between two nodes per parameter and step: a gather and a reduction of half of it each way.
BYTES = {
    "fp32": ({}, 8),
    "bf16": ({"bf16": {"enabled": True}}, 4),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 4}}, 4),
    "bf16-fp32": ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, 6),
    "fp32-bf16": ({"communication_data_type": "bf16"}, 6),
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}


def all_runs():
    runs = {}
    for name, (section, _) in CONFIGURED.items():
        runs[f"configured-{name}"] = {"config": config(optimizer=section, gradient_clipping=0.3)}
    for name, params in PASSED.items():
        runs[f"passed-{name}"] = {"config": config(gradient_accumulation_steps=2),
                                  "optimizer": (name, params)}
    schedule = {"type": "ExponentialLR", "params": {"gamma": 0.6}}
    for name, params in SCHEDULED.items():
        runs[f"scheduled-{name}"] = {"config": config(scheduler=schedule),
                                     "optimizer": (name, params)}
    half = {"full": {}, "bf16": {"bf16": {"enabled": True}},
            "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "auto_cast": True}},
            "autocast": {"torch_autocast": {"enabled": True}}} | NARROW
    for name, section in half.items():
        runs[f"half-{name}"] = {"config": config(optimizer=ADAMW, **section), "steps": 24}
    for name, (keys, bad, scales) in TRACES.items():
        settings = fp16(initial_scale_power=4, loss_scale_window=3, **keys)
        runs[f"trace-{name}"] = {"config": settings, "bad_steps": bad, "steps": len(scales)}
    runs["unscaled"] = {"config": fp16(), "steps": 1, "plain_backward": True}
    warmup = {**fp16(initial_scale_power=4), "scheduler": WARMUP}
    runs["skipping"] = {"config": warmup, "steps": 3, "bad_steps": (2, 3)}
    runs["short"] = {"config": warmup, "steps": 1}
    runs["diverged"] = {"config": fp16(initial_scale_power=1, hysteresis=1), "steps": 4,
                        "bad_steps": (1, 2, 3)}
    stage0 = fp16(initial_scale_power=1, hysteresis=2) | {"zero_optimization": {"stage": 0}}
    runs["stage0"] = {"config": stage0, "steps": 4, "bad_steps": (1, 2, 3)}
    for name, (section, _) in SKIPS.items():
        runs[f"skips-{name}"] = {"config": config(optimizer=ADAMW) | section, "steps": 2,
                                 "bad_steps": (1,)}
    for op, lr in (("sum", 0.01), ("mean", 0.02)):
        sgd = {"type": "SGD", "params": {"lr": lr}}
        runs[op] = {"config": config(optimizer=sgd, gradient_allreduce_op=op), "steps": 3}
    for name, (section, _) in BYTES.items():
        runs[f"bytes-{name}"] = {"config": config(optimizer=ADAMW, **section), "steps": 4}
    return runs


@pytest.fixture(scope="module")
def results():
    """Of both ranks, each on a node of its own, by the run's name."""
    with cluster.daemons(2) as nodes:
        return cluster.run("workers:train_small", nodes, WORLD, runs=all_runs(),
                           metrics=[node.metrics for node in nodes])


def check(result, expected):
    losses, norms, weights = expected
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(result["state"][name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGURED)
def test_configured_optimizers_equal_pytorch(name, results):
    check(results[0][f"configured-{name}"], plain(CONFIGURED[name][1], clip=0.3))


@pytest.mark.parametrize("name", PASSED)
def test_passed_optimizers_equal_pytorch(name, results):
    kind = getattr(torch.optim, name)
    expected = plain(lambda p: kind(p, **PASSED[name]), accumulation=2)
    check(results[0][f"passed-{name}"], expected)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_moves_rates_as_pytorchs(name, results):
    kind = getattr(torch.optim, name)
    expected = plain(lambda p: kind(p, **SCHEDULED[name]),
                     schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.6))
    check(results[0][f"scheduled-{name}"], expected)


@pytest.mark.parametrize("name", ["bf16", "fp16", "autocast"])
def test_half_precision_is_near_full(name, results):
    full, half = results[0]["half-full"], results[0][f"half-{name}"]
    assert half["losses"] == pytest.approx(full["losses"], rel=2e-2)
    assert half["losses"] != full["losses"]
    assert half["norms"] == pytest.approx(full["norms"], rel=2e-2)
    assert half["skipped"][-1] == 0
    assert half["losses"][-1] < half["losses"][0]


@pytest.mark.parametrize("name", NARROW)
def test_weights_that_are_rounded_each_step_still_train(name, results):
    narrow, kind = results[0][f"half-{name}"], name.partition("-")[0]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    expected = rounded(dtype, name == "bf16-states", ADAMW["params"]["lr"])
    assert narrow["losses"] == pytest.approx(expected, rel=1e-3 if kind == "fp16" else 1e-2)
    assert narrow["losses"] != results[0][f"half-{kind}"]["losses"]
    assert narrow["losses"][-1] < narrow["losses"][0]


@pytest.mark.parametrize("name", TRACES)
def test_the_loss_scale_moves_as_deepspeeds(name, results):
    _, bad, scales = TRACES[name]
    steps = range(1, len(scales) + 1)
    for rank in results:
        result = rank[f"trace-{name}"]
        assert result["scales"] == scales
        assert result["skipped"] == [sum(b <= s for b in bad) for s in steps]
        assert result["overflow"] == [s in bad for s in steps]
        assert result["global_steps"] == len(scales)
        assert [math.isinf(n) for n in result["norms"]] == result["overflow"]


def test_a_skipped_step_changes_nothing_and_moves_no_schedule(results):
    skipping, short = results[0]["skipping"], results[0]["short"]
    # Of the applied steps the first two run at the smallest rate.
    assert skipping["rates"] == [0, 0, 0]
    for name, value in short["state"].items():
        assert torch.equal(skipping["state"][name], value), name


def test_at_the_smallest_scale_every_rank_is_told(results):
    for rank in results:
        assert "the training has diverged" in rank["diverged"]["error"]


def test_stage_0_bears_no_overflow_and_never_gives_up(results):
    assert results[0]["stage0"]["scales"] == [2, 1, 1, 1]


@pytest.mark.parametrize("name", SKIPS)
def test_where_steps_are_skipped(name, results):
    result, skips = results[0][f"skips-{name}"], SKIPS[name][1]
    assert result["skipped"] == ([1, 1] if skips else [0, 0])
    assert math.isnan(result["losses"][1]) != skips


def test_sum_instead_of_mean(results):
    assert results[0]["sum"]["losses"] == pytest.approx(results[0]["mean"]["losses"], rel=1e-6)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_between_nodes(name, results):
    ends = [rank[f"bytes-{name}"]["sent"] for rank in results]
    sent = sum(end - begin for begin, end in ends)
    elements = sum(p.numel() for p in workers.small_model().parameters())
    assert sent / 3 / elements == pytest.approx(BYTES[name][1], rel=0.1)


def test_an_unscaled_loss_is_refused_in_fp16(results):
    assert "Loss scaling is required" in results[0]["unscaled"]["error"]
