# SPDX-License-Identifier: Apache-2.0
"""Learning rates that the engine steps once for each applied optimizer step."""

import math
from typing import Any

import torch


class WarmupLR:
    """DeepSpeed's WarmupLR: from `min_lr` to `max_lr` in `warmup_steps`, constant after that.

    As there, the first two optimizer steps run at `min_lr`: the schedule is stepped after them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        min_lr: float = 0.0,
        max_lr: float = 0.001,
        warmup_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type {warmup_type!r} is neither 'log' nor 'linear'")
        self.optimizer = optimizer
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.warmup_steps = max(2, warmup_steps)
        self.warmup_type = warmup_type
        self.last_batch_iteration = -1
        self._apply()

    def lr_at(self, iteration: int) -> float:
        """The rate after `iteration` + 1 calls of step()."""
        if iteration < 0:
            return self.min_lr
        if iteration >= self.warmup_steps:
            return self.max_lr
        if self.warmup_type == "log":
            gamma = math.log(iteration + 1) / math.log(self.warmup_steps)
        else:
            gamma = iteration / self.warmup_steps
        return self.min_lr + (self.max_lr - self.min_lr) * gamma

    def step(self) -> None:
        self.last_batch_iteration += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]
        self._apply()

    def _apply(self) -> None:
        rate = self.lr_at(self.last_batch_iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def from_config(config: dict[str, Any], optimizer: torch.optim.Optimizer) -> WarmupLR | None:
    """The scheduler of a resolved configuration; None where the rate is constant."""
    section = config.get("scheduler")
    if not section:
        return None
    params = section["params"]
    return WarmupLR(
        optimizer,
        params["warmup_min_lr"],
        params["warmup_max_lr"],
        params["warmup_num_steps"],
        params["warmup_type"],
    )
