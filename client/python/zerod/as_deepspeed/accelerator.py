# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.accelerator`: the device that a rank computes on. Here it is the CPU."""

import logging
import os
from typing import Any

import torch

from zerod.launch import Launch

log = logging.getLogger("zerod")


class CpuAccelerator:
    """DeepSpeed's accelerator interface, as far as scripts and Transformers ask it."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def is_available(self) -> bool:
        return True

    def is_synchronized_device(self) -> bool:
        return True

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return True

    def handles_memory_backpressure(self) -> bool:
        return True

    def device_name(self, device_index: int | None = None) -> str:
        return "cpu"

    def device(self, device_index: int | None = None) -> Any:
        return torch.device("cpu")

    def current_device(self) -> int:
        return Launch.from_environment().local_rank

    def current_device_name(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        """The ranks that this node may have: LOCAL_SIZE, as DeepSpeed's launchers set it, else the
        ranks that it has."""
        size = os.environ.get("LOCAL_SIZE", "")
        return int(size) if size.isdigit() and int(size) else Launch.from_environment().local_world

    def set_device(self, device_index: int) -> None:
        """There is one CPU."""

    def synchronize(self, device_index: int | None = None) -> None:
        """There is nothing to wait for."""

    def empty_cache(self) -> None:
        """There is none."""

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def random(self) -> Any:
        return torch.random

    def total_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes resident in this process, shared ones included."""
        return _status_bytes("VmRSS")

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most that memory_allocated() was since reset_peak_memory_stats()."""
        return _status_bytes("VmHWM")

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """For the whole process, what it measures for itself included."""
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")

    reset_max_memory_allocated = reset_peak_memory_stats
    memory_cached = memory_reserved = memory_allocated
    max_memory_cached = max_memory_reserved = max_memory_allocated
    reset_max_memory_cached = reset_peak_memory_stats

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def range_push(self, message: str) -> None:
        """NVTX ranges are for GPUs."""

    def range_pop(self) -> None:
        """NVTX ranges are for GPUs."""

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def is_triton_supported(self) -> bool:
        return False


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs what this process has resident, on rank 0, where it is forced to."""
    if force and Launch.from_environment().rank == 0:
        log.info(
            "%s: %.2f GB resident, %.2f GB at most", message,
            _status_bytes("VmRSS") / 1e9, _status_bytes("VmHWM") / 1e9,
        )


_accelerator = CpuAccelerator()


def get_accelerator() -> CpuAccelerator:
    return _accelerator


def is_current_accelerator_supported() -> bool:
    """Whether there is an accelerator that the programs of this machine can use: its CPUs."""
    return True
