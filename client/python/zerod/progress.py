# SPDX-License-Identifier: Apache-2.0
"""What a training run says of itself: rank 0's lines in the log, and the monitors' values.

The keys `steps_per_print`, `wall_clock_breakdown`, `memory_breakdown`, `dump_state`, `log_level`,
`timers.throughput` and those of monitors.py. Nothing is measured where nobody asked.
"""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from zerod import monitors
from zerod.config import Resolved

log = logging.getLogger("zerod")
PARTS = ("forward", "backward", "step")
_handler: logging.Handler | None = None


class _UnlessConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stdout until the script configures the root logger: no line comes twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def show_log(config: dict[str, Any]) -> None:
    """Makes lines of level INFO visible where the configuration asks for any, as DeepSpeed does.
    A level that the script has set stays, unless `log_level` is given; so do its handlers."""
    global _handler
    level = config["log_level"]
    asked = level is not None or config["dump_state"] or _interval(config) is not None
    if not asked:
        return
    if level is not None:
        log.setLevel(level.upper())
    elif log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if _handler is None and not log.hasHandlers():
        _handler = _UnlessConfigured(sys.stdout)
        _handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
        log.addHandler(_handler)


def dump(resolved: Resolved, plan: str) -> None:
    """The job's plan and its configuration, every key with its value and where that is from."""
    lines = [plan]
    for path, source in resolved.sources.items():
        value: Any = resolved.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            lines.append(f"{path} = {json.dumps(value)} ({source})")
    log.info("the job's state:\n%s", "\n".join(lines))


def momenta(optimizer: torch.optim.Optimizer | None) -> list[Any]:
    """Of each parameter group: its betas, or its momentum. DeepSpeed's `mom`."""
    groups = optimizer.param_groups if optimizer is not None else []
    return [group["betas"] if "betas" in group else group.get("momentum", 0.0) for group in groups]


def watched(part: str) -> Callable[[Any], Any]:
    """Decorates the engine's method of that name: its time counts, and a step is reported."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
            progress: Progress = engine.progress
            if not progress.active:
                return method(engine, *args, **kwargs)
            steps = engine.global_steps
            began = time.perf_counter()
            result = method(engine, *args, **kwargs)
            progress.add_time(part, began)
            if part == "backward":
                progress.add_loss(args[0] if args else kwargs["loss"])
            if engine.global_steps != steps:
                progress.stepped(engine)
            return result

        return call

    return decorate


class Progress:
    """Sums times and losses between two lines of the log. Of rank 0; the others have none."""

    def __init__(self, config: dict[str, Any], rank: int) -> None:
        self._config = config
        self._interval = _interval(config)
        self._monitors = monitors.open_all(config) if rank == 0 else []
        self.active = rank == 0 and (self._interval is not None or bool(self._monitors))
        self._began: float | None = None  # of the first call since the last line
        self._steps = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._step_seconds = dict.fromkeys(PARTS, 0.0)  # of the step being made
        self._losses: list[torch.Tensor] = []  # of its micro-steps
        if rank == 0 and config["memory_breakdown"]:
            log.info("after initialize: %s", memory())

    def add_time(self, part: str, began: float) -> None:
        if self._began is None:
            self._began = began
        self._step_seconds[part] += time.perf_counter() - began

    def add_loss(self, loss: torch.Tensor) -> None:
        if self._monitors:
            self._losses.append(loss.detach())

    def stepped(self, engine: Any) -> None:
        """The engine has taken a step, applied or skipped."""
        self._steps += 1
        for part in PARTS:
            self._seconds[part] += self._step_seconds[part]
        if self._monitors:
            self._write(engine)
        self._step_seconds = dict.fromkeys(PARTS, 0.0)
        self._losses.clear()
        if self._interval is not None and engine.global_steps % self._interval == 0:
            self._report(engine)

    @property
    def enabled(self) -> bool:
        """This rank has a monitor."""
        return bool(self._monitors)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """DeepSpeed's way of writing to the monitors: (name, value, samples) each."""
        for name, value, samples in events:
            for monitor in self._monitors:
                monitor.write({name: float(value)}, samples)

    def close(self) -> None:
        """Idempotent."""
        self.active = False
        while self._monitors:
            self._monitors.pop().close()

    def _report(self, engine: Any) -> None:
        now = time.perf_counter()
        if self._config["steps_per_print"] is not None:
            text = (
                f"step={engine.global_steps}, skipped={engine.skipped_steps}, "
                f"lr={engine.get_lr()}, mom={momenta(engine.optimizer)}"
            )
            if self._config["timers"]["throughput"]["enabled"] and self._began is not None:
                samples = self._steps * engine.train_batch_size()
                text += f", samples/s={samples / (now - self._began):.4g}"
            log.info("%s", text)
        if self._config["wall_clock_breakdown"]:
            times = (f"{part}={1000 * self._seconds[part] / self._steps:.2f}" for part in PARTS)
            log.info("step=%d, time (ms): %s", engine.global_steps, ", ".join(times))
        if self._config["memory_breakdown"]:
            log.info("step=%d, %s", engine.global_steps, memory())
        self._began = now
        self._steps = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def _write(self, engine: Any) -> None:
        values: dict[str, float] = {}
        if self._losses:
            losses = [loss.item() for loss in self._losses]
            values["Train/Samples/train_loss"] = sum(losses) / len(losses)
        values["Train/Samples/lr"] = engine.get_lr()[0]
        if engine.fp16_enabled():
            values["Train/Samples/loss_scale"] = engine.client.loss_scale
        if self._config["wall_clock_breakdown"]:
            for part in PARTS:
                name = f"Train/Samples/elapsed_time_ms_{part}"
                values[name] = 1000 * self._step_seconds[part]
        for monitor in self._monitors:
            monitor.write(values, engine.global_samples)


def memory() -> str:
    """Of this process and its node, in MiB."""
    own = _kibibytes("/proc/self/status")
    node = _kibibytes("/proc/meminfo")
    shared = own.get("RssShmem", 0) + own.get("RssFile", 0)
    return (
        f"memory (MiB): resident={own.get('VmRSS', 0) >> 10}, of it shared={shared >> 10}, "
        f"peak={own.get('VmHWM', 0) >> 10}, "
        f"available on the node={node.get('MemAvailable', 0) >> 10}"
    )


def _kibibytes(path: str) -> dict[str, int]:
    values = {}
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB":
                values[name] = int(words[0])
    return values


def _interval(config: dict[str, Any]) -> int | None:
    """Every so many steps there is something to log; None: never."""
    breakdown = config["wall_clock_breakdown"] or config["memory_breakdown"]
    every: int | None = config["steps_per_print"]
    return every if every is not None else 1 if breakdown else None
