# SPDX-License-Identifier: Apache-2.0
"""Which optimizer serves a job: one that is passed, or the configuration's."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zerod.errors import ModelError
from zerod.optimizer import SGD, Adagrad, Adam, AdamW, Lamb, Lion, Muon, Optimizer
from zerod.torch_optimizers import (
    ASGD,
    OF_TORCH,
    Adadelta,
    Adamax,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    of_torch,
)

log = logging.getLogger("zerod")
GROUPS_MAX = 64  # kGroupsMax of proto/shm/format.h
Builder = Callable[[Iterable[Any]], torch.optim.Optimizer]


def _flag_for_muon(model: torch.nn.Module) -> None:
    """DeepSpeed's rule, for parameters that have no flag: what has two dimensions or more is
    updated by Muon, unless its name says that it is an embedding or the head."""
    for name, p in model.named_parameters():
        hidden = not any(word in name.lower() for word in ("embed", "lm_head"))
        if not hasattr(p, "use_muon"):
            p.use_muon = p.dim() >= 2 and hidden  # type: ignore[attr-defined]


# Whose place is taken, by exact class: a subclass may compute anything.
_ADOPTED: dict[str, type[Optimizer]] = {
    "torch.optim.adamw.AdamW": AdamW,
    "torch.optim.adam.Adam": Adam,
    "torch.optim.adagrad.Adagrad": Adagrad,
    "torch.optim.sgd.SGD": SGD,
    "torch.optim.rmsprop.RMSprop": RMSprop,
    "torch.optim.adadelta.Adadelta": Adadelta,
    "torch.optim.adamax.Adamax": Adamax,
    "torch.optim.nadam.NAdam": NAdam,
    "torch.optim.radam.RAdam": RAdam,
    "torch.optim.asgd.ASGD": ASGD,
    "torch.optim.rprop.Rprop": Rprop,
    "lion_pytorch.lion_pytorch.Lion": Lion,
}
_REFUSED_FLAGS = ("amsgrad", "maximize", "differentiable", "cautious", "decoupled_lr")


def adopt(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Takes over an optimizer that has taken no step yet. The group dicts stay the same objects,
    so what holds the given optimizer (a scheduler) goes on working."""
    for group in optimizer.param_groups:
        for flag in _REFUSED_FLAGS:  # one of ours may have been given another's groups
            if group.get(flag):
                raise ModelError(f"{type(optimizer).__name__} with {flag}=True is not served")
    if isinstance(optimizer, Optimizer):
        return optimizer
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name not in _ADOPTED:
        known = ", ".join(sorted({kind.__name__ for kind in _ADOPTED.values()}))
        raise ModelError(
            f"the optimizer is a {name}, which the daemon does not compute; it computes {known} of "
            "torch.optim and of lion_pytorch"
        )
    target = _ADOPTED[name]
    # Adagrad makes its state when it is made.
    if any(float(state.get("step", 1)) != 0 for state in optimizer.state.values()):
        raise ModelError("the optimizer has taken steps already; pass a fresh one")
    for group in optimizer.param_groups:
        if target is AdamW:
            group.setdefault("decoupled_weight_decay", True)
        elif target is Adam:
            group.setdefault("decoupled_weight_decay", False)
    adopted = target(optimizer.param_groups)
    adopted.param_groups[:] = optimizer.param_groups
    adopted._given = optimizer
    optimizer.state.clear()
    return adopted


def _from_config(section: dict[str, Any], parameters: list[Any]) -> Optimizer:
    params = dict(section["params"])
    kind = section["type"]
    if kind in OF_TORCH:
        return of_torch(kind, params, parameters)
    common = {key: params[key] for key in ("lr", "weight_decay")}
    if kind in ("Adam", "AdamW"):
        # DeepSpeed's Adam is AdamW unless it is told otherwise.
        decoupled = kind == "AdamW" or params["adam_w_mode"]
        return (AdamW if decoupled else Adam)(
            parameters,
            betas=tuple(params["betas"]),
            eps=params["eps"],
            bias_correction=params["bias_correction"],
            **common,
        )
    if kind == "Lion":
        return Lion(parameters, betas=tuple(params["betas"]), **common)
    if kind == "Adagrad":
        keys = ("lr_decay", "initial_accumulator_value", "eps")
        return Adagrad(parameters, **{key: params[key] for key in keys}, **common)
    if kind == "SGD":
        keys = ("momentum", "dampening", "nesterov")
        return SGD(parameters, **{key: params[key] for key in keys}, **common)
    if kind == "Lamb":
        keys = ("bias_correction", "eps", "eps_inside_sqrt", "max_coeff", "min_coeff")
        betas = tuple(params["betas"])
        return Lamb(parameters, betas=betas, **{key: params[key] for key in keys}, **common)
    if kind == "Muon":
        keys = ("muon_lr", "adam_lr", "momentum", "ns_method", "eps", "weight_decay")
        betas = tuple(params["betas"])
        return Muon(parameters, betas=betas, **{key: params[key] for key in keys})
    raise ModelError(f"the optimizer {kind!r} is not served")


def build(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Builder | None,
    model_parameters: Iterable[Any] | None,
    config: dict[str, Any],
    passed_wins: bool = False,
) -> Optimizer | None:
    """The optimizer of the arguments of `initialize`, or of the configuration; None for neither:
    such a job can only be read. Both are an error, or `passed_wins`, as in DeepSpeed."""
    section = config.get("optimizer")
    if optimizer is not None and section and passed_wins:
        log.warning('the optimizer that is passed is used; "optimizer" of the configuration is not')
    elif optimizer is not None and section:
        raise ModelError(
            'an optimizer is passed and the configuration has "optimizer" too; keep one'
        )
    parameters = list(model_parameters) if model_parameters is not None else [
        p for p in model.parameters() if p.requires_grad
    ]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(parameters)
    if optimizer is not None:
        result = adopt(optimizer)
    elif section and parameters:
        if section["type"] == "Muon":
            _flag_for_muon(model)
        result = _from_config(section, parameters)
    else:
        return None
    if len(result.param_groups) > GROUPS_MAX:
        raise ModelError(
            f"{len(result.param_groups)} parameter groups; at most {GROUPS_MAX} are served"
        )
    return result
