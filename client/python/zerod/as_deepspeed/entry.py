# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's top-level functions."""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zerod import config as configuration
from zerod.as_deepspeed import distributed
from zerod.as_deepspeed.face import ABOUT, VERSION
from zerod.engine import Engine
from zerod.initialization import initialize as zerod_initialize
from zerod.launch import Launch
from zerod.zero import GatheredParameters

log = logging.getLogger("zerod")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = distributed.DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: configuration.Source | None = None,
    mesh_param: Any = None,
    config_params: configuration.Source | None = None,
) -> tuple[Engine, Any, Any, Any]:
    """zerod.initialize() with DeepSpeed's arguments: a configuration may have unknown keys at its
    top (a warning), torch.distributed is initialized, and a job that is there already lets the
    script run up to where it stands (zerod.restart)."""
    assert model is not None, "deepspeed.initialize requires a model"
    for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
        if value is not None:
            raise NotImplementedError(
                f"{name}: there is no model or sequence parallelism ({ABOUT})"
            )
    distributed.init_distributed(
        distributed_port=distributed_port, dist_init_required=dist_init_required
    )
    # Tests and log filters look for the two words; whoever reads the log learns what runs.
    log_dist(f"DeepSpeed info: version={VERSION}, carried out by zerod", ranks=[0])
    return zerod_initialize(
        args,
        model,
        optimizer,
        model_parameters,
        training_data,
        lr_scheduler,
        collate_fn,
        config,
        config_params,
        written_for_deepspeed=True,
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --deepspeed and --deepspeed_config, which initialize(args=...) reads."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument(
        "--deepspeed", default=False, action="store_true",
        help="train by deepspeed.initialize (for the script to ask; it has no effect here)",
    )
    group.add_argument(
        "--deepspeed_config", default=None, type=str, help="the configuration, a JSON file"
    )
    return parser


class DeepSpeedConfig:
    """A configuration, read and checked; ValueError lists every problem. `world_size` is the
    launcher's."""

    def __init__(
        self, config: configuration.Source, mpu: Any = None, mesh_device: Any = None
    ) -> None:
        if mpu is not None or mesh_device is not None:
            raise NotImplementedError(f"mpu, mesh_device: there is no model parallelism ({ABOUT})")
        text = configuration.read_source(config)
        self.world_size = Launch.from_environment().world
        resolved = configuration.resolve(text, self.world_size, deepspeed_file=True).config
        self._param_dict = (
            dict(config) if isinstance(config, Mapping) else json.loads(text, strict=False)
        )
        zero = resolved["zero_optimization"]
        self.train_batch_size = resolved["train_batch_size"]
        self.train_micro_batch_size_per_gpu = resolved["train_micro_batch_size_per_gpu"]
        self.gradient_accumulation_steps = resolved["gradient_accumulation_steps"]
        self.gradient_clipping = resolved["gradient_clipping"]
        self.steps_per_print = resolved["steps_per_print"]
        self.zero_optimization_stage = zero["stage"]
        self.zero_enabled = zero["stage"] > 0
        self.fp16_enabled = resolved["fp16"]["enabled"]
        self.bfloat16_enabled = resolved["bf16"]["enabled"]


class OnDevice:
    """`with OnDevice(dtype, device="meta"):` tensors made inside are of that type and device."""

    def __init__(self, dtype: torch.dtype, device: Any = "meta", enabled: bool = True) -> None:
        self.dtype = dtype
        self.device = device
        self.enabled = enabled
        self._stack = ExitStack()

    def __enter__(self) -> "OnDevice":
        if self.enabled:
            before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self._stack.callback(torch.set_default_dtype, before)
            self._stack.enter_context(torch.device(self.device))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class RepeatingLoader:
    """Goes round a loader without end."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._iterator = iter(loader)

    def __iter__(self) -> "RepeatingLoader":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
            return next(self._iterator)


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """Logs on the ranks named; -1 or none of them: on all."""
    rank = dist.get_rank() if dist.is_initialized() else Launch.from_environment().rank
    if not ranks or -1 in ranks or rank in ranks:
        log.log(level, "[Rank %d] %s", rank, message)


def set_log_level_from_string(level: str, custom_logger: logging.Logger | None = None) -> None:
    """`level`: debug, info, warning, error or critical."""
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise ValueError(f"{level} is not one of the log levels {', '.join(levels).lower()}")
    (custom_logger or log).setLevel(levels[level.upper()])


def required_torch_version(
    min_version: float | str | None = None, max_version: float | str | None = None
) -> bool:
    """Whether torch is no older than the one and no newer than the other, as "2.1" or 2.1."""
    assert min_version or max_version, "min_version or max_version is needed"
    have = torch.__version__
    return not (min_version and have < str(min_version)) and not (
        max_version and have > str(max_version)
    )


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """`model` with all its weights gathered once, for a generate() of many forward passes."""
    with GatheredParameters(list(model.parameters())):
        yield model


def clone_tensors_for_torch_save(
    item: Any, device: torch.device | str = torch.device("cpu")
) -> Any:
    """Tensors without the storage that they are views of, in nested lists, tuples and dicts."""
    if isinstance(item, torch.Tensor):
        return item.detach().clone().to(device)
    if isinstance(item, (list, tuple)):
        values = [clone_tensors_for_torch_save(value, device) for value in item]
        return type(item)(values)
    if isinstance(item, dict):
        return type(item)(
            {key: clone_tensors_for_torch_save(value, device) for key, value in item.items()}
        )
    return item


def instrument_w_nvtx(function: Callable[..., Any]) -> Callable[..., Any]:
    """NVTX ranges are for GPUs: the function as it is."""
    return function


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool]) -> Any:
    """Moves what `criterion_func` accepts, in nested lists, tuples and dicts."""
    if criterion_func(item):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        return type(item)([move_to_device(value, device, criterion_func) for value in item])
    if isinstance(item, dict):
        return {key: move_to_device(v, device, criterion_func) for key, v in item.items()}
    return item
