# SPDX-License-Identifier: Apache-2.0
"""What a training process knows that the daemon does not: it travels with every STEP and comes
back at the next attach.

The bytes are a pickle. They go to the user's own daemon over its own socket and come back from
there; whoever can change them can already run code as this user.
"""

import logging
import pickle
import random
import sys
from typing import Any

import torch
from torch import nn

from zerod.weights import model_buffers

FORMAT = 2
_ALWAYS_BYTES_MAX = 4096
_PICKLED_BYTES_MAX = 4096  # how much a pickled tensor is longer than its values, and more
log = logging.getLogger("zerod")


class ClientState:
    """Random generators, buffers, loader position, schedule and the user's own dict."""

    def __init__(self, model: nn.Module, bytes_max: int, may_omit: bool = False) -> None:
        """`may_omit`: buffers that are too large are left out, with a warning, where it would else
        be an error; after a crash they are what the script makes of them."""
        self._model = model
        self._bytes_max = bytes_max
        self._may_omit = may_omit
        self._omitted: set[str] = set()
        self._known = {
            name: (buffer, buffer._version) for name, buffer in model_buffers(model).items()
        }

    def capture(self, parts: dict[str, Any]) -> bytes:
        """`parts`: picklable, the engine's own. ValueError where it is too large."""
        buffers = self._changed_buffers()
        state = {"format": FORMAT, "random": capture_random(), "buffers": buffers, **parts}
        blob = pickle.dumps(state, protocol=5)
        if len(blob) > self._bytes_max and self._may_omit:
            self._omit_largest(buffers, len(blob) - self._bytes_max)
            blob = pickle.dumps(state, protocol=5)
        if len(blob) > self._bytes_max:
            size = sum(b.numel() * b.element_size() for b in buffers.values())
            raise ValueError(
                f"the client state is {len(blob)} bytes ({size} of them buffers), more than "
                f"zerod.client_state_bytes_max = {self._bytes_max}: raise it, or keep less in "
                "engine.client_state"
            )
        return blob

    @staticmethod
    def peek(blob: bytes) -> dict[str, Any]:
        """The other parts; nothing is put back."""
        state: dict[str, Any] = pickle.loads(blob)
        if state["format"] != FORMAT:
            raise RuntimeError("the job's state was written by another version of this package")
        return state

    def restore(self, blob: bytes) -> dict[str, Any]:
        """Puts generators and buffers back; the other parts are returned."""
        state = self.peek(blob)
        del state["format"]
        restore_random(state.pop("random"))
        buffers = model_buffers(self._model)
        for name, value in state.pop("buffers").items():
            if name not in buffers:
                raise RuntimeError(f"the job's state has a buffer {name!r} that the model has not")
            with torch.no_grad():
                if buffers[name].shape != value.shape or buffers[name].dtype != value.dtype:
                    path, _, attribute = name.rpartition(".")
                    setattr(self._model.get_submodule(path), attribute, value)
                else:
                    buffers[name].copy_(value)
        return state

    def _omit_largest(self, buffers: dict[str, torch.Tensor], excess: int) -> None:
        excess += _PICKLED_BYTES_MAX
        for name in sorted(buffers, key=lambda name: buffers[name].nbytes, reverse=True):
            if excess <= 0:
                break
            excess -= buffers.pop(name).nbytes
            self._omitted.add(name)
            log.warning(
                "the buffer %s is not committed with the steps: changed buffers are more than "
                "zerod.client_state_bytes_max = %d. Raise it, or the buffer begins anew after a "
                "crash (a checkpoint has it)", name, self._bytes_max,
            )

    def _changed_buffers(self) -> dict[str, torch.Tensor]:
        """Buffers that may have changed since initialize(): small ones, statistics (batch norm
        writes them without raising their version), and what was written or replaced."""
        statistics = {
            id(buffer)
            for module in self._model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module._buffers.values()
            if buffer is not None
        }
        changed = {}
        for name, buffer in model_buffers(self._model).items():
            if name in self._omitted:
                continue
            known, version = self._known.get(name, (None, -1))
            small = buffer.numel() * buffer.element_size() <= _ALWAYS_BYTES_MAX
            touched = known is not buffer or buffer._version != version
            if small or touched or id(buffer) in statistics:
                changed[name] = buffer.detach().clone()
        return changed


def capture_random() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(torch.frombuffer(bytearray(states["torch"]), dtype=torch.uint8))
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
