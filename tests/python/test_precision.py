# SPDX-License-Identifier: Apache-2.0
"""Optimizers, data types and loss scaling, through daemons and beside plain PyTorch."""

import math

import pytest
import torch

import cluster
import workers

WORLD = 2
STEPS = 6


def config(**keys):
    return {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **keys}


def plain(make, steps=STEPS, accumulation=1, clip=0.0):
    """The same training in one process: losses of rank 0, norms, weights."""
    torch.manual_seed(5)
    model = workers.small_model()
    optimizer = make(workers.groups_of(model))
    losses, norms = [], []
    for step in range(1, steps + 1):
        for micro in range(accumulation):
            for rank in range(WORLD):
                x, y = workers.small_batch(step, micro, rank)
                loss = (model(x) - y).square().mean()
                (loss / (WORLD * accumulation)).backward()
                if rank == 0:
                    losses.append(loss.item())
        limit = clip if clip > 0 else math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


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
    "adam is adamw": ({"type": "Adam", "params": ADAM}, lambda p: torch.optim.AdamW(p, **ADAM)),
    "adam": ({"type": "Adam", "params": {**ADAM, "adam_w_mode": False}},
             lambda p: torch.optim.Adam(p, **ADAM)),
    "lion": ({"type": "Lion", "params": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}},
             lambda p: Lion(p, 1e-3, (0.9, 0.99), 0.1)),
    "adagrad": ({"type": "Adagrad", "params": {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.1,
                                               "initial_accumulator_value": 0.3}},
                lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1, lr_decay=0.1,
                                              initial_accumulator_value=0.3)),
    "sgd": ({"type": "SGD", "params": {"lr": 0.1}}, lambda p: torch.optim.SGD(p, lr=0.1)),
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
}


def check(result, expected):
    losses, norms, weights = expected
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(result["state"][name], value, rtol=1e-4, atol=2e-6)


@pytest.fixture(scope="module")
def nodes():
    with cluster.daemons(2) as running:
        yield running


def train(nodes, job, **arguments):
    return cluster.run("workers:train_small", nodes, WORLD, job=job, **arguments)


@pytest.mark.parametrize("name", CONFIGURED)
def test_configured_optimizers_equal_pytorch(name, nodes):
    section, make = CONFIGURED[name]
    result = train(nodes, f"configured-{name.replace(' ', '-')}",
                   config=config(optimizer=section, gradient_clipping=0.3), steps=STEPS)[0]
    check(result, plain(make, clip=0.3))


@pytest.mark.parametrize("name", PASSED)
def test_passed_optimizers_equal_pytorch(name, nodes):
    result = train(nodes, f"passed-{name}", config=config(gradient_accumulation_steps=2),
                   optimizer=(name, PASSED[name]), steps=STEPS)[0]
    kind = getattr(torch.optim, name)
    check(result, plain(lambda p: kind(p, **PASSED[name]), accumulation=2))


ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


def fp16(**keys):
    return config(optimizer=ADAMW, fp16={"enabled": True, **keys})


def test_half_precision_is_near_full(nodes):
    full = train(nodes, "full", config=config(optimizer=ADAMW), steps=24)[0]
    for name, section in (("bf16", {"bf16": {"enabled": True}}),
                          ("fp16", {"fp16": {"enabled": True, "initial_scale_power": 8}})):
        half = train(nodes, name, config=config(optimizer=ADAMW, **section), steps=24)[0]
        assert half["losses"] == pytest.approx(full["losses"], rel=2e-2)
        assert half["norms"] == pytest.approx(full["norms"], rel=2e-2)
        assert half["skipped"][-1] == 0
        assert half["losses"][-1] < half["losses"][0]


# DeepSpeed's traces: window 3, first scale 16.
@pytest.mark.parametrize("keys,bad,scales", [
    ({"hysteresis": 2}, [], [16, 16, 16, 16, 32, 32, 32, 64]),
    ({"hysteresis": 2}, [1, 2, 4], [16, 16, 8, 8, 4, 4, 4, 4, 8]),
    ({"hysteresis": 2, "consecutive_hysteresis": True}, [1, 3, 5, 6],
     [16, 16, 16, 16, 16, 16, 8, 8]),
    ({"hysteresis": 1}, [2], [16, 16, 8, 8, 8, 8, 16]),
    ({"loss_scale": 128}, [2, 3], [128] * 5),
])
def test_the_loss_scale_moves_as_deepspeeds(keys, bad, scales, nodes):
    result = train(nodes, "scales", config=fp16(initial_scale_power=4, loss_scale_window=3, **keys),
                   steps=len(scales), bad_steps=bad)
    for rank in result:
        assert rank["scales"] == scales
        assert rank["skipped"] == [sum(b <= s for b in bad) for s in range(1, len(scales) + 1)]
        assert rank["overflow"] == [s in bad for s in range(1, len(scales) + 1)]
        assert rank["global_steps"] == len(scales)
        assert [math.isinf(n) for n in rank["norms"]] == rank["overflow"]


def test_a_skipped_step_changes_nothing_and_moves_no_schedule(nodes):
    settings = fp16(initial_scale_power=4)
    settings["scheduler"] = {"type": "WarmupLR",
                             "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}
    skipping = train(nodes, "skipping", config=settings, steps=3, bad_steps=[2, 3])[0]
    short = train(nodes, "short", config=settings, steps=1)[0]
    assert skipping["rates"] == [0, 0, 0]  # the first two applied steps run at the smallest rate
    for name, value in short["state"].items():
        assert torch.equal(skipping["state"][name], value), name


def test_at_the_smallest_scale_every_rank_is_told(nodes):
    settings = fp16(initial_scale_power=1, hysteresis=1, min_loss_scale=1)
    with pytest.raises(AssertionError, match="the training has diverged"):
        train(nodes, "diverged", config=settings, steps=4, bad_steps=[1, 2, 3])


def test_stage_0_bears_no_overflow_and_never_gives_up(nodes):
    settings = fp16(initial_scale_power=1, hysteresis=2, min_loss_scale=1)
    settings["zero_optimization"] = {"stage": 0}
    result = train(nodes, "stage0", config=settings, steps=4, bad_steps=[1, 2, 3])[0]
    assert result["scales"] == [2, 1, 1, 1]


@pytest.mark.parametrize("section,skips", [
    ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, True),
    ({"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 2}},
     False),
    ({"zero_optimization": {"stage": 2}}, True),
    ({"zero_optimization": {"stage": 0}}, False),
])
def test_where_steps_are_skipped(section, skips, nodes):
    result = train(nodes, "skips", config={**config(optimizer=ADAMW), **section}, steps=2,
                   bad_steps=[1])[0]
    assert result["skipped"] == ([1, 1] if skips else [0, 0])
    assert math.isnan(result["losses"][1]) != skips


def test_sum_instead_of_mean(nodes):
    sgd = {"type": "SGD", "params": {"lr": 0.01}}
    half = {"type": "SGD", "params": {"lr": 0.02}}
    summed = train(nodes, "sum", steps=3,
                   config=config(optimizer=sgd, gradient_allreduce_op="sum"))[0]
    mean = train(nodes, "mean", steps=3, config=config(optimizer=half))[0]
    assert summed["losses"] == pytest.approx(mean["losses"], rel=1e-6)


@pytest.mark.parametrize("section,bytes_expected", [
    ({}, 8), ({"bf16": {"enabled": True}}, 4), ({"fp16": {"enabled": True}}, 4),
    ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, 6),
    ({"communication_data_type": "bf16"}, 6),
])
def test_bytes_between_nodes(section, bytes_expected):
    """Per parameter and step, both directions: a gather and a reduction of half of it each."""
    steps = 4
    settings = config(optimizer=ADAMW, **section)
    with cluster.daemons(2) as running:
        one = traffic(running, settings, "one", 1)
        more = traffic(running, settings, "more", 1 + steps)
    elements = sum(p.numel() for p in workers.small_model().parameters())
    assert (more - one) / steps / elements == pytest.approx(bytes_expected, rel=0.15)


def traffic(nodes, settings, job, steps):
    before = sent(nodes)
    train(nodes, job, config=settings, steps=steps)
    return sent(nodes) - before


def sent(nodes):
    return sum(
        value for node in nodes for name, value in node.metric_values().items()
        if name.startswith("zerod_traffic_bytes_total") and "sent_to_members" in name
    )
