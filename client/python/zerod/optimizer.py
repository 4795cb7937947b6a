# SPDX-License-Identifier: Apache-2.0
"""The optimizer as the training script sees it: its groups. The state and the update are the
daemon's."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zerod import _zerod
from zerod.errors import ModelError

GROUPS_MAX = 64  # kGroupsMax of proto/shm/format.h
Builder = Callable[[Iterable[Any]], torch.optim.Optimizer]


class AdamW(torch.optim.Optimizer):
    """AdamW over parameters that live in the daemon.

    `param_groups` are read at every step, so schedulers work on them as on any optimizer's. There
    is no state here, and `step()` is the engine's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # Without its wrapper, which loads torch's compiler: seconds of every start.
        unwrapped = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
        (unwrapped or torch.optim.Optimizer.add_param_group)(self, param_group)

    @staticmethod
    def adopt(optimizer: torch.optim.Optimizer) -> "AdamW":
        """Takes over a torch.optim.AdamW that has no state yet. The group dicts stay the same
        objects, so what holds the given optimizer (a scheduler) goes on working."""
        if isinstance(optimizer, AdamW):
            return optimizer
        if type(optimizer) is not torch.optim.AdamW:
            raise ModelError(
                f"the optimizer is a {type(optimizer).__name__}; torch.optim.AdamW is what the "
                "daemon computes"
            )
        if optimizer.state:
            raise ModelError("the optimizer has taken steps already; pass a fresh one")
        for group in optimizer.param_groups:
            for flag in ("amsgrad", "maximize", "differentiable"):
                if group.get(flag):
                    raise ModelError(f"AdamW with {flag}=True is not served")
        adopted = AdamW(optimizer.param_groups)
        adopted.param_groups[:] = optimizer.param_groups
        return adopted

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("the daemon takes the optimizer's steps: call engine.step()")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: gradients are handed over as they come, and used up by engine.step()."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("state"):
            raise ValueError("the optimizer's state is the daemon's and cannot be loaded from here")
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"{len(saved)} parameter groups for {len(self.param_groups)}")
        for group, values in zip(self.param_groups, saved):
            group.update({key: value for key, value in values.items() if key != "params"})

    def groups(self) -> list[_zerod.Group]:
        """The groups' values of this moment, for STEP. ValueError for what no step can take."""
        for i, group in enumerate(self.param_groups):
            values = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
            usable = all(0 <= beta < 1 for beta in group["betas"]) and group["eps"] >= 0
            if not usable or not all(math.isfinite(v) for v in values):
                raise ValueError(
                    f"parameter group {i}: lr {group['lr']}, betas {group['betas']}, eps "
                    f"{group['eps']}, weight_decay {group['weight_decay']}: betas must lie in "
                    "[0, 1), eps must not be negative, all must be finite"
                )
        return [
            _zerod.Group(
                lr=float(group["lr"]),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
            )
            for group in self.param_groups
        ]


def build(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Builder | None,
    model_parameters: Iterable[Any] | None,
    config: dict[str, Any],
) -> AdamW | None:
    """The optimizer of the arguments of `initialize`, or of the configuration; None for neither:
    such a job can only be read."""
    section = config.get("optimizer")
    if optimizer is not None and section:
        raise ModelError(
            'an optimizer is passed and the configuration has "optimizer" too; keep one'
        )
    parameters = list(model_parameters) if model_parameters is not None else [
        p for p in model.parameters() if p.requires_grad
    ]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(parameters)
    if optimizer is not None:
        result = AdamW.adopt(optimizer)
    elif section and parameters:
        params = section["params"]
        result = AdamW(
            parameters,
            lr=params["lr"],
            betas=tuple(params["betas"]),
            eps=params["eps"],
            weight_decay=params["weight_decay"],
        )
    else:
        return None
    if len(result.param_groups) > GROUPS_MAX:
        raise ModelError(
            f"{len(result.param_groups)} parameter groups; at most {GROUPS_MAX} are served"
        )
    return result
