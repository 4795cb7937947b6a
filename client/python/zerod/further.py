# SPDX-License-Identifier: Apache-2.0
"""Further methods of DeepSpeed's engine, which scripts call."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from zerod.loader import Loader

if TYPE_CHECKING:
    from zerod.engine import Engine

OFFLOADED = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


class Further:
    """The part of Engine that is neither training nor files."""

    _is_compiled = False

    def compile(
        self: "Engine",  # type: ignore[misc]
        backend: str | Callable[..., Any] | None = None,
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        **_: Any,
    ) -> None:
        """Compiles the module in place by torch.compile. `schedule` is of DeepCompile's passes,
        which are not served."""
        if schedule is not None:
            raise NotImplementedError("DeepCompile's passes (schedule) are not served")
        options = dict(compile_kwargs or {})
        if backend is not None:
            options["backend"] = backend
        self.module.compile(**options)
        self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        return self._is_compiled

    def deepspeed_io(
        self: "Engine",  # type: ignore[misc]
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader of this rank's part of `dataset`; by default in micro-batches, in random order
        for the route "train" and in the data's own for any other. With `data_sampler` a
        torch.utils.data.DataLoader over it."""
        size = batch_size or self.train_micro_batch_size_per_gpu()
        if data_sampler is not None:
            return torch.utils.data.DataLoader(
                dataset,
                batch_size=size,
                sampler=data_sampler,
                collate_fn=collate_fn,
                num_workers=num_local_io_workers or 0,
            )
        return Loader(
            dataset,
            size,
            rank=self.global_rank,
            world=self.world_size,
            seed=0,
            collate_fn=collate_fn,
            shuffle=route == "train",
            drop_last=self.config["dataloader_drop_last"],
        )

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Nothing to do: gradients are summed over the ranks on their way."""

    def get_type(self: "Engine") -> list[Any]:  # type: ignore[misc]
        """Of each parameter group, as DeepSpeed's one-cycle schedules set it; mostly None."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [group.get("type") for group in groups]

    def loss_scale(self: "Engine") -> float:  # type: ignore[misc]
        """What the next step's loss is multiplied by."""
        return self.client.loss_scale if self.fp16_enabled() else 1.0

    def empty_partition_cache(self: "Engine") -> None:  # type: ignore[misc]
        """Gives up what this rank holds of gathered parameters, outside of forward and backward."""
        self.gathering.reset()

    def offload_states(
        self: "Engine",  # type: ignore[misc]
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves state off the device of the training process. There is none of it there on a CPU
        node: the daemon has it, in host memory. What is asked for is checked all the same."""
        if self.zero_optimization_stage() != 3:
            raise AssertionError(
                "Moving buffers across devices is supported only for ZeRO stage 3."
            )
        if str(getattr(device, "value", device)) not in ("cpu", "none"):
            raise ValueError(f"offload_states: the device {device!r} is not served; it is cpu")
        for name in include or ():
            if str(getattr(name, "value", name)) not in OFFLOADED:
                raise ValueError(f"offload_states: {name!r} is none of {', '.join(OFFLOADED)}")

    def reload_states(self, non_blocking: bool = False) -> None:
        """The way back of offload_states()."""

    @property
    def client_lr_scheduler(self: "Engine") -> Any:  # type: ignore[misc]
        """The schedule that the caller passed; None where the configuration made it."""
        return None if self.config.get("scheduler") else self.lr_scheduler

    @property
    def monitor(self: "Engine") -> Any:  # type: ignore[misc]
        """Where `write_events([(name, value, samples)])` goes: the monitors of the
        configuration."""
        return self.progress
