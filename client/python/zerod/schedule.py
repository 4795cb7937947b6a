# SPDX-License-Identifier: Apache-2.0
"""Learning rates that the engine steps once for each applied optimizer step.

DeepSpeed's five schedules with its names, arguments and values. A schedule is made at iteration -1,
which sets the rates of the first optimizer step, and is stepped after each: optimizer step n (from
1) runs at the rates of iteration n - 2. Rates may be one number or one per parameter group.
"""

import logging
import math
from typing import Any

import torch

log = logging.getLogger("zerod")

Rates = float | list[float] | tuple[float, ...]


class Schedule:
    """`rates_at(iteration)` is what a schedule is; the rest is alike in all."""

    def __init__(self, optimizer: torch.optim.Optimizer, last_batch_iteration: int) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration

    def rates_at(self, iteration: int) -> list[float]:
        """The rate of each parameter group after `iteration` + 1 calls of step()."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        return self.rates_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The rates follow with the next step()."""
        self.last_batch_iteration = state["last_batch_iteration"]

    def _begin(self) -> None:
        if self.last_batch_iteration == -1:
            self._apply()

    def _apply(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            if isinstance(group["lr"], torch.Tensor):  # somebody may hold it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _per_group(self, value: Rates, name: str) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [value] * groups
        if len(value) != groups:
            raise ValueError(f"{name} has {len(value)} values for {groups} parameter groups")
        return list(value)


def _positive(value: Any, name: str) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, it is {value!r}")
    return value


class _Warmup(Schedule):
    """From 0 to 1 in `warmup_num_steps`."""

    def _set_warmup(self, steps: Any, kind: str) -> None:
        self.warmup_num_steps = max(2, _positive(steps, "warmup_num_steps"))
        if kind not in ("log", "linear"):
            raise ValueError(f"warmup_type {kind!r} is neither 'log' nor 'linear'")
        self.warmup_type = kind

    def _warmup_at(self, iteration: int) -> float:
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps

    def _warn_of(self, total: int) -> None:
        if total < self.warmup_num_steps:
            log.warning(
                "total_num_steps %d is less than warmup_num_steps %d", total, self.warmup_num_steps
            )


class WarmupLR(_Warmup):
    """From `warmup_min_lr` to `warmup_max_lr` (None: each group's own rate), then constant."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self._set_warmup(warmup_num_steps, warmup_type)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self._per_group(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = self._per_group(warmup_max_lr, "warmup_max_lr")
        self._begin()

    def _share(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        return self._warmup_at(iteration) if iteration < self.warmup_num_steps else 1.0

    def rates_at(self, iteration: int) -> list[float]:
        share = self._share(iteration)
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, and down again to `warmup_min_lr` at `total_num_steps`, in a straight line."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type,
            last_batch_iteration,
        )
        self._warn_of(total_num_steps)

    def _share(self, iteration: int) -> float:
        if iteration < self.warmup_num_steps:
            return super()._share(iteration)
        length = max(1.0, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, (self.total_num_steps - iteration) / length)


class WarmupCosineLR(_Warmup):
    """Each group's own rate times a ratio: from `warmup_min_ratio` up, then along a cosine down to
    `cos_min_ratio` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self._set_warmup(warmup_num_steps, warmup_type)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._warn_of(total_num_steps)
        self._begin()

    def rates_at(self, iteration: int) -> list[float]:
        ratio = self._ratio(iteration)
        return [rate * ratio for rate in self.org_lrs]

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            low = self.warmup_min_ratio
            return low + (1.0 - low) * self._warmup_at(iteration)
        length = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / length)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)


class LRRangeTest(Schedule):
    """Grows from `lr_range_test_min_lr` by `lr_range_test_step_rate` of it per step size."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_range_test_min_lr: Rates = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self._per_group(lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = _positive(lr_range_test_step_size, "lr_range_test_step_size")
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._begin()

    def rates_at(self, iteration: int) -> list[float]:
        interval = (iteration + 1) / self.step_size
        if self.staircase:
            interval = math.floor(interval)
        return [low * (1 + self.step_rate * interval) for low in self.min_lrs]


class OneCycle(Schedule):
    """Up from `cycle_min_lr` to `cycle_max_lr` and back, then decay; the momentum (the first beta)
    the other way round. Stair counts move in so many steps per half. DeepSpeed's second beta is
    0.99 while this schedule has the momentum, whatever was configured."""

    BETA2 = 0.99

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: Rates,
        cycle_max_lr: Rates,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Rates = 0.8,
        cycle_max_mom: Rates = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        if cycle_first_step_size <= 0:
            raise ValueError(
                f"cycle_first_step_size must be positive, it is {cycle_first_step_size}"
            )
        if second < 0:
            raise ValueError(f"cycle_second_step_size must not be negative, it is {second}")
        self.first_step_size, self.second_step_size = float(cycle_first_step_size), float(second)
        self.total_size = self.first_step_size + self.second_step_size
        self.stairs = (
            cycle_first_stair_count,
            cycle_first_stair_count
            if cycle_second_stair_count is None
            else cycle_second_stair_count,
        )
        self.decay_step_size = decay_step_size
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.min_lrs = self._per_group(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._per_group(cycle_max_lr, "cycle_max_lr")
        self.min_moms = self._per_group(cycle_min_mom, "cycle_min_mom")
        self.max_moms = self._per_group(cycle_max_mom, "cycle_max_mom")
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and "betas" not in optimizer.defaults:
            log.warning(
                "OneCycle: cycle_momentum has no effect, %s has no betas", type(optimizer).__name__
            )
            self.cycle_momentum = False
        self._begin()

    def _height(self, iteration: int) -> float:
        """0 at the ends of the cycle, 1 where its halves meet."""
        at = (iteration + 1) % self.total_size
        if at <= self.first_step_size:
            position, length, stairs = at, self.first_step_size, self.stairs[0]
        else:
            position, length, stairs = self.total_size - at, self.second_step_size, self.stairs[1]
        if stairs > 0:
            # From whole numbers: a share may lie a rounding below its stair.
            return math.floor(position * stairs / length) / stairs
        return position / length

    def _decays(self, iteration: int) -> float:
        """How many decay steps have gone by since the cycle ended."""
        if self.decay_step_size == 0:
            return 0.0
        return (iteration - self.total_size + 1) / self.decay_step_size

    def rates_at(self, iteration: int) -> list[float]:
        if iteration < self.total_size:
            height = self._height(iteration)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs)]
        return [low / (1 + self.decay_lr_rate * self._decays(iteration)) for low in self.min_lrs]

    def momentums_at(self, iteration: int) -> list[float]:
        if iteration < self.total_size:
            height = self._height(iteration)
            pairs = zip(self.min_moms, self.max_moms)
            return [high - (high - low) * height for low, high in pairs]
        return [m * (1 + self.decay_mom_rate * self._decays(iteration)) for m in self.max_moms]

    def get_mom(self) -> list[tuple[float, float]] | None:
        if not self.cycle_momentum:
            return None
        return [(value, self.BETA2) for value in self.momentums_at(self.last_batch_iteration)]

    def _apply(self) -> None:
        super()._apply()
        moms = self.get_mom() or []
        if moms and self.last_batch_iteration == -1:
            # The first optimizer step runs at the smallest momentum, as DeepSpeed's.
            moms = [(value, self.BETA2) for value in self.min_moms]
        for group, betas in zip(self.optimizer.param_groups, moms):
            group["betas"] = betas


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def from_config(config: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of a resolved configuration, DeepSpeed's or PyTorch's; None where the rate is
    constant. ValueError where its parameters do not suit it or the optimizer."""
    section = config.get("scheduler")
    if not section:
        return None
    name, params = section["type"], section["params"]
    if params.get("warmup_num_steps") == 0:
        # What Transformers writes for "auto" without a warm-up.
        params = params | {"warmup_num_steps": 1}
    kind = SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, name, None)
    if kind is None:
        raise ValueError(f"scheduler.type {name!r}: this PyTorch ({torch.__version__}) has none")
    try:
        return kind(optimizer, **params)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in params.items())
        raise ValueError(f"the scheduler {name} cannot be made with {given}: {error}") from error
