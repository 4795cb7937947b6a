# SPDX-License-Identifier: Apache-2.0
"""From a model and a configuration to an engine."""

import json
import logging
import weakref
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from zerod import (
    _zerod,
    auto_values,
    buffers,
    config as configuration,
    constructors,
    leaf,
    monitors,
    optimizer_choice,
    peers,
    progress,
    replay,
    schedule,
    zero_init,
)
from zerod.engine import Engine, EngineParts
from zerod.errors import ModelError
from zerod.launch import Launch
from zerod.loader import Loader
from zerod.model import ModelDescription, describe
from zerod.nursery import nursery
from zerod.optimizer import Optimizer
from zerod.weights import Weights, model_buffers

log = logging.getLogger("zerod")
BUFFER_BYTES_MAX = 16 << 20  # of buffers that differ between ranks, sent as numbers
_NUMBER_BYTES = 6  # that many fit a double's mantissa exactly
_engines_made = 0
_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@constructors.untouched()
def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | optimizer_choice.Builder | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: configuration.Source | None = None,
    config_params: configuration.Source | None = None,
    *,
    address: str = "",
    seed: int = 0,
    written_for_deepspeed: bool = False,
) -> tuple[Engine, torch.optim.Optimizer | None, Loader | None, Any]:
    """Hands the model's parameters to the daemon; returns engine, optimizer, loader, scheduler.

    The arguments are DeepSpeed's. `config` is a dict, the path of a JSON file, or base64 of one;
    "auto" becomes what `model` and `optimizer` say (docs/config.md). `optimizer` is one of
    torch.optim that the daemon computes (docs/pytorch.md names them) or of this package (Lamb,
    Lion and Muon too), or a function that makes one of parameters; `lr_scheduler` a scheduler, or a
    function that makes one of the optimizer. `address` is the daemon's socket ("unix:/path"; else
    ZEROD_ADDRESS, else an embedded one). `seed` orders `training_data`.
    `written_for_deepspeed`: the script and its configuration know nothing of zerod; unknown keys at
    the top are warnings, as is an optimizer or scheduler both passed and configured (the passed one
    is used); a resumed job lets the script run up to where it stands; names in engine.state_dict()
    begin with "module."; and buffers too large for client_state_bytes_max are left out of it.

    Collective: every rank of the launcher calls it. Rank 0's weights are the job's. Where the job
    is there already, its state is taken up instead: see `engine.resumed_step`.
    """
    if model is None:
        raise ValueError("model is missing")
    launch = Launch.from_environment()
    read = _read(args, config, config_params, model, optimizer, launch, written_for_deepspeed)
    resolved = read.config
    monitors.check(resolved)
    dtype = configuration.dtype(resolved)
    built = optimizer_choice.build(
        model, optimizer, model_parameters, resolved, passed_wins=written_for_deepspeed
    )
    scheduler = _scheduler(lr_scheduler, built, resolved, passed_wins=written_for_deepspeed)
    loader = _loader(training_data, collate_fn, resolved, launch, seed)
    leaf.apply_config(model, resolved["zero_optimization"])
    nursery.prepare()
    buffers.apply_config(model, resolved)
    description = describe(model, dtype, built)
    client = _attach(resolved, description, built, launch, address, dtype)
    try:
        engine = _adopt(
            EngineParts(
                model=model,
                client=client,
                description=description,
                weights=Weights(client, description),
                optimizer=built,
                lr_scheduler=scheduler,
                training_dataloader=loader,
                config=resolved,
                launch=launch,
                replays=replay.choose(resolved, written_for_deepspeed),
                written_for_deepspeed=written_for_deepspeed,
            )
        )
        if launch.rank == 0 and resolved["dump_state"]:
            progress.dump(read, client.plan_text)
    except BaseException:
        client.close()
        raise
    return engine, built, engine.training_dataloader, engine.lr_scheduler


def _loader(
    training_data: Dataset[Any] | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    resolved: dict[str, Any],
    launch: Launch,
    seed: int,
) -> Loader | None:
    if training_data is None:
        return None
    return Loader(
        training_data,
        resolved["train_micro_batch_size_per_gpu"],
        rank=launch.rank,
        world=launch.world,
        seed=seed,
        collate_fn=collate_fn,
        drop_last=resolved["dataloader_drop_last"],
    )


def _read(
    args: Any,
    config: configuration.Source | None,
    config_params: configuration.Source | None,
    model: nn.Module,
    optimizer: Any,
    launch: Launch,
    written_for_deepspeed: bool,
) -> configuration.Resolved:
    """The configuration without "auto", and its warnings in the log."""
    source = configuration.choose_source(args, config, config_params)

    def resolve(text: str) -> configuration.Resolved:
        return configuration.resolve(
            text,
            launch.world,
            deepspeed_file=written_for_deepspeed,
            hidden_sizes=auto_values.hidden_sizes(model),
            values=auto_values.of_optimizer(optimizer),
        )

    read = resolve(configuration.read_source(source))
    warnings = list(read.warnings)
    if written_for_deepspeed and _is_bf16_alone(model, read.config):
        read = resolve(json.dumps(read.config | {"bf16": read.config["bf16"] | {"enabled": True}}))
        warnings.append(
            "all parameters are bfloat16, and neither bf16.enabled nor fp16.enabled is set: taken "
            "as bf16.enabled, with fp32 master weights, as DeepSpeed trains such a model"
        )
    progress.show_log(read.config)
    if launch.rank == 0:
        for warning in warnings:
            log.warning("the configuration: %s", warning)
    return read


def _is_bf16_alone(model: nn.Module, resolved: dict[str, Any]) -> bool:
    """A model that was loaded in bfloat16, which Transformers does unasked, and a configuration
    that says nothing of it."""
    if resolved["bf16"]["enabled"] or resolved["fp16"]["enabled"]:
        return False
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return types == {torch.bfloat16}


def _attach(
    resolved: dict[str, Any],
    description: ModelDescription,
    built: Optimizer | None,
    launch: Launch,
    address: str,
    dtype: torch.dtype,
) -> Any:
    global _engines_made
    configured = resolved["zerod"]["job"]
    serial = _living(configured) if configured else _engines_made
    job = peers.job_id(configured, serial, launch)
    found = peers.find_peers(job, launch, address)
    client = _zerod.Client.attach(
        modules=description.modules,
        parameters=description.parameter_infos(),
        groups=built.kinds() if built is not None else [],
        config=json.dumps(resolved),  # with no "auto" left, which only this side can resolve
        dtype=str(dtype).removeprefix("torch."),
        address=address,
        job=job,
        attempt=launch.attempt,
        rank=launch.rank,
        world=launch.world,
        local_rank=launch.local_rank,
        local_world=launch.local_world,
        node_rank=launch.node_rank,
        peers=found.addresses,
        job_token=found.job_token,
        attach_timeout_seconds=resolved["zerod"]["attach_timeout_seconds"],
    )
    _engines_made += 1
    if launch.rank == 0:
        log.info("job %s: %s", job, client.plan_text)
    return client


def _living(configured: str) -> int:
    """How many engines of this process with that name for their job have not ended."""
    return sum(
        engine.config["zerod"]["job"] == configured and not engine.client.closed
        for engine in _engines
    )


def _adopt(parts: EngineParts) -> Engine:
    client, launch = parts.client, parts.launch
    fresh = client.resumed_step == 0
    client.barrier()  # all ranks have come
    # A job that died before its first step may have got a part only: then again.
    parts.weights.adopt(write_initial=fresh and launch.rank == 0)
    zero_init.unhook(parts.model)
    client.barrier()
    parts.weights.open_resident()
    if fresh and launch.world > 1:
        _share_buffers(parts.model, client, launch)
    engine = Engine(parts)
    _engines.add(engine)
    return engine


def _scheduler(given: Any, optimizer: Any, resolved: dict[str, Any], passed_wins: bool) -> Any:
    if given is not None and resolved.get("scheduler") and passed_wins:
        log.warning('the scheduler that is passed is used; "scheduler" of the configuration is not')
    elif given is not None and resolved.get("scheduler"):
        raise ModelError(
            'a scheduler is passed and the configuration has "scheduler" too; keep one'
        )
    if given is None:
        if optimizer is None and resolved.get("scheduler"):
            log.warning('"scheduler" has no effect: there is no optimizer')
        return schedule.from_config(resolved, optimizer) if optimizer is not None else None
    if not hasattr(given, "step"):
        return given(optimizer)
    return given


def _share_buffers(model: nn.Module, client: Any, launch: Launch) -> None:
    """Rank 0's buffers become everybody's, where they are not equal anyway."""
    buffers = model_buffers(model)
    data = b"".join(
        b.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for b in buffers.values()
    )
    mark = [float(zlib.crc32(data)), float(len(data))]
    low, high = client.all_reduce(mark, "min"), client.all_reduce(mark, "max")
    if low == high:
        return
    if low[1] != high[1]:
        raise ModelError("the ranks' buffers differ in size: build the same model on every rank")
    if len(data) > BUFFER_BYTES_MAX:
        raise ModelError(
            f"{len(data)} bytes of buffers differ between the ranks: build the model from the same "
            "seed on every rank"
        )
    received = bytearray()
    piece_bytes = 64 * _NUMBER_BYTES
    for begin in range(0, len(data), piece_bytes):
        piece = data[begin : begin + piece_bytes]
        numbers = [
            float(int.from_bytes(piece[i : i + _NUMBER_BYTES], "little"))
            for i in range(0, len(piece), _NUMBER_BYTES)
        ]
        mine = numbers if launch.rank == 0 else [0.0] * len(numbers)
        for i, number in enumerate(client.all_reduce(mine, "sum")):
            size = min(_NUMBER_BYTES, len(piece) - i * _NUMBER_BYTES)
            received += int(number).to_bytes(size, "little")
    offset = 0
    for buffer in buffers.values():
        size = buffer.numel() * buffer.element_size()
        if size:
            values = torch.frombuffer(received, dtype=torch.uint8, count=size, offset=offset)
            with torch.no_grad():
                buffer.copy_(values.clone().view(buffer.dtype).view(buffer.shape))
        offset += size
