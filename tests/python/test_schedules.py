# SPDX-License-Identifier: Apache-2.0
"""Schedules from the configuration to the rates that steps are taken with: over the double of the
extension, and through a daemon with the real parser."""

import inspect
import json

import pytest
import torch
from torch import nn

import cluster
import zoo
from golden import SCHEDULES

ADAMW = {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.0}}
TORCH = {
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.1},
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "LinearLR": {"total_iters": 4},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.4, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.4, "total_steps": 9},
}
NEED_AN_OBJECT = {"LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "SequentialLR",
                  "ChainedScheduler"}


def start(scheduler, groups=None, **more):
    import zerod

    config = {
        "train_micro_batch_size_per_gpu": 2, "optimizer": ADAMW, "scheduler": scheduler,
        **more.pop("config", {}),
    }
    model = zoo.Stack(layers=1)
    parameters = groups(model) if groups else None
    return zerod.initialize(model=model, model_parameters=parameters, config=config, **more)[0]


def two_groups(model):
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.25},
    ]


def train(engine, steps):
    """The rates, and momenta, that each step was taken with, as the client was told."""
    seen = []
    original = engine.client.step

    def step(groups, **options):
        seen.append([(group.lr, group.beta1, group.beta2) for group in groups])
        return original(groups, **options)

    engine.client.step = step
    for number in range(steps):
        engine.backward(engine(zoo.batch(0, number)).square().mean())
        engine.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_taken_with_deepspeeds_rates(name, fake):
    kind, params, expected = SCHEDULES[name]
    seen = train(start({"type": kind, "params": params}), len(expected))
    rates = [groups[0][0] for groups in seen]
    assert rates == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_rates_by_parameter_group(fake):
    params = {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [1.0, 0.5], "warmup_num_steps": 4,
              "warmup_type": "linear"}
    engine = start({"type": "WarmupLR", "params": params}, two_groups)
    rates = [[lr for lr, _, _ in groups] for groups in train(engine, 6)]
    assert rates == [pytest.approx(pair) for pair in (
        [0, 0.1], [0, 0.1], [0.25, 0.2], [0.5, 0.3], [0.75, 0.4], [1, 0.5])]
    engine = start({"type": "WarmupLR", "params": {"warmup_num_steps": 2}}, two_groups)
    assert [lr for lr, _, _ in train(engine, 4)[-1]] == [0.5, 0.25]  # each group's own
    with pytest.raises(ValueError, match="WarmupLR.*warmup_max_lr has 3 values for 2"):
        start({"type": "WarmupLR", "params": {"warmup_max_lr": [1, 2, 3]}}, two_groups)


def test_one_cycle_moves_the_betas(fake):
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 4,
              "cycle_min_mom": [0.7, 0.8]}
    engine = start({"type": "OneCycle", "params": params}, two_groups)
    # What the schedule says is the cycle's beginning, what the first step takes is the minimum.
    assert engine.lr_scheduler.get_mom() == [(0.9, 0.99), (0.9, 0.99)]
    seen = train(engine, 6)
    assert [groups[0][1] for groups in seen] == pytest.approx([0.7, 0.85, 0.8, 0.75, 0.7, 0.75])
    assert [groups[1][1] for groups in seen] == pytest.approx([0.8, 0.875, 0.85, 0.825, 0.8, 0.825])
    assert {groups[0][2] for groups in seen} == {0.99}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_that_is_a_tensor_stays_one(name):
    from zerod import schedule

    kind, params, expected = SCHEDULES[name]
    rate = torch.full((1,), 0.5, dtype=torch.float64)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    made = getattr(schedule, kind)(optimizer, **params)
    seen = [rate.item()]
    for _ in expected[1:]:
        made.step()
        seen.append(rate.item())
    assert optimizer.param_groups[0]["lr"] is rate
    assert made.get_last_lr() == seen[-1:]
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_last_batch_iteration_goes_on(fake):
    kind, params, expected = SCHEDULES["decay"]
    seen = train(start({"type": kind, "params": {**params, "last_batch_iteration": 3}}), 5)
    rates = [groups[0][0] for groups in seen]
    assert rates == pytest.approx([0.5] + expected[5:9], rel=1e-3)  # the optimizer's own first


@pytest.mark.parametrize("name", TORCH)
def test_pytorchs_schedulers_by_name(name, fake):
    engine = start({"type": name, "params": TORCH[name]})
    assert type(engine.lr_scheduler) is getattr(torch.optim.lr_scheduler, name)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = getattr(torch.optim.lr_scheduler, name)(plain, **TORCH[name])
    for rates in train(engine, 8):
        group = plain.param_groups[0]
        assert rates == [pytest.approx((group["lr"], *group["betas"]))]
        plain.step()
        theirs.step()


@pytest.mark.usefixtures("no_job")
def test_params_that_do_not_suit_are_named(fake):
    with pytest.raises(ValueError, match=r"StepLR cannot be made with gama=0.1:.*gama"):
        start({"type": "StepLR", "params": {"gama": 0.1}})
    with pytest.raises(ValueError, match="OneCycleLR cannot be made with max_lr=1: .*total_steps"):
        start({"type": "OneCycleLR", "params": {"max_lr": 1}})
    with pytest.raises(ValueError, match="NoSuchLR.*this PyTorch"):
        start({"type": "NoSuchLR"})


def test_schedulers_that_are_passed(fake):
    import zerod

    model = zoo.Stack(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    given = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine = zerod.initialize(model=model, optimizer=optimizer, lr_scheduler=given,
                              config={"train_micro_batch_size_per_gpu": 2})[0]
    assert engine.lr_scheduler is given
    assert [groups[0][0] for groups in train(engine, 3)] == [0.5, 0.25, pytest.approx(0.5 / 3)]
    engine = start(None, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    assert [groups[0][0] for groups in train(engine, 3)] == [0.5, 0.25, 0.125]
    with pytest.raises(zerod.ModelError, match="keep one"):
        start({"type": "WarmupLR"}, lr_scheduler=given)


@pytest.mark.parametrize("kind", ["WarmupLR", "StepLR"])
def test_a_skipped_step_moves_no_schedule_also_after_a_restart(kind, fake):
    scheduler = {"type": kind, "params": {"WarmupLR": SCHEDULES["linear"][1],
                                          "StepLR": TORCH["StepLR"]}[kind]}
    more = {"config": {"zerod": {"job": "skips"}}}
    skipped = {2, 5}
    whole = []
    engine = start(scheduler, **more)
    for step in range(8):
        engine.client.skip_next = step in skipped
        whole += train(engine, 1)
    assert engine.skipped_steps == 2 and engine.global_steps == 8
    applied = [rates for step, rates in enumerate(whole) if step not in skipped]
    engine.destroy()
    assert applied == train(start(scheduler), 6)

    restarted = []
    for step in range(8):  # a new process for every step
        engine = start(scheduler, **more)
        assert engine.global_steps == step
        assert engine.skipped_steps == len([s for s in skipped if s < step])
        assert step == 0 or engine.was_step_applied() == (step - 1 not in skipped)
        engine.client.skip_next = step in skipped
        restarted += train(engine, 1)
        engine.client.close()
    assert restarted == whole


def test_a_schedule_that_takes_a_metric(fake):
    import zerod

    def run(until):
        model = zoo.Stack(layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        engine = zerod.initialize(
            model=model, optimizer=optimizer, lr_scheduler=plateau,
            config={"train_micro_batch_size_per_gpu": 2, "zerod": {"job": "plateau"}},
        )[0]
        rates = []
        while engine.global_steps < until:
            rates.append(engine.get_lr()[0])
            engine.backward(engine(zoo.batch(0, 0)).square().mean())
            metric = [3.0, 2.0, 2.5, 1.0, 4.0, 5.0][engine.global_steps]
            engine.step(lr_kwargs={"metrics": metric})
        return engine, rates

    engine, whole = run(6)
    assert whole == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    engine.destroy()
    rates = []
    for until in range(1, 7):
        engine, more = run(until)
        rates += more
        engine.client.close()
    assert rates == whole


@pytest.fixture(scope="module")
def trained():
    """What a rank saw of every schedule with a daemon."""
    cases = {name: (kind, params, len(rates)) for name, (kind, params, rates) in SCHEDULES.items()}
    cases |= {name: (name, params, 8) for name, params in TORCH.items()}
    with cluster.daemons(1) as running:
        return cluster.run("workers:schedules", running, 1, cases=cases)[0]


@pytest.mark.parametrize("name", [*SCHEDULES, *TORCH])
def test_through_a_daemon(name, trained):
    rates, weights, plain = trained[name]
    if name in SCHEDULES:
        assert rates == pytest.approx(SCHEDULES[name][2], rel=1e-3, abs=1e-9)
    # The daemon's steps had these rates: PyTorch's with them come to the same weights.
    assert len(set(rates)) > 1
    for key, value in plain.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


def test_a_schedule_goes_on_after_restarts():
    kind, params, expected = SCHEDULES["decay"]
    with cluster.daemons(1) as running:
        rates = cluster.run("workers:schedule_with_restarts", running, 1, kind=kind, params=params,
                            steps=len(expected))[0]
    assert rates == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_parser_knows_every_scheduler_of_this_pytorch():
    module = torch.optim.lr_scheduler
    there = {name for name, kind in inspect.getmembers(module, inspect.isclass)
             if issubclass(kind, module.LRScheduler) and not name.endswith("LRScheduler")}
    assert there == set(TORCH) | NEED_AN_OBJECT
    params = {"x_y": [1, "a"]}
    answers = dict(zip(there, cluster.run_alone("workers:resolve", texts=[
        json.dumps({"train_batch_size": 1, "scheduler": {"type": name, "params": params}})
        for name in there
    ])))
    for name in TORCH:
        assert answers[name]["scheduler"] == {"type": name, "params": params}
    for name in NEED_AN_OBJECT:
        assert f'scheduler.type: "{name}" is not served: it' in answers[name]
