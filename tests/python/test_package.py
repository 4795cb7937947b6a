# SPDX-License-Identifier: Apache-2.0
"""The package's own logic, over a double of the extension (fake_zerod.py), in this process."""

import copy

import pytest
import torch
from torch import nn

import zoo
from golden import SCHEDULES

pytestmark = pytest.mark.usefixtures("fake")
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}


def start(model, fake, **config):
    import zerod

    settings = copy.deepcopy(CONFIG) | config
    engine, *_ = zerod.initialize(model=model, config=settings)
    return engine


def run_case(name, fake, stage, steps=4):
    torch.manual_seed(7)
    torch._dynamo.reset()
    model, train = zoo.CASES[name](0, 1)
    engine = start(
        model, fake, zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0}
    )
    torch.manual_seed(8)
    seen = []
    for step in range(steps):
        seen.append(train(engine, step))
        engine.step()
        assert stage < 3 or not engine.client._held
    state = engine.state_dict()
    engine.destroy()
    return seen, state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", sorted(zoo.CASES))
def test_stage_3_equals_stage_0(name, fake):
    expected = run_case(name, fake, stage=0)
    got = run_case(name, fake, stage=3)
    assert got[0] == expected[0]
    assert same(got[1], expected[1])


def test_equals_plain_torch(fake):
    torch.manual_seed(3)
    plain = zoo.Stack()
    model = copy.deepcopy(plain)
    engine = start(model, fake)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    for step in range(3):
        loss = plain(zoo.batch(0, step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours = engine(zoo.batch(0, step)).square().mean()
        engine.backward(ours)
        engine.step()
        assert ours.item() == loss.item()
    assert same(engine.state_dict(), plain.state_dict())
    assert same(engine.module.state_dict(), plain.state_dict())


def test_window_follows_the_forward(fake):
    engine = start(zoo.Stack(layers=6), fake)
    most = 0
    client = engine.client
    original = client.gather

    def gather(unit):
        nonlocal most
        original(unit)
        most = max(most, len(client._held))

    client.gather = gather
    for step in range(2):
        engine.backward(engine(zoo.batch(0, step)).sum())
        assert not client._held
        engine.step()
    assert most <= 2


def test_stale_graph_raises(fake):
    for stage in (0, 3):
        engine = start(zoo.Stack(), fake, zero_optimization={"stage": stage})
        old = engine(zoo.batch(0, 0)).sum()
        engine.backward(engine(zoo.batch(0, 1)).sum())
        engine.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(old)
        engine.destroy()


def test_activation_written_in_place_raises(fake):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            hidden = torch.sigmoid(self.a(x))
            out = self.b(hidden)
            hidden.add_(1)
            return out

    engine = start(Model(), fake)
    loss = engine(torch.randn(2, 4)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(loss)


def test_user_writes_are_errors(fake):
    import zerod

    engine = start(zoo.Stack(), fake)
    with torch.no_grad():
        engine.module.head.bias.set_(engine.module.head.bias)  # as parametrizations do
    engine(zoo.batch(0, 0))
    engine.module.head.weight.data = torch.zeros(5, zoo.WIDTH)
    with pytest.raises(zerod.UserWriteError, match="head.weight.*GatheredParameters"):
        engine(zoo.batch(0, 0))
    with pytest.raises(zerod.UserWriteError, match="head.weight"):
        engine.step()
    with pytest.raises(RuntimeError, match="engine.load_state_dict"):
        engine.module.load_state_dict({})


def test_steps_and_folders_that_cannot_be(fake):
    engine = start(nn.Linear(4, 4), fake, zero_optimization={"stage": 1})
    with engine.no_sync(), pytest.raises(AssertionError, match="inside no_sync context manager"):
        engine.step()
    for nowhere in (None, ""):
        with pytest.raises(ValueError, match="save_dir is"):
            engine.save_checkpoint(nowhere)


def test_gathered_parameters(fake):
    import zerod

    engine = start(zoo.Stack(), fake)
    head = engine.module.head.weight
    assert head.isnan().all()
    before = engine.state_dict()["head.weight"]
    with zerod.GatheredParameters([head, nn.Parameter(torch.zeros(1))]):
        assert torch.equal(head, before)
    assert head.isnan().all()
    with zerod.GatheredParameters(head, modifier_rank=0):
        with torch.no_grad():
            head.clamp_(-0.01, 0.01)
    assert torch.equal(engine.state_dict()["head.weight"], before.clamp(-0.01, 0.01))
    with pytest.raises(KeyError), zerod.GatheredParameters(head, modifier_rank=0):
        head.data.zero_()
        raise KeyError
    assert torch.equal(engine.state_dict()["head.weight"], before.clamp(-0.01, 0.01))
    engine(zoo.batch(0, 0))
    with zerod.GatheredParameters([]), zerod.GatheredParameters([], modifier_rank=0):
        pass


def test_load_state_dict(fake):
    engine = start(zoo.CASES["tied_head"](0, 1)[0], fake)
    state = {k: torch.randn_like(v) for k, v in engine.state_dict().items()}
    state["head.weight"] = state["tokens.weight"]
    engine.load_state_dict(state)
    got = engine.state_dict()
    assert same(got, state)
    assert got["head.weight"].data_ptr() == got["tokens.weight"].data_ptr()
    with pytest.raises(ValueError, match="missing .*head.weight"):
        engine.load_state_dict({k: v for k, v in state.items() if k != "head.weight"})
    missing = engine.load_state_dict({}, strict=False).missing_keys
    assert "head.weight" in missing
    with pytest.raises(ValueError, match="size mismatch for tokens.weight"):
        engine.load_state_dict(state | {"tokens.weight": torch.zeros(1)})


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.full((zoo.WIDTH,), i / 23)


def make_resumable(fake):
    import zerod

    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(zoo.WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    return zerod.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        training_data=Squares(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "dataloader_drop_last": True,
            "zerod": {"job": "resume"},
        },
        seed=3,
    )


def run_resumable(parts, until):
    engine, _, loader, _ = parts
    losses = []
    while engine.global_steps < until:
        for batch in loader:
            loss = engine(batch).square().mean()
            engine.backward(loss)
            losses.append(loss.item())
            engine.client_state["seen"] = engine.client_state.get("seen", 0) + len(batch)
            engine.step()
            if engine.global_steps == until:
                break
    return losses


def test_resume_is_bit_equal(fake):
    whole = make_resumable(fake)
    expected = run_resumable(whole, 9)
    weights = whole[0].state_dict()
    whole[0].destroy()
    losses = []
    for until in (1, 4, 9):
        parts = make_resumable(fake)
        assert parts[0].resumed_step == len(losses) // 2
        losses += run_resumable(parts, until)
        state = parts[0].state_dict()
        parts[0].client.close()
    assert losses == expected
    assert same(state, weights)
    assert parts[0].client_state == {"seen": 36}
    parts[0].destroy()


def test_client_state_is_bounded(fake):
    engine = start(zoo.Stack(), fake, zerod={"client_state_bytes_max": 20000})
    engine.backward(engine(zoo.batch(0, 0)).sum())
    engine.client_state["big"] = b"x" * 30000
    with pytest.raises(ValueError, match="client_state_bytes_max"):
        engine.step()


def gradient_events(engine, model_calls):
    """What the client is told of gradients in one step."""
    engine.client.log.clear()
    for batch in model_calls:
        engine.backward(engine(batch).square().mean())
        engine.step()
    return [event for event in engine.client.log if event[0] in ("land", "scatter", "reclaim")]


def test_units_are_handed_over_when_their_gradients_are_complete(fake):
    engine = start(zoo.Stack(layers=2), fake, gradient_accumulation_steps=2)
    micro_steps = [zoo.batch(0, 0), zoo.batch(0, 1)]
    for _ in range(2):
        events = gradient_events(engine, micro_steps)
        marks = [i for i, event in enumerate(events) if event[0] == "scatter" and event[2]]
        assert len(marks) == len({events[i][1] for i in marks})  # each unit once
        assert not any(event[0] == "reclaim" for event in events)
        # Others' gradients come after: the pass goes on behind the transfer.
        last_land = max(i for i, event in enumerate(events) if event[0] == "land")
        assert sum(i < last_land for i in marks) == len(marks) - 1
    engine.destroy()


class Reentrant(zoo.Stack):
    """One layer, used in as many graphs of its own as `uses` says."""

    uses = 3

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(self.uses):
            x = torch.utils.checkpoint.checkpoint(self.layers[0], x, use_reentrant=True)
        return self.head(x)


def test_a_unit_that_is_used_more_often_than_before_is_late_once(fake):
    model = Reentrant(layers=1)
    engine = start(model, fake)
    layer = next(u for u, view in enumerate(engine.client.units) if view.name.startswith("layers"))
    for uses, late in ((2, False), (2, False), (3, True), (3, False), (1, False), (3, False)):
        model.uses = uses
        events = gradient_events(engine, [zoo.batch(0, 0)])
        assert (("reclaim", layer) in events) == late
        assert events.count(("scatter", layer, True)) == 1 + late
    engine.destroy()


def test_accumulation_and_clipping(fake):
    engine = start(
        zoo.Stack(), fake, gradient_accumulation_steps=3, gradient_clipping=0.5
    )
    plain = zoo.Stack()
    plain.load_state_dict(engine.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(6):
        engine.backward(engine(zoo.batch(0, step)).square().mean())
        engine.step()
        (plain(zoo.batch(0, step)).square().mean() / 3).backward()
        if step % 3 == 2:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-5)
    assert engine.global_steps == 2
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_bf16(fake):
    engine = start(zoo.Stack(), fake, bf16={"enabled": True})
    engine.backward(engine(zoo.batch(0, 0).bfloat16()).float().square().mean())
    engine.step()
    assert engine.state_dict()["head.weight"].dtype == torch.bfloat16
    assert engine.state_dict(master=True)["head.weight"].dtype == torch.float32


@pytest.mark.parametrize(("types", "expected"), [
    ({}, [torch.float32, torch.float16]),
    ({"buffer_dtype": "BF16"}, [torch.bfloat16, torch.bfloat16]),
    ({"buffer_dtype": "bf16", "keep_in_fp32_modules": ["b.*d"]}, [torch.bfloat16, torch.float32]),
    ({"keep_in_fp32_modules": ["b"]}, [torch.float32, torch.float32]),
])
def test_types_of_buffers(fake, types, expected):
    model = nn.Sequential()
    model.a = nn.Module()
    model.b = nn.Module()
    model.layer = nn.Linear(4, 4)
    model.a.register_buffer("one", torch.full((2,), 1.5))
    model.b.register_buffer("second", torch.full((2,), 2.5, dtype=torch.float16))
    model.b.register_buffer("count", torch.tensor(3))
    same = list(model.buffers())
    engine = start(model, fake, bf16={"enabled": True}, data_types=types)
    buffers = list(engine.module.buffers())
    assert [b.dtype for b in buffers] == [*expected, torch.int64]
    assert all(b is before for b, before in zip(buffers, same))
    assert [float(b.sum()) for b in buffers] == [3.0, 5.0, 3.0]
    engine.destroy()


def test_refused_models(fake):
    import zerod

    def refused(model, match, **config):
        with pytest.raises(zerod.ModelError, match=match):
            start(model, fake, **config)

    refused(nn.Embedding(4, 4, sparse=True), r"the model \(Embedding\) makes")
    refused(nn.Sequential(nn.EmbeddingBag(4, 4, sparse=True)), "the module '0' makes sparse")
    refused(nn.Embedding(4, 4, max_norm=1.0), "max_norm")
    refused(nn.Sequential(torch.jit.script(nn.Linear(4, 4))), "TorchScript")
    refused(nn.Linear(2, 2).double(), "float64")
    refused(nn.Linear(2, 2).bfloat16(), "bf16.enabled")
    refused(nn.LazyLinear(2), "lazy")
    refused(nn.ReLU(), "no parameters")
    model = nn.Linear(2, 2)
    for optimizer in (
        torch.optim.Adafactor(model.parameters()),
        torch.optim.SparseAdam(model.parameters()),
        torch.optim.LBFGS(model.parameters()),
        torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]),
        type("Mine", (torch.optim.RMSprop,), {})(model.parameters()),
        torch.optim.RMSprop(model.parameters(), maximize=True),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        torch.optim.AdamW(nn.Linear(2, 2).parameters()),
    ):
        with pytest.raises(zerod.ModelError):
            zerod.initialize(
                model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1}
            )


def test_muon_splits_groups_by_flags(fake):
    import zerod
    from zerod import Muon

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    with pytest.raises(zerod.ModelError, match=r"shape \(4, 3\) is: set \"use_muon\""):
        Muon(model.parameters())
    for p in model.parameters():
        p.use_muon = p.dim() == 2
    model[2].weight.use_muon = False
    muon = Muon([
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[1].parameters(), "use_muon": False},
        {"params": [model[2].weight, model[2].bias.requires_grad_(False)], "weight_decay": 0.1},
    ], muon_lr=0.1, adam_lr=0.2, ns_method="standard")
    told = [(g["use_muon"], g["lr"], g["weight_decay"], len(g["params"]))
            for g in muon.param_groups]
    assert told == [(True, 0.5, 0, 1), (False, 0.5, 0, 1), (False, 0.2, 0, 2), (False, 0.2, 0.1, 1)]
    assert muon.kinds() == ["muon", "adam", "adam", "adam"]
    assert muon.values(muon.param_groups[0]) == {
        "lr": 0.5, "weight_decay": 0.0, "momentum": 0.95, "nesterov": True,
        "standard_newton_schulz": True}
    assert Muon([model[0].weight]).param_groups[0]["lr"] == 0.02
    assert Muon([model[2].weight], lr=0.7).param_groups[0]["lr"] == 0.7
    with pytest.raises(ValueError, match="ns_method 'exact'"):
        Muon([model[0].weight], ns_method="exact")
    with pytest.raises(ValueError, match="bound no ratio"):
        zerod.Lamb([model[0].weight], min_coeff=2, max_coeff=1)


def test_groups_and_schedules(fake):
    import zerod

    model = zoo.Stack()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    given = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    engine, optimizer, _, _ = zerod.initialize(
        model=model, optimizer=given, config={"train_micro_batch_size_per_gpu": 1}
    )
    assert optimizer.param_groups[0] is given.param_groups[0]
    plain = zoo.Stack()
    plain.load_state_dict(engine.state_dict())
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for step in range(3):
        for group in given.param_groups + theirs.param_groups:
            group["lr"] = 0.01 * (step + 1)
        engine.backward(engine(zoo.batch(0, step)).sum())
        engine.step()
        plain(zoo.batch(0, step)).sum().backward()
        theirs.step()
        theirs.zero_grad()
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="engine.step"):
        optimizer.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_deepspeeds_values(name):
    from zerod import schedule

    kind, arguments, expected = SCHEDULES[name]
    def two_groups():
        groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        return torch.optim.AdamW(groups, lr=0.5)

    optimizer = two_groups()
    made = schedule.SCHEDULES[kind](optimizer, **arguments)
    seen, resumed = [], None
    for step in range(len(expected)):
        seen.append(optimizer.param_groups[1]["lr"])
        if step == 3:  # goes on from its state_dict alone
            resumed = schedule.SCHEDULES[kind](two_groups(), **arguments)
            resumed.load_state_dict(made.state_dict())
        made.step()
        if resumed is not None:
            resumed.step()
            assert resumed.get_last_lr() == made.get_last_lr()
    assert seen == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_one_cycle_moves_the_momentum_and_stands_on_stairs():
    from zerod import schedule

    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    cycle = schedule.OneCycle(optimizer, 0.0, 1.0, cycle_first_step_size=6,
                              cycle_first_stair_count=2)
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.99)
    rates, momentums = [], []
    for _ in range(12):
        cycle.step()
        rates.append(group["lr"])
        momentums.append(group["betas"][0])
    assert rates == [0, 0, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0, 0, 0]
    assert momentums[5] == pytest.approx(0.8) and momentums[0] == pytest.approx(0.9)


def test_schedules_refuse_what_makes_no_sense():
    from zerod import schedule

    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for make in (
        lambda: schedule.WarmupLR(optimizer, warmup_num_steps=0),
        lambda: schedule.WarmupLR(optimizer, warmup_type="cubic"),
        lambda: schedule.WarmupLR(optimizer, warmup_max_lr=[1, 2]),
        lambda: schedule.OneCycle(optimizer, 0, 1, cycle_first_step_size=0),
        lambda: schedule.LRRangeTest(optimizer, lr_range_test_step_size=2.5),
    ):
        with pytest.raises(ValueError):
            make()


@pytest.mark.parametrize("drop_last", [True, False])
def test_loader_deals_like_distributed_sampler(drop_last):
    import zerod

    for elements in (50, 2):
        data = list(range(elements))
        for rank in range(3):
            if drop_last and elements == 2:
                with pytest.raises(ValueError, match="2 elements, fewer than one batch of 4"):
                    zerod.Loader(data, 4, rank=rank, world=3, drop_last=True)
                continue
            sampler = torch.utils.data.DistributedSampler(
                data, num_replicas=3, rank=rank, seed=9, drop_last=drop_last
            )
            loader = zerod.Loader(data, 4, rank=rank, world=3, seed=9, drop_last=drop_last)
            for epoch in range(2):
                sampler.set_epoch(epoch)
                expected = list(
                    torch.utils.data.DataLoader(data, 4, sampler=sampler, drop_last=drop_last)
                )
                got = list(loader)
                assert len(got) == len(expected) == len(loader)
                assert all(torch.equal(a, b) for a, b in zip(got, expected))
    with pytest.raises(ValueError, match="empty"):
        zerod.Loader([], 4)
    with pytest.raises(TypeError, match="pass its dataset"):
        zerod.Loader(torch.utils.data.DataLoader(data), 1)


def test_launch_environment():
    from zerod.launch import Launch

    assert Launch.from_environment({}) == Launch()
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2",
    }
    launch = Launch.from_environment(torchrun)
    assert (launch.node_rank, launch.nodes, launch.attempt) == (1, 2, 2)
    deepspeed = {("LOCAL_SIZE" if k == "LOCAL_WORLD_SIZE" else k): v for k, v in torchrun.items()}
    assert Launch.from_environment(deepspeed) == launch
    for change in ({"LOCAL_WORLD_SIZE": "3"}, {"GROUP_RANK": "0"}, {"RANK": "x"}):
        with pytest.raises(ValueError):
            Launch.from_environment(torchrun | change)
    with pytest.raises(ValueError, match="torchrun"):
        Launch.from_environment({"RANK": "0"})


class LossAndMore(nn.Module):
    """As transformers' models: what the loss is made of is an output too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        logits = self.b(hidden)
        loss = logits.square().mean()
        return {"loss": loss, "logits": logits, "hidden": [hidden],
                "halves": self.b(hidden).chunk(2)}


LOSSES = {
    "loss": lambda engine, x: engine(x)["loss"],
    "logits": lambda engine, x: engine(x)["logits"].sum(),
    "half": lambda engine, x: engine(x)["halves"][0].sum(),
    "both": lambda engine, x: (lambda out: out["loss"] + out["logits"].square().sum())(engine(x)),
    "through": lambda engine, x: engine(engine(x)["logits"])["loss"],
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_plain_backward_is_divided_by_the_accumulation_steps(kind, twice, fake):
    norms = []
    for plain in (False, True):
        torch.manual_seed(5)
        engine = start(LossAndMore(), fake, gradient_accumulation_steps=3)
        for micro in range(6):
            loss = LOSSES[kind](engine, torch.full((2, 4), micro + 1.0))
            for retain in (True, False)[1 - twice :]:
                if plain:
                    engine.scale(loss).backward(retain_graph=retain)
                else:
                    engine.backward(loss, retain_graph=retain)
            engine.step()
            if micro % 3 == 2:
                norms.append(engine.get_global_grad_norm())
        engine.destroy()
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-4)


def test_what_autograd_gives_is_not_divided(fake):
    engine = start(LossAndMore(), fake, gradient_accumulation_steps=3)
    x = torch.ones(2, 4, requires_grad=True)
    (given,) = torch.autograd.grad(engine(x)["logits"].sum(), x)
    plain = copy.deepcopy(engine.module)
    (expected,) = torch.autograd.grad(plain(x)["logits"].sum(), x)
    torch.testing.assert_close(given, expected)
    engine.destroy()
