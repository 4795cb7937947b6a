# SPDX-License-Identifier: Apache-2.0
"""What a run logs and writes: the keys of the log and of the monitors."""

import csv
import gc
import logging
import re
import sys
import types

import pytest
import torch

import cluster
import zoo

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1, "warmup_num_steps": 4,
                                                 "warmup_type": "linear"}},
}


@pytest.fixture(autouse=True)
def plain_logger():
    log = logging.getLogger("zerod")
    before = (log.level, list(log.handlers))
    log.setLevel(logging.NOTSET)
    yield
    log.setLevel(before[0])
    log.handlers[:] = before[1]


def train(fake, steps, skip=(), **config):
    import zerod

    engine, *_ = zerod.initialize(model=zoo.Stack(layers=1), config=BASE | config)
    losses = []
    for step in range(steps):
        engine.client.skip_next = step in skip
        for micro_step in range(2):
            loss = engine(zoo.batch(0, 2 * step + micro_step)).square().mean()
            losses.append(engine.backward(loss).item())
            engine.step()
    return engine, losses


def lines(caplog, pattern):
    found = [re.fullmatch(pattern, r.message) for r in caplog.records if r.name == "zerod"]
    return [match for match in found if match]


PROGRESS = (
    r"step=(\d+), skipped=(\d+), lr=\[(.*)\], mom=\[\((.*), (.*)\)\]"
    r"(?:, samples/s=([\d.e+]+))?"
)


def test_steps_per_print(fake, caplog):
    train(fake, 7, skip={1}, steps_per_print=3)
    found = lines(caplog, PROGRESS)
    assert [m.group(1, 2) for m in found] == [("3", "1"), ("6", "1")]
    assert [float(m[3]) for m in found] == [0.25, 1.0]  # of the step that comes next
    assert all(m.group(4, 5) == ("0.9", "0.999") and float(m[6]) > 0 for m in found)


def test_without_throughput_and_without_anything(fake, caplog):
    train(fake, 2, steps_per_print=1, timers={"throughput": {"enabled": False}})
    assert [m[6] for m in lines(caplog, PROGRESS)] == [None, None]
    caplog.clear()
    logging.getLogger("zerod").setLevel(logging.NOTSET)
    engine, _ = train(fake, 2)
    assert not caplog.records and not engine.progress.active


def test_wall_clock_and_memory(fake, caplog):
    times = r"step=(\d+), time \(ms\): forward=([\d.]+), backward=([\d.]+), step=([\d.]+)"
    memory = r"step=\d+, memory \(MiB\): resident=(\d+), of it shared=(\d+), peak=(\d+), .*=(\d+)"
    train(fake, 4, steps_per_print=2, wall_clock_breakdown=True)
    found = lines(caplog, times)
    assert [m[1] for m in found] == ["2", "4"]
    assert all(float(m[i]) > 0 for m in found for i in (2, 3, 4))
    assert len(lines(caplog, PROGRESS)) == 2
    caplog.clear()
    train(fake, 2, wall_clock_breakdown=True, memory_breakdown=True)  # of every step
    assert len(lines(caplog, times)) == 2 and not lines(caplog, PROGRESS)
    assert all(int(m[3]) >= int(m[1]) > 50 for m in lines(caplog, memory))
    assert len(lines(caplog, memory)) == 2
    assert len(lines(caplog, r"after initialize: memory .*")) == 1


def test_dump_state(fake, caplog):
    train(fake, 0, dump_state=True)
    dump = [r.message for r in caplog.records if r.message.startswith("the job's state:\n")]
    assert len(dump) == 1
    assert "the double\n" in dump[0] and "\ndump_state = true (default)\n" in dump[0]


def test_log_level_and_the_scripts_own(fake, caplog):
    log = logging.getLogger("zerod")
    train(fake, 1, steps_per_print=1, log_level="warning")
    assert log.level == logging.WARNING and not lines(caplog, PROGRESS)
    log.setLevel(logging.ERROR)
    train(fake, 1, steps_per_print=1)
    assert log.level == logging.ERROR and not lines(caplog, PROGRESS)
    train(fake, 1, log_level="debug")
    assert log.level == logging.DEBUG


def test_csv_monitor(fake, tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    losses = []
    for _ in range(2):  # the second goes on in the same files
        engine, more = train(fake, 3, csv_monitor=section, wall_clock_breakdown=True)
        engine.destroy()
        losses += more

    def rows(name):
        with open(tmp_path / "run" / f"Train_Samples_{name}.csv", encoding="utf-8") as file:
            return list(csv.reader(file))

    assert rows("lr") == [["step", "lr"]] + 2 * [["4", "0.0"], ["8", "0.25"], ["12", "0.5"]]
    assert rows("train_loss")[0] == ["step", "train_loss"]
    assert [float(row[1]) for row in rows("train_loss")[1:]] == pytest.approx(
        [a + b for a, b in zip(losses[::2], losses[1::2])])  # each was divided by two
    for part in ("forward", "backward", "step"):
        assert all(float(row[1]) > 0 for row in rows(f"elapsed_time_ms_{part}")[1:])


@pytest.mark.usefixtures("no_job")
def test_monitors_that_need_a_package(fake, monkeypatch):
    from zerod import monitors

    for name in ("tensorboard", "wandb"):
        monkeypatch.setattr(monitors.importlib.util, "find_spec", lambda package: None)
        with pytest.raises(ValueError, match=f"{name}.enabled needs the Python package {name}"):
            train(fake, 0, **{name: {"enabled": True}})


class Recorder:
    """Stands for wandb's run and for TensorBoard's writer."""

    def __init__(self, **options):
        self.options, self.values, self.closed = options, [], False

    def log(self, values, step):
        self.values.append((step, values))

    def add_scalar(self, name, value, step):
        self.values.append((step, {name: value}))

    def flush(self):
        pass

    def close(self):
        self.closed = True

    finish = close


def test_wandb_and_tensorboard_are_fed(fake, monkeypatch):
    made = []

    def make(**options):
        made.append(Recorder(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=make, __spec__=object()))
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=make)
    )
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace(__spec__=object()))
    engine, _ = train(
        fake, 2, wandb={"enabled": True, "group": "g", "team": "t", "project": "p"},
        tensorboard={"enabled": True, "output_path": "logs", "job_name": "run"},
    )
    engine.destroy()
    board, wandb = made
    assert board.options == {"log_dir": "logs/run"}
    assert wandb.options == {"project": "p", "group": "g", "entity": "t"}
    assert [step for step, _ in wandb.values] == [4, 8]
    assert wandb.values[1][1]["Train/Samples/lr"] == 0.25
    assert len(board.values) == 4 and board.closed and wandb.closed


def test_the_garbage_collector_rests_until_the_last_engine_is_gone(fake):
    gc.enable()
    engines = [train(fake, 0, disable_python_gc=True, zerod={"job": f"gc-{i}"})[0]
               for i in range(2)]
    assert not gc.isenabled()
    engines[0].destroy()
    engines[0].destroy()
    assert not gc.isenabled()
    engines[1].destroy()
    assert gc.isenabled()


def test_the_loaders_last_batch(fake):
    import zerod

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return torch.full((zoo.WIDTH,), float(i))

    for drop_last, sizes in ((False, [2, 2, 2, 1]), (True, [2, 2, 2])):
        _, _, loader, _ = zerod.initialize(
            model=zoo.Stack(), training_data=Rows(),
            config=BASE | {"dataloader_drop_last": drop_last},
        )
        assert [len(batch) for batch in loader] == sizes


FP16_SCRIPT = """
import torch, zerod, sys
engine, *_ = zerod.initialize(model=torch.nn.Linear(4, 1).half(), config={
    "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"},
    "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1},
    "csv_monitor": {"enabled": True, "output_path": "FOLDER", "job_name": "run"}})
for step in range(4):
    x = torch.full((2, 4), float("inf") if step == 1 else 1.0, dtype=torch.half)
    engine.backward(engine(x).float().sum())
    engine.step()
assert engine.skipped_steps == 1
"""


def test_the_loss_scale_is_written(tmp_path):
    with cluster.daemons(1) as nodes:
        source = FP16_SCRIPT.replace("FOLDER", str(tmp_path))
        cluster.run("workers:run_script", nodes, 1, source=source)
    path = tmp_path / "run" / "Train_Samples_loss_scale.csv"
    with open(path, encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [
            ["2", "16.0"], ["4", "8.0"], ["6", "8.0"], ["8", "8.0"]]


SCRIPT = """
import logging
import torch, zerod, zoo, sys
model = zoo.Stack(layers=1)
engine, *_ = zerod.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 2, "steps_per_print": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}})
for step in range(6):
    engine.backward(engine(zoo.batch(0, step)).square().mean())
    engine.step()
    if step == 3:
        logging.basicConfig(format="root: %(message)s", stream=sys.stdout)
"""


def test_lines_are_visible_by_default_of_rank_0_alone():
    with cluster.daemons(1) as nodes:
        with cluster.ranks("workers:run_script", nodes, 2, source=SCRIPT) as running:
            cluster.wait_all(running)
            texts = [rank.text() for rank in running]
    shown = [line for line in texts[0].splitlines() if "skipped=" in line]
    assert [re.search(r"step=(\d+)", line)[1] for line in shown] == ["2", "4", "6"]
    assert "[INFO] step=2, skipped=0, lr=[0.5], mom=[[0.9, 0.999]]" in shown[0].replace(
        "(0.9, 0.999)", "[0.9, 0.999]")
    assert shown[2].startswith("root: step=6")  # the script's own handler, once
    assert "skipped=" not in texts[1]
