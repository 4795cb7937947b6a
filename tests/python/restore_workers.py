# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_restore.py do."""

import torch

import workers


def read_everything(engine) -> dict:
    """What a checkpoint is made of, on this rank alone."""
    kept: dict = {"steps": engine.client.optimizer_steps(), "scaler": engine.client.loss_scaler()}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        kept[kind] = [engine.weights.read(p, kind) for p in engine.description.parameters]
    return kept


def train_steps(engine, first: int, last: int) -> dict:
    """Losses and loss scales of the steps [first, last]. In fp16 the last rank's loss of steps 2
    and 5 is infinite."""
    rank, world = workers.rank_and_world()
    dtype = next(engine.module.parameters()).dtype
    result: dict = {"losses": [], "scales": []}
    for step in range(first, last + 1):
        result["scales"].append(engine.client.loss_scale)
        x, y = workers.small_batch(step, 0, rank)
        loss = (engine(x.to(dtype)).float() - y).square().mean()
        result["losses"].append(loss.item())
        bad = engine.fp16_enabled() and rank == world - 1 and step in (2, 5)
        engine.backward(loss * float("inf") if bad else loss)
        engine.step()
    return result


def start_small(config: dict, seed: int = 5):
    import zerod

    torch.manual_seed(seed)
    model = workers.small_model()
    engine, *_ = zerod.initialize(
        model=model, model_parameters=workers.groups_of(model), config=config
    )
    return engine


def train_and_read(runs: list[dict]) -> list[dict]:
    """Six steps of each job, one job after the other; everything is read after the third and at the
    end."""
    results = []
    for config in runs:
        engine = start_small(config)
        result = train_steps(engine, 1, 3)
        result["kept"] = read_everything(engine)
        engine.client.barrier()
        for name, values in train_steps(engine, 4, 6).items():
            result[name] += values
        result["end"] = read_everything(engine)
        engine.client.barrier()
        engine.destroy()
        results.append(result)
    return results


def restore_and_train(config: dict, kept: dict) -> dict:
    """Steps 4 to 6 of what was read elsewhere; the last rank puts it back."""
    rank, world = workers.rank_and_world()
    engine = start_small(config, seed=6)
    engine.gathering.reset()
    engine.client.barrier()
    if rank == world - 1:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for managed, values in zip(engine.description.parameters, kept[kind]):
                engine.weights.put(managed, values, kind)
    engine.client.restore(kept["steps"], kept["scaler"])
    engine.versions.bump(all_parameters=True)
    result = train_steps(engine, 4, 6) | read_everything(engine)
    engine.client.barrier()
    engine.destroy()
    return result


def refused_restores(config: dict) -> dict[str, str]:
    """What each wrong call is answered with; then a right one, and a step."""
    import zerod

    rank, _ = workers.rank_and_world()
    engine = start_small(config)
    client = engine.client
    steps, scaler = client.optimizer_steps(), client.loss_scaler()
    errors = {}

    def refused(name: str, call) -> None:
        try:
            call()
        except zerod.InvalidArgument as error:
            errors[name] = str(error)
        assert name in errors, name

    refused("different", lambda: client.restore([rank] * len(steps), scaler))
    refused("barrier", lambda: client.restore(steps) if rank == 0 else client.barrier())
    refused("length", lambda: client.restore(steps[1:]))
    refused("key", lambda: client.restore(steps, {"cur_scale": 2.0}))
    refused("scale", lambda: client.restore(steps, scaler | {"cur_scale": -1.0}))
    value = torch.zeros(4)
    refused("kind", lambda: client.put(0, 0, value.data_ptr(), 1, "momentum"))
    elements = client.units[0].trainable_elements
    refused("range", lambda: client.put(0, elements - 1, value.data_ptr(), 2, "exp_avg"))
    client.restore(steps, scaler)
    assert client.optimizer_steps() == steps and client.loss_scaler() == scaler
    train_steps(engine, 1, 1)
    client.barrier()
    engine.destroy()
    return errors


class Branches(torch.nn.Module):
    """`own` is used by rank 1 alone, `idle` by nobody; `frozen` is not trained."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.first = torch.nn.Linear(16, 32)
        self.own = torch.nn.Linear(32, 32)
        self.idle = torch.nn.Linear(3, 3)
        self.frozen = torch.nn.Linear(32, 32)
        self.frozen.requires_grad_(False)
        self.last = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.first(x).tanh())
        if self.rank == 1:
            x = self.own(x).tanh()
        return self.last(x)


def plain_gradients(micro_steps: int, world: int) -> dict[str, torch.Tensor]:
    """Of the first step of `Branches`: the mean over all ranks, as plain torch computes it."""
    torch.manual_seed(5)
    model = Branches(0)
    for micro in range(micro_steps):
        for model.rank in range(world):
            x, y = workers.small_batch(1, micro, model.rank)
            ((model(x) - y).square().mean() / (world * micro_steps)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fragments(config: dict) -> dict:
    """One step of two micro-steps, with all that zerod.fragments can do between them."""
    import zerod
    from zerod import fragments as f

    rank, world = workers.rank_and_world()
    torch.manual_seed(5)
    engine, *_ = zerod.initialize(model=Branches(rank), config=config)
    names = dict(engine.module.named_parameters())
    result: dict = {"gradients": [], "scale": engine.client.loss_scale}
    initial = engine.state_dict(master=True)
    for name, parameter in names.items():
        assert torch.equal(f.safe_get_full_fp32_param(parameter), initial[name]), name
    for micro in range(2):
        x, y = workers.small_batch(1, micro, rank)
        loss = (engine(x.to(names["first.weight"].dtype)).float() - y).square().mean()
        engine.backward(loss)
        gradients = {name: f.safe_get_full_grad(p) for name, p in names.items()}
        again = f.safe_get_full_grad(names["first.weight"])
        assert torch.equal(again, gradients["first.weight"])
        result["gradients"].append(gradients)
        if micro == 0:
            engine.step()
    # Whose weights are written after the backward pass: the step updates the new ones.
    value = torch.full_like(initial["idle.weight"], float(rank + 1))
    f.safe_set_full_fp32_param(names["idle.weight"], value)
    engine.step()
    result["idle"] = f.safe_get_full_fp32_param(names["idle.weight"])
    assert torch.equal(engine.state_dict(master=True)["idle.weight"], result["idle"])
    result["norm"] = engine.get_global_grad_norm()
    result["state"] = {
        key: f.safe_get_full_optimizer_state(names["own.weight"], key)
        for key in ("exp_avg", "exp_avg_sq")
    }
    result["steps"] = dict(zip(names, engine.client.optimizer_steps()))
    halves = torch.full((32, 32), 0.5)
    f.safe_set_full_optimizer_state(names["own.weight"], halves * (rank + 1), "exp_avg_sq")
    assert torch.equal(f.safe_get_full_optimizer_state(names["own.weight"], "exp_avg_sq"), halves)
    assert torch.equal(f.safe_get_full_optimizer_state(names["own.weight"], "exp_avg"),
                       result["state"]["exp_avg"])
    result["errors"] = refused_fragments(names)
    engine.client.barrier()
    engine.destroy()
    assert f.safe_get_full_fp32_param(names["last.bias"]) is None
    return result


def set_gradients(config: dict) -> dict:
    """A step whose gradients the script makes, between its micro-steps and after them."""
    import zerod
    from zerod import fragments as f

    rank, world = workers.rank_and_world()
    torch.manual_seed(5)
    engine, *_ = zerod.initialize(model=Branches(rank), config=config)
    names = dict(engine.module.named_parameters())
    dtype = names["first.weight"].dtype

    def backward(micro):
        x, y = workers.small_batch(1, micro, rank)
        engine.backward((engine(x.to(dtype)).float() - y).square().mean())

    def same(get, set_, name, value):
        set_(names[name], value * (rank + 1) if "full" in set_.__name__ else value)
        got = get(names[name])
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0)

    def part(name):
        size = -(-names[name].numel() // world)
        return torch.arange(rank * size, rank * size + size) / 1000 + 1

    backward(0)
    f.safe_set_full_grad(names["first.bias"], torch.full_like(
        names["first.bias"], 0.0, dtype=torch.float32))
    engine.step()
    backward(1)
    late = f.safe_get_full_grad(names["first.bias"])  # of the second micro-step alone
    ones = torch.ones(32, 32)
    same(f.safe_get_full_grad, f.safe_set_full_grad, "own.weight", 2 * ones)
    same(f.safe_get_full_grad, f.safe_set_full_grad, "idle.weight", torch.ones(3, 3) / 4)
    f.safe_update_full_grad_vectorized(
        [names["own.weight"], names["frozen.weight"]], lambda g, p: g / 4)
    same(f.safe_get_local_grad, f.safe_set_local_grad, "last.bias", part("last.bias"))
    gradients = {name: f.safe_get_full_grad(p) for name, p in names.items()}
    engine.step()
    result = {"late": late, "gradients": gradients, "norm": engine.get_global_grad_norm(),
              "steps": dict(zip(names, engine.client.optimizer_steps()))}
    result["exp_avg"] = {
        name: f.safe_get_full_optimizer_state(names[name], "exp_avg")
        for name, g in gradients.items() if g is not None
    }
    same(f.safe_get_local_fp32_param, f.safe_set_local_fp32_param, "last.bias", part("last.bias"))
    whole = f.safe_get_full_fp32_param(names["last.bias"])
    assert torch.equal(whole, torch.arange(whole.numel()) / 1000 + 1)
    with zerod.GatheredParameters([names["last.bias"]]):
        assert torch.equal(names["last.bias"].detach(), whole.to(dtype))
    same(lambda p: f.safe_get_local_optimizer_state(p, "exp_avg_sq"),
         lambda p, v: f.safe_set_local_optimizer_state(p, v, "exp_avg_sq"),
         "own.weight", part("own.weight"))
    assert f.safe_get_local_grad(names["frozen.weight"]) is None
    torch.set_default_dtype(torch.float64)
    assert torch.equal(f.safe_get_local_fp32_param(names["last.bias"]), part("last.bias").float())
    torch.set_default_dtype(torch.float32)
    result["errors"] = []
    for call in (lambda: f.safe_set_full_grad(names["own.weight"], torch.zeros(3)),
                 lambda: f.safe_set_local_grad(names["own.weight"], torch.zeros(3)),
                 lambda: f.safe_set_full_grad(names["frozen.bias"], torch.zeros(32))):
        try:
            call()
        except ValueError as error:
            result["errors"].append(str(error))
    result["refused"] = refuse_step(engine, names["own.weight"], backward)
    engine.client.barrier()
    engine.destroy()
    return result


def refuse_step(engine, parameter, backward) -> str:
    """What step() says where ranks disagree. Nothing of its gradients is left."""
    from zerod import fragments as f

    group = engine.optimizer.param_groups[0]
    lr, group["lr"] = group["lr"], 0.1 * (1 + engine.global_rank)
    for micro in range(engine.gradient_accumulation_steps()):
        backward(micro)
        if micro == 0:
            engine.step()
    try:
        engine.step()
        message = ""
    except RuntimeError as error:
        message = str(error)
    group["lr"] = lr
    assert f.safe_get_full_grad(parameter) is None
    f.safe_set_full_grad(parameter, torch.ones(32, 32))
    assert torch.equal(f.safe_get_full_grad(parameter), torch.ones(32, 32))
    return message


def refused_fragments(names: dict[str, torch.nn.Parameter]) -> list[str]:
    from zerod import fragments as f

    assert f.safe_get_full_optimizer_state(names["frozen.weight"], "exp_avg") is None
    assert f.safe_get_full_grad(names["frozen.weight"]) is None
    assert f.safe_get_full_grad(torch.nn.Parameter(torch.zeros(3))) is None
    errors = []
    for call in (
        lambda: f.safe_get_full_optimizer_state(names["own.weight"], "momentum_buffer"),
        lambda: f.safe_set_full_fp32_param(names["own.weight"], torch.zeros(3)),
        lambda: f.safe_set_full_fp32_param(torch.zeros(3), torch.zeros(3)),
        lambda: f.safe_set_full_optimizer_state(names["frozen.bias"], torch.zeros(32), "exp_avg"),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    return errors
