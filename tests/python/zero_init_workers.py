# SPDX-License-Identifier: Apache-2.0
"""What test_zero_init.py runs in the ranks."""

import copy
import gc
import io
import os
import signal
import time
import types
from pathlib import Path

import torch
from torch import nn

import zerod
from workers import rank_and_world

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.scale = nn.Parameter(torch.empty(width).uniform_())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """An embedding tied to the head, as language models have."""

    def __init__(self, width: int = 64, blocks: int = 3, words: int = 96) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.tokens(words)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x[:-1]), words[1:])


def train(model: nn.Module, config: dict, steps: int = 3) -> tuple[list[float], dict]:
    engine, *_ = zerod.initialize(model=model, config=config)
    rank, _ = rank_and_world()
    partitioned = config["zero_optimization"]["stage"] == 3
    assert all(hasattr(p, "ds_id") == partitioned for p in model.parameters())
    losses = []
    for step in range(steps):
        words = torch.randint(0, 96, (9,), generator=torch.Generator().manual_seed(step * 7 + rank))
        loss = engine(words)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    state = engine.state_dict()
    engine.destroy()
    return losses, state


def born_and_plain(cases: list[tuple[dict, int]]) -> list:
    """[plain, born] of every case; only rank 0's generator counts."""
    rank, _ = rank_and_world()
    results: list = []
    for case, (config, pending_bytes_max) in enumerate(cases):
        results.append([])
        for name in ("plain", "born"):
            torch.manual_seed(5 + rank)
            settings = copy.deepcopy(config) | {"zerod": {"job": f"{name}-{case}"}}
            if name == "plain":
                # A born one is of 16 bits from the constructors on.
                short = {"bf16": torch.bfloat16, "fp16": torch.float16}
                dtypes = [dtype for name, dtype in short.items() if name in settings]
                torch.set_default_dtype(dtypes[0] if dtypes else torch.float32)
                model = Model()
                torch.set_default_dtype(torch.float32)
            else:
                with zerod.zero.Init(
                    config_dict_or_path=settings, pending_bytes_max=pending_bytes_max
                ):
                    model = Model()
                assert arenas() >= 1
                assert model.tokens.weight.shape == (96, 64)
            results[-1].append(train(model, settings))
            assert arenas() == 0
    return results


def arenas() -> int:
    from zerod.nursery import nursery

    return len(nursery.arenas)


def gathered() -> dict:
    """Reads and writes before, across and after initialize()."""
    rank, world = rank_and_world()
    torch.manual_seed(1 + rank)
    with zerod.zero.Init(pending_bytes_max=0):
        model = Model()
        # What has gone to the daemon already can still be changed by the parent.
        with zerod.GatheredParameters(model.tokens.weight, modifier_rank=0):
            nn.init.constant_(model.tokens.weight, 2.0 + rank)
        model.apply(lambda m: nn.init.constant_(m.bias, 3.0 + rank)
                    if getattr(m, "bias", None) is not None else None)
    weight, up = model.tokens.weight, model.blocks[0].up
    status = [weight.ds_status]
    with zerod.GatheredParameters([weight, up.bias, nn.Parameter(torch.ones(1))]):
        status.append(weight.ds_status)
        values = [float(weight.sum()), float(up.bias.sum())]
        with zerod.GatheredParameters(weight):  # the outer one keeps it
            pass
        assert float(weight[0, 0]) == 2.0
    status.append(weight.ds_status)
    last = world - 1
    with zerod.GatheredParameters(list(model.parameters()), modifier_rank=last):
        with torch.no_grad():
            up.weight.fill_(float(rank))
        try:
            with zerod.GatheredParameters(up.weight, modifier_rank=0):
                raise AssertionError("a parameter was gathered for writing twice")
        except RuntimeError as error:
            assert "outer" in str(error)
    try:
        with zerod.GatheredParameters(up.weight, modifier_rank=0):
            up.weight.data.fill_(-1.0)
            raise KeyError
    except KeyError:
        pass
    with zerod.GatheredParameters([]), zerod.GatheredParameters([], modifier_rank=0):
        pass
    with zerod.GatheredParameters(up.weight):
        values.append(float(up.weight.mean()))
    attributes = [weight.ds_id, tuple(weight.ds_shape), weight.ds_numel, weight.ds_persist,
                  hasattr(weight, "ds_tensor")]
    with zerod.zero.Init():
        waiting = nn.Linear(4, 4)
    engine, *_ = zerod.initialize(model=model, config=CONFIG)
    status += [weight.ds_status]
    both = [weight, waiting.weight]
    with zerod.GatheredParameters(both, modifier_rank=0):
        status.append(weight.ds_status)
        waiting.weight.data.fill_(7.0 + rank)
        weight.data[0, 0] = 9.0 + rank
    with zerod.GatheredParameters(both):
        values += [float(weight[0, 0]), float(waiting.weight.mean())]
        status.append(weight.ds_status)
    status.append(weight.ds_status)
    kept_id = weight.ds_id == attributes[0]
    engine.destroy()
    assert not hasattr(weight, "ds_id") and not hasattr(weight, "ds_status")
    return {"values": values, "status": [s.name for s in status], "attributes": attributes,
            "kept_id": kept_id}


def read_outside() -> None:
    with zerod.zero.Init():
        model = nn.Linear(8, 8)
    print("sum", float(model.weight.sum()))


def patches() -> None:
    """torch's classes are as they were, whatever happens inside."""
    def snapshot() -> dict:
        names = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
        constructors = tuple(getattr(torch, name) for name in names)
        found = {torch.Tensor: (*constructors, torch.Tensor.__dict__.get("__new__"))}
        waiting = [nn.Module]
        while waiting:
            cls = waiting.pop()
            found[cls] = (cls.__dict__.get("__init__"), cls.__dict__.get("apply"),
                          cls.__dict__.get("_apply"), cls.__dict__.get("__init_subclass__"))
            waiting += type.__subclasses__(cls)
        return found

    before = snapshot()
    with zerod.zero.Init(pending_bytes_max=0, dtype=torch.float32):
        assert all(snapshot()[cls] != before[cls] for cls in before if cls is torch.Tensor)
        with zerod.zero.Init(enabled=False):
            pass

        class Late(Block):
            def __init__(self) -> None:
                super().__init__(4)
                self.late = nn.Parameter(torch.ones(3))
                self.shown = self.scale.sum()  # the base's __init__ was not the end of this one's

        class Odd(nn.Module, metaclass=type):
            def __init_subclass__(cls, tag: str = "", **options) -> None:
                super().__init_subclass__(**options)
                cls.tag = tag

        class Tagged(Odd, tag="t"):
            pass

        with zerod.zero.Init(dtype=torch.float16):
            late = Late()
        assert Tagged().tag == "t"
        assert late.late.dtype == torch.float32, "the outermost counts"
        assert late.late.ds_status == zerod.ZeroParamStatus.NOT_AVAILABLE
    after = snapshot()
    assert {cls: after[cls] for cls in before} == before
    assert all("initialize" not in str(after[cls][0]) for cls in (Late, Odd, Tagged))
    try:
        with zerod.zero.Init(dtype=torch.float32):
            pending = nn.Linear(3, 3)
            raise KeyError
    except KeyError:
        pass
    assert {cls: snapshot()[cls] for cls in before} == before
    assert not hasattr(pending.weight, "ds_id")
    assert float(pending.weight.abs().sum()) > 0  # a plain parameter again
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")


def types_of_values() -> None:
    """Where the dtype comes from."""
    automatic = {
        "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",
                              "stage3_param_persistence_threshold": "auto"},
    }
    for options, expected in (
        ({}, torch.float32),
        ({"config_dict_or_path": automatic}, torch.bfloat16),
        ({"config": {"fp16": {"enabled": True}}}, torch.float16),
        ({"config": automatic, "dtype": torch.float32, "remote_device": "cpu",
          "pin_memory": True}, torch.float32),
    ):
        with zerod.zero.Init(**options):
            model = nn.BatchNorm1d(5)
        assert model.weight.dtype == expected
        assert model.running_mean.dtype == expected
        assert model.num_batches_tracked.dtype == torch.int64
        with zerod.GatheredParameters(model.weight):
            assert model.weight.tolist() == [1.0] * 5
    with zerod.zero.Init():
        double = nn.Linear(2, 2, dtype=torch.float64)
        half = nn.Linear(2, 2, dtype=torch.bfloat16)
        on_meta = nn.Linear(2, 2, device="meta")
        skipped = nn.utils.skip_init(nn.Linear, 3, 3)
        empty = nn.Linear(0, 3, bias=False)
    assert not hasattr(double.weight, "ds_id") and not hasattr(on_meta.weight, "ds_id")
    assert half.weight.dtype == torch.bfloat16 and hasattr(half.weight, "ds_id")
    assert hasattr(skipped.weight, "ds_id")
    assert empty.weight.shape == (3, 0)
    with zerod.zero.Init(enabled=False, config_dict_or_path={"bf16": {"enabled": True}}):
        assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    torch.manual_seed(2)  # the values of rank 0 are everybody's
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kept = plain[0].weight
    before = kept.detach().clone()
    zerod.zero.Init(module=plain, dtype=torch.bfloat16)
    assert kept is plain[0].weight and kept.dtype == torch.bfloat16
    with zerod.GatheredParameters(kept):
        assert torch.equal(kept, before.bfloat16())


def refusals() -> None:
    import torch.distributed as dist

    def refused(kind: type[Exception], text: str, **options) -> None:
        try:
            zerod.zero.Init(**options)
        except kind as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"{options} was accepted")

    refused(ValueError, "remote_device", remote_device="nvme")
    refused(ValueError, "int8", dtype=torch.int8)
    refused(ValueError, "not both", config={}, config_dict_or_path={})
    refused(ValueError, "zerod.jobs", config={"zerod": {"jobs": "x"}})
    refused(NotImplementedError, "zero_quantized_weights", zero_quantized_weights=True)
    mpu = types.SimpleNamespace(get_data_parallel_world_size=lambda: 5)
    refused(NotImplementedError, "model parallelism", mpu=mpu)
    rank, world = rank_and_world()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if world > 1:
        refused(NotImplementedError, f"1 of the {world} ranks",
                data_parallel_group=dist.group.WORLD)
    else:
        zerod.zero.Init(data_parallel_group=dist.group.WORLD)
    dist.destroy_process_group()


def conversions() -> dict:
    """What a script may do with a born model before initialize()."""
    rank, _ = rank_and_world()
    torch.manual_seed(rank)
    with zerod.zero.Init(pending_bytes_max=4096):
        model = Model()
    kept = model.tokens.weight
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.tokens.weight
    assert not hasattr(twin.head.weight, "ds_id")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    state = model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in twin.state_dict().items()
    }
    with zerod.GatheredParameters(list(model.parameters())):
        copied = {k: v.clone() for k, v in model.state_dict().items()}
    for other in (twin, loaded):
        assert all(torch.equal(v, copied[k]) for k, v in other.state_dict().items())
    try:
        model.load_state_dict(copied)
    except RuntimeError as error:
        assert "'tokens.weight' was born" in str(error), error
    else:
        raise AssertionError("load_state_dict() wrote into memory of the daemon")
    for value in copied.values():
        value.add_(1.0)
    with zerod.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(copied)
    assert model.to("cpu") is model
    model.to(torch.bfloat16)
    assert kept is model.tokens.weight is model.head.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert kept.ds_status == zerod.ZeroParamStatus.NOT_AVAILABLE
    model.float()
    # A replaced parameter, and a module of another origin.
    model.blocks[0].scale = nn.Parameter(torch.full((64,), 0.25))
    gc.collect()
    losses, state = train(model, CONFIG)
    expected = copied["tokens.weight"].bfloat16().float()
    # The first forward is of rank 0's values everywhere, with what was replaced by all.
    twin.load_state_dict({k: v.bfloat16().float() for k, v in copied.items()})
    twin.blocks[0].scale.data.fill_(0.25)
    words = torch.randint(0, 96, (9,), generator=torch.Generator().manual_seed(rank))
    return {"first": losses[0], "expected": float(twin(words).detach()),
            "moved": float((state["tokens.weight"] - expected).abs().max())}


def garbage(metrics: str) -> list[float]:
    """What is never given to initialize() is freed with the model, and at the end of the script."""
    import cluster

    def taken() -> float:
        return sum(
            cluster.metric(metrics, "zerod_memory_bytes", kind=kind) for kind in
            ("parameters", "copies", "window")
        )

    seen = [taken()]
    with zerod.zero.Init(pending_bytes_max=0):
        first = nn.Linear(2048, 2048)
        second = nn.Linear(2048, 4096)
    seen.append(taken())
    with zerod.zero.Init(pending_bytes_max=0):
        third = nn.Linear(2048, 8192, bias=False)  # has no room beside the others
    del first, second
    gc.collect()

    seen.append(arenas())
    assert float(third.weight.ds_numel) == 2048 * 8192
    return seen


def two_models() -> list:
    """Each with an Init of its own; the first is initialized between the two."""
    results = []
    engines = []
    for job in ("one", "two"):
        torch.manual_seed(11)
        with zerod.zero.Init(pending_bytes_max=0):
            model = Model()
        settings = CONFIG | {"zerod": {"job": job}}
        engines.append(zerod.initialize(model=model, config=settings)[0])
    torch.manual_seed(11)
    with zerod.zero.Init():
        models = [Model(), Model(blocks=1)]
    engines += [zerod.initialize(model=m, config=CONFIG | {"zerod": {"job": f"more-{i}"}})[0]
                for i, m in enumerate(models)]
    for engine in engines:
        results.append(engine.state_dict()["tokens.weight"])
        engine.destroy()
    return results


def killed_in_init(marker: str) -> list[float]:
    """The first attempt dies with births behind it, unlike the second's; the third trains."""
    rank, _ = rank_and_world()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(attempt)
    with zerod.zero.Init(pending_bytes_max=0):
        model = Model(blocks=1 + attempt)
        if attempt == 0:
            Path(f"{marker}.{rank}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1:
        big = zerod.zero.Init(module=nn.Linear(4096, 8192))
        del big
    return train(model, CONFIG)[0]


def resumed(steps: int) -> dict:
    """Trains, is killed after some steps where `steps` is not the end, and takes it up."""
    rank, _ = rank_and_world()
    torch.manual_seed(40 + int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    with zerod.zero.Init(config_dict_or_path=CONFIG):
        model = Model()
    engine, *_ = zerod.initialize(model=model, config=CONFIG)
    started = engine.global_steps
    while engine.global_steps < 6:
        words = torch.randint(
            0, 96, (9,), generator=torch.Generator().manual_seed(engine.global_steps * 7 + rank)
        )
        engine.backward(engine(words))
        engine.step()
        if engine.global_steps == steps:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"started": started, "state": engine.state_dict(), "arenas": arenas()}


class Reader(nn.Module):
    """Reads a parameter of another module by its address, past all hooks."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.own = nn.Linear(64, 64)
        self.__dict__["other"] = other.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.own(x), self.other)


def external(born: bool) -> list[str]:
    """The unit of a parameter that another module was said to use, and where it was not."""
    return [_external(born, True), _external(born, False)]


def _external(born: bool, register: bool) -> str:
    with zerod.zero.Init(enabled=born):
        model = nn.Sequential()
        model.around = nn.Module()
        model.around.owner = nn.Linear(64, 64)
        model.around.reader = Reader(model.around.owner)
        model.around.forward = lambda x: model.around.reader(x)
        model.last = nn.Linear(64, 1)
    weight = model.around.owner.weight
    try:
        zerod.register_external_parameter(model.around.reader, weight.detach())
    except RuntimeError as error:
        assert "Parameter" in str(error)
    else:
        raise AssertionError("a tensor was accepted")
    try:
        zerod.unregister_external_parameter(model.around.reader, weight)
    except RuntimeError as error:
        assert "not registered" in str(error)
    else:
        raise AssertionError("it was never registered")
    if register:
        zerod.register_external_parameter(model.around.reader, weight)
    engine, *_ = zerod.initialize(
        model=model, config=CONFIG | {"zerod": {"job": f"external-{register}"}}
    )
    view = engine.client.parameters[
        next(p.index for p in engine.description.parameters if p.parameter is weight)
    ]
    home = engine.client.units[view.unit].name
    if register:
        loss = engine(torch.ones(2, 64)).sum()
        engine.backward(loss)
        engine.step()
    import logging

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("zerod").addHandler(handler)
    zerod.zero.register_external_parameter(model.last, weight)
    zerod.zero.register_external_parameter(model.last, weight)
    assert len(warnings) == 1 and "around.owner.weight" in warnings[0], warnings
    engine.destroy()
    return home


# --- Memory.


def resident_bytes(name: str) -> int:
    """RssAnon: what is this process's alone. VmRSS has shared memory and files too; VmHWM is its
    peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


class Peak:
    """The largest RssAnon of a stretch of work, sampled by a thread every millisecond; and
    the kernel's own peak of all that is resident."""

    def __enter__(self) -> "Peak":
        import threading

        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._resident = resident_bytes("VmRSS")
        self.before = self.bytes = resident_bytes("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, resident_bytes("RssAnon"))

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes("RssAnon"))
        self.resident_more = resident_bytes("VmHWM") - self._resident

    @property
    def more(self) -> int:
        return self.bytes - self.before


def wait_for_no_arenas(address: str) -> None:
    """The daemon frees a job a little after its last rank has left."""
    import urllib.request

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        left = [line for line in lines if line.startswith("zerod_memory_bytes{")
                and ".born." in line and not line.endswith(" 0")]
        if not left:
            return
    raise AssertionError(f"arenas are left: {left}")


def memory(metrics: list[str], blocks: int, width: int) -> dict:
    """Peaks of this rank while the model is built and while it is handed over, and what its daemon
    has before, with the born model, and after."""
    import cluster

    address = metrics[int(os.environ["GROUP_RANK"])]

    def of_daemon() -> float:
        return cluster.metric(address, "zerod_memory_bytes")

    # Allocator and threads are warm.
    with zerod.zero.Init():
        nn.Linear(512, 512)
    daemon = [of_daemon()]
    with Peak() as building:
        with zerod.zero.Init(pending_bytes_max=16 << 20):
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(blocks)))
    daemon.append(of_daemon())
    with Peak() as handing:
        engine, *_ = zerod.initialize(
            model=model,
            config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        )
    zerod.barrier()
    wait_for_no_arenas(address)
    daemon.append(of_daemon())
    zerod.barrier()
    with zerod.GatheredParameters(model[0].weight):
        total = float(model[0].weight.sum())
    model_bytes = sum(p.numel() * 4 for p in model.parameters())
    engine.destroy()
    return {"building": building.more, "handing": handing.more, "daemon": daemon,
            "resident": building.resident_more,
            "model": model_bytes, "sum": total}
