# SPDX-License-Identifier: Apache-2.0
"""A parameter's fp32 weights, optimizer state and gradient, whole, wherever they are kept.

DeepSpeed's `safe_get_full_*` and `safe_set_full_*` (deepspeed.utils). Setting is collective: every
rank calls it, outside of forward and backward, and rank 0's values become everybody's. Getting
weights and state needs no other rank, getting a gradient all of them.

And `safe_get_local_*` and `safe_set_local_*`: a rank's part of a parameter as DeepSpeed's stage 3
divides it, flat, ceil(elements / ranks) of them from rank * that on. Here no rank keeps such a
part; it is read from and written to wherever it is, at any stage. What DeepSpeed pads the last
parts with are zeros that go nowhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from zerod import constructors, gathered
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


def _find_trained(parameter: torch.Tensor, what: str) -> "tuple[Engine, ManagedParameter]":
    engine, managed = _find_managed(parameter)
    if not managed.trainable:
        raise ValueError(f"{managed.name!r} is not trained: there is no {what} for it")
    return engine, managed


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


def _put(
    engine: "Engine", managed: ManagedParameter, value: torch.Tensor, kind: str, part: bool = False
) -> None:
    """Rank 0's value, whole; or `part`, every rank's own."""
    begin, end = _part(engine, managed) if part else (0, math.prod(managed.shape))
    engine.client.barrier()  # nobody reads the old values any more
    if (part or engine.global_rank == 0) and not engine.passes_over("safe_set_*"):
        engine.weights.put(managed, value.reshape(-1)[: end - begin], kind, begin)
    engine.client.barrier()


def _part_elements(engine: "Engine", managed: ManagedParameter) -> int:
    return -(-math.prod(managed.shape) // engine.world_size)


def _part(engine: "Engine", managed: ManagedParameter) -> tuple[int, int]:
    """[begin, end) of this rank's part, without padding."""
    size, elements = _part_elements(engine, managed), math.prod(managed.shape)
    begin = min(engine.global_rank * size, elements)
    return begin, min(begin + size, elements)


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    """Of the type and in the memory that the client writes to, whatever the script's defaults."""
    return constructors.empty(shape, dtype=torch.float32, device="cpu").zero_()


def _read_part(engine: "Engine", managed: ManagedParameter, kind: str) -> torch.Tensor:
    begin, end = _part(engine, managed)
    value = _zeros((_part_elements(engine, managed),))
    engine.weights.read_into(value[: end - begin], managed, kind, begin)
    return value


def _check_shape(
    engine: "Engine", managed: ManagedParameter, value: torch.Tensor, part: bool = False
) -> None:
    shape = (_part_elements(engine, managed),) if part else managed.shape
    if value.numel() != math.prod(shape) or (not part and tuple(value.shape) != shape):
        what = "this rank's part of " if part else ""
        raise ValueError(
            f"the value for {what}{managed.name!r} has the shape {tuple(value.shape)}, not {shape}"
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
    _set_weights(param, value, part=False)


def _set_weights(param: torch.Tensor, value: torch.Tensor, part: bool) -> None:
    engine, managed = _find_managed(param)
    _check_shape(engine, managed, value, part)
    engine.versions.check()
    engine.gathering.reset()
    _put(engine, managed, value, "master", part)
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
    _set_state(param, value, optim_state_key, part=False)


def _set_state(param: torch.Tensor, value: torch.Tensor, key: str, part: bool) -> None:
    engine, managed = _find_trained(param, "optimizer state")
    _check_shape(engine, managed, value, part)
    _put(engine, managed, value, _kind(engine, managed, key), part)


# --- Gradients ---------------------------------------------------------------------------------


def _divisor(engine: "Engine") -> float:
    """What the daemons' sum is of the gradient that scripts see."""
    mean = engine.config["gradient_allreduce_op"] == "mean"
    return (engine.world_size if mean else 1) * engine.client.loss_scale


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The gradient of the step under way in fp32: the mean over all ranks (their sum with
    gradient_allreduce_op "sum"), divided by the loss scale, not clipped. In memory of the caller's
    own. None where no engine trains `param`, or no rank has a gradient for it; zeros while a script
    that was started again comes to where its job stands (replay.py).

    Collective, after the last backward() and before step(): every rank calls it for the same
    parameters in the same order. Called between micro-steps it gives their sum so far, and what
    follows for this parameter's unit crosses the network in step() alone."""
    return _gradient(param, part=False)


def _gradient(param: torch.Tensor, part: bool) -> torch.Tensor | None:
    found = _find(param)
    if found is None or not found[1].trainable:
        return None
    engine, managed = found
    if engine.replaying:
        return _zeros((_part_elements(engine, managed),) if part else managed.shape)
    if not engine.backward_pass.reduce(managed.index):
        return None
    if part:
        gradient = _read_part(engine, managed, "gradient")
    else:
        gradient = engine.weights.read(managed, "gradient")
    engine.client.barrier()  # nobody adds to it before all have read
    return gradient.mul_(1.0 / _divisor(engine))


def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """The gradient of the step under way is rank 0's `value` from here on, in the terms of
    safe_get_full_grad(): what step() clips and applies, also where no rank had one. Backward passes
    that follow in the same step add to it. Collective, as safe_get_full_grad() is."""
    _set_gradient(param, value, part=False)


def _set_gradient(param: torch.Tensor, value: torch.Tensor, part: bool) -> None:
    engine, managed = _find_trained(param, "gradient")
    _check_shape(engine, managed, value, part)
    if engine.passes_over("safe_set_*"):
        return
    engine.backward_pass.reduce_or_make(managed.index)
    _put(engine, managed, value.float() * _divisor(engine), "gradient", part)


def safe_update_full_grad_vectorized(
    param_list: Sequence[torch.Tensor],
    update_func: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """`update_func(gradient, param)` gives each parameter's new gradient of the step under way, for
    those that an engine trains and some rank has a gradient for. Collective."""
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))


# --- A rank's part -----------------------------------------------------------------------------


def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of the fp32 weights; None where no engine manages `param`."""
    found = _find(param)
    return None if found is None else _read_part(*found, "master")


def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """This rank's part of the weights is `value` from here on. Collective."""
    _set_weights(param, value, part=True)


def safe_get_local_optimizer_state(
    param: torch.Tensor, optim_state_key: str
) -> torch.Tensor | None:
    """This rank's part of what safe_get_full_optimizer_state() gives."""
    found = _find(param)
    if found is None or not found[1].trainable:
        return None
    return _read_part(*found, _kind(*found, optim_state_key))


def safe_set_local_optimizer_state(
    param: torch.Tensor, value: torch.Tensor, optim_state_key: str
) -> None:
    """This rank's part of the optimizer's tensor is `value` from here on. Collective."""
    _set_state(param, value, optim_state_key, part=True)


def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of what safe_get_full_grad() gives. Collective."""
    return _gradient(param, part=True)


def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """As safe_set_full_grad(), of this rank's part. Collective."""
    _set_gradient(param, value, part=True)
