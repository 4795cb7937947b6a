# SPDX-License-Identifier: Apache-2.0
"""A parameter's fp32 weights, optimizer state and gradient, whole, wherever they are kept.

DeepSpeed's `safe_get_full_*` and `safe_set_full_*` (deepspeed.utils), but for setting gradients.
Setting is collective: every rank calls it, outside of forward and backward, and rank 0's values
become everybody's. Getting weights and state needs no other rank, getting a gradient all of them.
"""

from typing import TYPE_CHECKING

import torch

from zerod import gathered
from zerod.model import ManagedParameter

if TYPE_CHECKING:
    from zerod.engine import Engine


def _find(parameter: torch.Tensor) -> "tuple[Engine, ManagedParameter] | None":
    owned = gathered.owners.get(id(parameter))
    if owned is None:
        return None
    engine, index, _ = owned
    return engine, engine.description.parameters[index]


def _find_managed(parameter: torch.Tensor) -> "tuple[Engine, ManagedParameter]":
    found = _find(parameter)
    if found is None:
        raise ValueError("the tensor is no parameter of a model that zerod.initialize() was given")
    return found


def _kind(engine: "Engine", managed: ManagedParameter, key: str) -> str:
    assert engine.optimizer is not None
    group = engine.optimizer.param_groups[managed.group]
    kinds = engine.optimizer.states(group)
    if key not in kinds:
        raise ValueError(
            f"{type(engine.optimizer).__name__} keeps no {key!r} of {managed.name!r}: it keeps "
            + (", ".join(kinds) or "no state")
        )
    return kinds[key]


def _put(engine: "Engine", managed: ManagedParameter, value: torch.Tensor, kind: str) -> None:
    engine.client.barrier()  # nobody reads the old values any more
    if engine.global_rank == 0 and not engine.passes_over("safe_set_full_*"):
        engine.weights.put(managed, value, kind)
    engine.client.barrier()


def _check_shape(managed: ManagedParameter, value: torch.Tensor) -> None:
    if tuple(value.shape) != managed.shape:
        raise ValueError(
            f"the value for {managed.name!r} has the shape {tuple(value.shape)}, not "
            f"{managed.shape}"
        )


def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """The fp32 weights, in memory of the caller's own; None where no engine manages `param`."""
    found = _find(param)
    if found is None:
        return None
    engine, managed = found
    return engine.weights.read(managed)


def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """The weights are rank 0's `value` from here on, of the same shape. Collective.

    After a backward pass and before step() too: the step then updates the new weights."""
    engine, managed = _find_managed(param)
    _check_shape(managed, value)
    engine.versions.check()
    engine.gathering.reset()
    _put(engine, managed, value, "master")
    engine.versions.bump(all_parameters=True)


def safe_get_full_optimizer_state(
    param: torch.Tensor, optim_state_key: str
) -> torch.Tensor | None:
    """The optimizer's tensor of that name (torch's: `exp_avg`, `exp_avg_sq`, `momentum_buffer`,
    `sum` and so on) in fp32, in memory of the caller's own. None where no engine trains `param`;
    ValueError where its optimizer has no such state."""
    found = _find(param)
    if found is None or not found[1].trainable:
        return None
    engine, managed = found
    return engine.weights.read(managed, _kind(engine, managed, optim_state_key))


def safe_set_full_optimizer_state(
    param: torch.Tensor, value: torch.Tensor, optim_state_key: str
) -> None:
    """The optimizer's tensor of that name is rank 0's `value` from here on. Collective."""
    engine, managed = _find_managed(param)
    if not managed.trainable:
        raise ValueError(f"{managed.name!r} is not trained: there is no optimizer state for it")
    _check_shape(managed, value)
    _put(engine, managed, value, _kind(engine, managed, optim_state_key))


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The gradient of the step under way in fp32: the mean over all ranks (their sum with
    gradient_allreduce_op "sum"), divided by the loss scale, not clipped. In memory of the caller's
    own. None where no engine trains `param`, or no rank has a gradient for it; zeros while a script
    that was started again comes to where its job stands (replay.py).

    Collective, after the last backward() and before step(): every rank calls it for the same
    parameters in the same order. Called between micro-steps it gives their sum so far, and what
    follows for this parameter's unit crosses the network in step() alone."""
    found = _find(param)
    if found is None or not found[1].trainable:
        return None
    engine, managed = found
    if engine.replaying:
        return torch.zeros(managed.shape)
    if not engine.backward_pass.reduce(managed.index):
        return None
    gradient = engine.weights.read(managed, "gradient")
    engine.client.barrier()  # nobody adds to it before all have read
    mean = engine.config["gradient_allreduce_op"] == "mean"
    return gradient.mul_(1.0 / ((engine.world_size if mean else 1) * engine.client.loss_scale))
