# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the tests do; run by rank_main.py in processes of their own."""

import json
import os
import re
import time
import urllib.request

import torch

import train_gpt
import zoo
import zoo_captured  # noqa: F401  its cases

TINY = ["--layers", "3", "--width", "64", "--heads", "2", "--sequence", "32", "--batch", "2",
        "--evaluation-batches", "2", "--warmup", "4"]


def rank_and_world() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gpt(runs: list[list[str]]) -> list[dict]:
    """The example, once for each list of arguments, one job after the other."""
    from zerod import collectives

    results = []
    for arguments in runs:
        results.append(train_gpt.train(train_gpt.parse_arguments(TINY + arguments)))
        results[-1]["counters"] = counters()
        results[-1]["plan"] = collectives.current().client.plan_text
        collectives.current().destroy()
    return results


def gpt_ddp(runs: list[list[str]]) -> list[dict]:
    import torch.distributed as dist

    import train_gpt_ddp

    dist.init_process_group("gloo")
    results = []
    for arguments in runs:
        results.append(train_gpt_ddp.train(train_gpt.parse_arguments(TINY + arguments)))
    dist.destroy_process_group()
    return results


TRAFFIC = ("gathered", "scattered", "sent", "received")
MEMORY = ("parameters", "copies", "gradients", "moments", "window", "accumulator",
          "client_gradients", "staging", "scratch", "set_aside", "control")


def measured(config: dict, metrics: list[str], steps: int, settle: bool) -> dict:
    """What each node's daemon counts while the example trains: its memory, and the traffic of a
    step. `settle`: the counters are read when all units were gathered, so nothing is under way."""
    import cluster
    import zerod

    args = train_gpt.parse_arguments([])
    torch.manual_seed(1)
    engine, *_ = zerod.initialize(model=train_gpt.GPT(args), config=config)
    window = torch.arange(args.sequence + 1).view(1, -1) % 256
    job = config["zerod"]["job"]

    def sample() -> list[dict[str, float]]:
        if settle:
            with torch.no_grad():
                engine(window)
        zerod.barrier()
        counted = [
            {kind: cluster.metric(node, f"zerod_{kind}_bytes_total", job=job) for kind in TRAFFIC}
            for node in metrics
        ]
        zerod.barrier()
        return counted

    def train(count: int) -> None:
        for _ in range(count * config.get("gradient_accumulation_steps", 1)):
            engine.backward(engine(window))
            engine.step()

    train(2)
    before = sample()
    train(steps)
    after = sample()
    memory = [
        {kind: cluster.metric(node, "zerod_memory_bytes", job=job, kind=kind) for kind in MEMORY}
        for node in metrics
    ]
    zerod.barrier()
    engine.destroy()
    traffic = [
        {kind: (a[kind] - b[kind]) / steps for kind in TRAFFIC} for a, b in zip(after, before)
    ]
    return {"memory": memory, "traffic": traffic}


def counters() -> dict[str, float]:
    from zerod import collectives

    values = collectives.current().client.counters()
    return {
        name: getattr(values, name)
        for name in ("gathers", "gather_hits", "gather_waits", "remaps", "scatter_bytes")
    }


def run_zoo(names: list[str], stages: list[int], steps: int, config: dict) -> dict:
    """{(name, stage): (losses, weights)} of every case."""
    rank, world = rank_and_world()
    results = {}
    for name in names:
        for stage in stages:
            torch.manual_seed(7)
            if name == "compiled":
                torch._dynamo.reset()
            model, train = zoo.CASES[name](rank, world)
            zero = {"stage": stage, **config.get("zero_optimization", {})} if stage == 3 else {
                "stage": stage
            }
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
                **config,
                "zero_optimization": zero,
                "zerod": {**config.get("zerod", {}), "job": f"zoo-{name}-{stage}"},
            }
            try:
                engine = with_smallest_window(model, settings)
                torch.manual_seed(8 + rank)
                losses = []
                for step in range(steps):
                    losses.append(train(engine, step))
                    engine.step()
                results[name, stage] = (losses, engine.state_dict())
                engine.destroy()
            except BaseException:
                print(f"in the case {name} at stage {stage}", flush=True)
                raise
    return results


def with_smallest_window(model, settings: dict):
    """An engine whose window is the smallest that is not refused: the refusal names it."""
    import zerod

    try:
        return zerod.initialize(model=model, config=settings)[0]
    except zerod.FailedPrecondition as error:
        # Or another rank has found it already.
        found = re.search(r"stage3_max_live_parameters (?:to at least|is) (\d+)", str(error))
        if not found:
            raise
        settings["zero_optimization"]["stage3_max_live_parameters"] = int(found.group(1))
        return zerod.initialize(model=model, config=settings)[0]


def train_and_report(steps: int, progress: str, config: dict, dropout: bool = True) -> dict:
    """Trains a small model; a line of JSON for each step, of every rank; resumes by itself."""
    import zerod

    rank, world = rank_and_world()
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        zoo.Block(), torch.nn.Dropout(0.2 if dropout else 0.0), zoo.Block(),
        torch.nn.BatchNorm1d(zoo.WIDTH), zoo.Block(),
    )
    torch.manual_seed(100 + rank)
    engine, _, loader, _ = zerod.initialize(model=model, training_data=Rows(), config=config)
    losses = engine.client_state.setdefault("losses", [])
    while engine.global_steps < steps:
        for batch in loader:
            loss = engine(batch).square().mean()
            engine.backward(loss)
            losses.append(loss.item())
            engine.step()
            with open(f"{progress}.{rank}", "a", encoding="utf-8") as file:
                line = {"step": engine.global_steps, "time": time.time(), "pid": os.getpid()}
                file.write(json.dumps(line) + "\n")
            if engine.global_steps == steps:
                break
    buffers = {name: b.clone() for name, b in engine.module.named_buffers()}
    return {"losses": losses, "state": engine.state_dict(), "buffers": buffers,
            "resumed": engine.resumed_step}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(zoo.WIDTH, generator=torch.Generator().manual_seed(index))


def unused_parameters(config: dict, leave_out: bool = False) -> tuple[list[str], int, dict]:
    """Three steps; in the second, unless it is left out, no rank uses all parameters. The errors,
    the number of the last step, and the weights."""
    import zerod

    rank, _ = rank_and_world()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.by_one, self.never = (
                torch.nn.Linear(zoo.WIDTH, zoo.WIDTH) for _ in range(3)
            )

        def forward(self, x: torch.Tensor, everything: bool) -> torch.Tensor:
            x = self.always(x)
            if rank == 1:
                x = self.by_one(x)
            return self.never(x) if everything else x

    torch.manual_seed(4)
    engine, *_ = zerod.initialize(model=Model(), config=config)
    errors = []
    for step, everything in enumerate((True, False, True)):
        if leave_out and not everything:
            continue
        engine.backward(engine(zoo.batch(rank, step), everything).square().mean())
        try:
            engine.step()
        except zerod.FailedPrecondition as error:
            errors.append(str(error))
    state = engine.state_dict()
    engine.destroy()
    return errors, engine.global_steps, state


def attach_one(model: str, config: dict, world: int | None = None) -> str:
    """The error of an attach, or 'attached'."""
    import zerod

    if world is not None:
        os.environ["WORLD_SIZE"] = str(world)
    torch.manual_seed(1)
    try:
        engine, *_ = zerod.initialize(model=zoo.CASES[model](0, 1)[0], config=config)
    except zerod.ZerodError as error:
        return f"{error.code}: {error}"
    engine.backward(engine(zoo.batch(0, 0)).square().mean())
    engine.step()
    return "attached"


def write_outside(config: dict) -> None:
    """A user's in-place write: the memory is read-only."""
    import zerod

    engine, *_ = zerod.initialize(model=zoo.Stack(), config=config)
    with torch.no_grad():
        engine.module.head.weight.zero_()
    raise AssertionError("the write went through")


def read_released(config: dict) -> None:
    """A read of a parameter that is not gathered."""
    import zerod

    engine, *_ = zerod.initialize(model=zoo.Stack(), config=config)
    print(engine.module.layers[0].inner.weight.sum())
    raise AssertionError("the read went through")


def many_jobs(count: int, first: int, config: dict) -> None:
    """Jobs that end in every way a living process can end them."""
    import zerod
    from zerod import at_exit

    for i in range(first, first + count):
        settings = config | {"zerod": {**config["zerod"], "job": f"many-{i}"}}
        engine, *_ = zerod.initialize(model=zoo.Stack(), config=settings)
        loss = engine(zoo.batch(0, i)).square().mean()
        if i % 3:
            engine.backward(loss)
        if i % 3 == 2:
            engine.step()
        if i % 2:
            engine.destroy()
        else:
            engine.client.close()
            at_exit.forget(engine)


def dying_jobs(count: int, first: int, config: dict) -> list[int]:
    """One job after the other in a child of its own that dies by a signal at some instant.

    Returns what each died of. Half of them die at a place of the step, half anywhere from before
    the connection on: their timer's signal is left at its default action.
    """
    import random
    import signal

    import zerod

    def live(i: int) -> None:
        if i % 2:
            signal.setitimer(signal.ITIMER_REAL, random.Random(i).uniform(0.001, 0.1))
        settings = config | {"zerod": {**config["zerod"], "job": f"dying-{i}"}}
        engine, *_ = zerod.initialize(model=zoo.Stack(), config=settings)
        fatal = signal.SIGABRT if i % 3 == 0 else signal.SIGKILL
        places = ("forward", "backward", "between", "stepped")
        place = places[i // 2 % len(places)] if i % 2 == 0 else "never"

        def die(*_: object) -> None:
            os.kill(os.getpid(), fatal)

        if place == "forward":
            engine.module.head.register_forward_hook(die)
        if place == "backward":
            engine.module.head.register_full_backward_hook(die)
        for step in range(10**6):
            engine.backward(engine(zoo.batch(0, step)).square().mean())
            if place == "between":
                die()
            engine.step()
            if place == "stepped":
                die()

    ends = []
    for i in range(first, first + count):
        child = os.fork()
        if child == 0:
            try:
                live(i)
            finally:
                os._exit(1)
        ends.append(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return ends


def run_script(source: str) -> None:
    exec(compile(source, "script", "exec"), {"__name__": "__main__"})


class ReadsWeights(torch.utils.data.Dataset):
    def __init__(self, weight) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.weight.detach().sum() + index


def forked_workers(config: dict) -> list[float]:
    """DataLoader workers that read parameters; training goes on beside and after them."""
    import zerod

    torch.manual_seed(1)
    engine, *_ = zerod.initialize(model=zoo.Stack(), config=config)
    expected = [engine.module.head.weight.sum().item() + i for i in range(4)]
    loader = torch.utils.data.DataLoader(ReadsWeights(engine.module.head.weight), num_workers=2)
    got = [value.item() for value in loader]
    for step in range(2):
        engine.backward(engine(zoo.batch(0, step)).sum())
        engine.step()
    child = os.fork()
    if child == 0:
        try:
            engine(zoo.batch(0, 0))
            os._exit(7 if engine.client.closed else 3)
        except zerod.ZerodError:
            os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (3, 5)
    engine.backward(engine(zoo.batch(0, 9)).sum())
    engine.step()
    return [max(abs(a - b) for a, b in zip(got, expected)), engine.global_steps]


class OneLayer(torch.nn.Module):
    def __init__(self, hidden_size: int = 4) -> None:
        super().__init__()
        self.config = {"hidden_size": hidden_size}
        self.layer = torch.nn.Linear(hidden_size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def schedules(cases: dict[str, tuple[str, dict, int]]) -> dict:
    """{name: (rates, weights, weights of PyTorch's AdamW with the same rates and betas)}."""
    import zerod

    results = {}
    for name, (kind, params, steps) in cases.items():
        torch.manual_seed(1)
        model = OneLayer()
        plain = OneLayer()
        plain.load_state_dict(model.state_dict())
        theirs = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
        engine, *_ = zerod.initialize(model=model, config={
            "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.0}},
            "scheduler": {"type": kind, "params": params},
            "zerod": {"job": "schedule-" + name.replace(" ", "-")},
        })
        rates = []
        for step in range(steps):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            rates.append(engine.get_lr()[0])
            theirs.param_groups[0].update(lr=rates[-1], betas=engine.get_mom()[0])
            engine.backward(engine(x).sum())
            engine.step()
            plain(x).sum().backward()
            theirs.step()
            theirs.zero_grad()
        results[name] = (rates, engine.state_dict(), plain.state_dict())
        engine.destroy()
    return results


def schedule_with_restarts(kind: str, params: dict, steps: int) -> list[float]:
    """The rates of the steps, each taken by an engine of its own."""
    import zerod
    from zerod import at_exit

    rates = []
    for step in range(steps):
        engine, *_ = zerod.initialize(model=OneLayer(), config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},
            "scheduler": {"type": kind, "params": params},
            "zerod": {"job": "restarts"},
        })
        assert engine.global_steps == step
        rates.append(engine.get_lr()[0])
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
        engine.client.close()
        at_exit.forget(engine)
    return rates


def resolve(texts: list[str], **options) -> list:
    """What the real parser makes of each: the configuration, or its error's text."""
    from zerod import config

    answers = []
    for text in texts:
        try:
            answers.append(config.resolve(text, 1, **options).config)
        except ValueError as error:
            answers.append(str(error))
    return answers


def initialized(config: dict, hidden_size: int = 4) -> dict:
    """What an engine and its daemon have of a configuration; or the error's text."""
    import zerod

    try:
        engine, *_ = zerod.initialize(model=OneLayer(hidden_size), config=config)
    except ValueError as error:
        return {"error": str(error)}
    engine.backward(engine(torch.ones(2, hidden_size)).sum())
    engine.step()
    return {"engine": engine.config, "daemon": json.loads(engine.client.resolved_config)}


def train_small(runs: dict[str, dict], metrics: list[str]) -> dict[str, dict]:
    """`train_one` for each, one job after the other; an error is a result too."""
    import zerod

    results = {}
    for name, run in runs.items():
        run["config"] = {**run["config"], "zerod": {"job": name}}
        try:
            results[name] = train_one(metrics[int(os.environ["GROUP_RANK"])], **run)
        except (zerod.ZerodError, RuntimeError) as error:
            results[name] = {"error": str(error)}
            zerod.collectives.current().destroy()
    return results


def train_one(metrics: str, config: dict, steps: int = 6, optimizer: tuple | None = None,
              bad_steps: tuple[int, ...] = (), plain_backward: bool = False) -> dict:
    """Trains a small model, every rank on its own rows. `optimizer`: class of torch.optim and its
    arguments. At `bad_steps` (from 1) the last rank's loss is infinite."""
    import zerod

    rank, world = rank_and_world()
    torch.manual_seed(5)
    model = small_model()
    groups = groups_of(model)
    built = getattr(torch.optim, optimizer[0])(groups, **optimizer[1]) if optimizer else None
    engine, built, _, _ = zerod.initialize(
        model=model, optimizer=built, model_parameters=None if optimizer else groups, config=config
    )
    dtype = next(engine.module.parameters()).dtype
    result: dict = {"losses": [], "norms": [], "scales": [], "skipped": [], "rates": [],
                    "overflow": [], "sent": []}
    for step in range(1, steps + 1):
        result["scales"].append(built.loss_scale)
        result["rates"].append(engine.get_lr()[0])
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = small_batch(step, micro, rank)
            x = x if engine.config["fp16"]["auto_cast"] else x.to(dtype)
            loss = (engine(x).float() - y).square().mean()
            if plain_backward:
                loss.backward()
            if step in (1, steps):
                zerod.barrier()  # all have gathered what this step needs, and reduced nothing of it
                result["sent"].append(sent_bytes(metrics, config["zerod"]["job"]))
            result["losses"].append(loss.item())
            bad = rank == world - 1 and step in bad_steps
            engine.backward(loss * float("inf") if bad else loss)
            engine.step()
        result["norms"].append(engine.get_global_grad_norm())
        result["skipped"].append(engine.skipped_steps)
        result["overflow"].append(built.overflow)
    result["state"] = engine.state_dict(master=True)
    result["global_steps"] = engine.global_steps
    engine.destroy()
    return result


def sent_bytes(address: str, job: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(rf'^zerod_sent_bytes_total{{job="{job}"}} (\S+)$', text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.LayerNorm(32),
        torch.nn.Linear(32, 4),
    )


def groups_of(model: torch.nn.Module) -> list[dict]:
    """Two, with weight decay of their own."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def small_batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(8, 16, generator=generator)
    return x, x[:, :4].sin()
