# SPDX-License-Identifier: Apache-2.0
"""What an engine is configured to, in DeepSpeed's words."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Settings:
    """The part of Engine that answers from its configuration. Names and values are those of
    DeepSpeed's engine; sizes are in elements, as in the configuration."""

    config: dict[str, Any]
    dp_world_size: int

    # --- Batches.

    def train_batch_size(self) -> int:
        return self.config["train_batch_size"]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config["train_micro_batch_size_per_gpu"]

    def gradient_accumulation_steps(self) -> int:
        return self.config["gradient_accumulation_steps"]

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return (
            self.train_batch_size(),
            self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Another number of accumulation steps, from the next micro-step on."""
        micro = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % micro:
            raise ValueError(
                f"Train batch size must be divisible by micro-batch data parallelism: "
                f"{train_batch_size} is no multiple of {micro}"
            )
        self.config["train_batch_size"] = train_batch_size
        self.config["gradient_accumulation_steps"] = train_batch_size // micro

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """What the caller's batches hold from now on; the accumulation steps stay."""
        if micro_batch_size <= 0:
            raise ValueError(f"the micro-batch size must be positive, it is {micro_batch_size}")
        self.config["train_micro_batch_size_per_gpu"] = micro_batch_size
        self.config["train_batch_size"] = (
            micro_batch_size * self.gradient_accumulation_steps() * self.dp_world_size
        )

    # --- Precision.

    def bfloat16_enabled(self) -> bool:
        return self.config["bf16"]["enabled"]

    def fp16_enabled(self) -> bool:
        return self.config["fp16"]["enabled"]

    def fp16_auto_cast(self) -> bool:
        return self.config["fp16"]["auto_cast"]

    def dynamic_loss_scale(self) -> bool:
        return self.fp16_enabled() and self.config["fp16"]["loss_scale"] == 0

    def amp_enabled(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return self.config["torch_autocast"]["enabled"]

    def gradient_clipping(self) -> float:
        return self.config["gradient_clipping"]

    # --- ZeRO.

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        return self.config["zero_optimization"]["stage"]

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def zero_offload_optimizer(self) -> dict[str, Any] | None:
        return self._offload("offload_optimizer")

    def zero_offload_param(self) -> dict[str, Any] | None:
        return self._offload("offload_param")

    def _offload(self, key: str) -> dict[str, Any] | None:
        section: dict[str, Any] | None = self.config["zero_optimization"].get(key)
        return None if section is None or section["device"] == "none" else section

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """What Accelerate and the Trainer ask before they save whole weights of stage 3. Whoever
        asks the engine gets them whatever this says."""
        value: bool = self.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
        return value

    def zero_overlap_comm(self) -> bool:
        return self.config["zero_optimization"]["overlap_comm"] is not False

    def zero_reduce_bucket_size(self) -> int:
        return self.config["zero_optimization"]["reduce_bucket_size"]

    def zero_allgather_bucket_size(self) -> int:
        return self.config["zero_optimization"]["allgather_bucket_size"]

    def zero_prefetch_bucket_size(self) -> int:
        return self.config["zero_optimization"]["stage3_prefetch_bucket_size"]

    def zero_param_persistence_threshold(self) -> int:
        return self.config["zero_optimization"]["stage3_param_persistence_threshold"]

    def zero_max_live_parameters(self) -> int:
        return self.config["zero_optimization"]["stage3_max_live_parameters"]

    # --- The rest.

    def optimizer_name(self) -> str | None:
        section = self.config.get("optimizer")
        return section["type"].lower() if section else None

    def optimizer_params(self) -> dict[str, Any] | None:
        section = self.config.get("optimizer")
        return section["params"] if section else None

    def scheduler_name(self) -> str | None:
        section = self.config.get("scheduler")
        return section["type"] if section else None

    def scheduler_params(self) -> dict[str, Any] | None:
        section = self.config.get("scheduler")
        return section["params"] if section else None

    def steps_per_print(self) -> float | None:
        return self.config["steps_per_print"]

    def wall_clock_breakdown(self) -> bool:
        return self.config["wall_clock_breakdown"]

    def dump_state(self) -> bool:
        return self.config["dump_state"]

    def get_data_types(self) -> "tuple[torch.dtype, torch.dtype]":
        """(of the parameters, of the gradients' sum)."""
        import torch

        from zerod import config as configuration

        return configuration.dtype(self.config), torch.float32
