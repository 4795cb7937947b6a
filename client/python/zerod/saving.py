# SPDX-License-Identifier: Apache-2.0
"""How an engine is saved and loaded, in DeepSpeed's words."""

import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zerod import checkpoint, checkpoint_folder as folders, collectives
from zerod.errors import CheckpointError

if TYPE_CHECKING:
    from zerod.engine import Engine

log = logging.getLogger("zerod")


class Saving:
    """The part of Engine that writes and reads files. Collective unless it says otherwise, and
    called between steps."""

    def save_checkpoint(
        self: "Engine",  # type: ignore[misc]
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes everything that training needs to go on into `save_dir`/`tag` (by default
        "global_step<N>"), and the tag into `save_dir`/latest. `client_state` is the caller's own,
        anything that can be pickled; load_checkpoint() gives it back.

        The folder appears whole or not at all. CheckpointError on every rank where one failed.
        """
        if not save_dir:
            raise ValueError(f"save_dir is {save_dir!r}: save_checkpoint() needs a folder")
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        _check_agreement(self, name)
        checkpoint.save(
            self, save_dir, name, client_state or {}, save_latest, exclude_frozen_parameters
        )
        return True

    def load_checkpoint(
        self: "Engine",  # type: ignore[misc]
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[[Any, Any], None] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Puts back what save_checkpoint() wrote, at any stage and with any number of ranks.
        Returns (the folder, the caller's client_state); (None, None), with a warning, where `tag`
        is None and there is no file `latest`.

        The random generators, the position of training_data and the micro-steps are put back where
        the number of ranks is what it was. CheckpointError where the checkpoint is missing,
        damaged or of another model; nothing is changed then.
        """
        directory = Path(load_dir)
        if tag is None:
            tag = folders.latest_tag(directory)
            if tag is None:
                log.warning("there is no %s: nothing is loaded", directory / folders.LATEST)
                return None, None
        folder = directory / str(tag)
        client_state = checkpoint.load(
            self,
            folder,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        return str(folder), client_state

    def save_16bit_model(
        self: "Engine",  # type: ignore[misc]
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Rank 0 writes the model's state_dict, in the type it computes with, by torch.save; or as
        safetensors where the name ends so. True; an error on every rank where it failed.

        A file that a script wrote before it was started again stays (replay.py)."""
        problem: Exception | None = None
        kept = self.replaying and (Path(save_dir) / save_filename).exists()
        if self.global_rank == 0 and kept:
            log.warning("%s: not written anew", Path(save_dir) / save_filename)
        elif self.global_rank == 0:
            try:
                state = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
                _write_state(state, Path(save_dir), save_filename)
            except Exception as error:
                problem = error
        failed = collectives.all_reduce(float(problem is not None), "max", self)
        if problem is not None:
            raise problem
        if failed:
            raise CheckpointError("rank 0 could not write the model; its error says why")
        return True

    def save_fp16_model(
        self: "Engine",  # type: ignore[misc]
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
    ) -> bool:
        """The old name of save_16bit_model()."""
        return self.save_16bit_model(save_dir, save_filename)

    def module_state_dict(
        self: "Engine",  # type: ignore[misc]
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's own state_dict, complete, from any rank alone. What is excluded is not read:
        memory is that of the rest."""
        leaving_out = self._state_dict_hooks.excluding_frozen
        with leaving_out() if exclude_frozen_parameters else nullcontext():
            state: dict[str, Any] = self.module.state_dict(
                destination=destination, prefix=prefix, keep_vars=keep_vars
            )
        if exclude_frozen_parameters:  # those that a destroyed engine's module has, too
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(prefix + name, None)
        return state

    def load_module_state_dict(
        self: "Engine",  # type: ignore[misc]
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[[Any, Any], None] | None = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Any = None,
        allowed_missing_keys: Iterable[str] | None = None,
    ) -> None:
        """load_state_dict() of the model's state_dict, or of a dict that has it as "module".
        `allowed_missing_keys` may be missing although `strict`. `fetch_z3_params` and
        `z3_params_to_fetch` have no meaning: the daemon takes whole values."""
        state_dict = checkpoint
        if isinstance(checkpoint.get("module"), Mapping):
            state_dict = checkpoint["module"]
        if custom_load_fn is not None:
            from zerod.gathered import GatheredParameters

            with GatheredParameters(list(self.module.parameters()), modifier_rank=0):
                custom_load_fn(src=state_dict, dst=self.module)  # type: ignore[call-arg]
            return
        self.load_state_dict(state_dict, strict, allowed_missing_keys or ())

    def _zero3_consolidated_16bit_state_dict(
        self: "Engine", exclude_frozen_parameters: bool = False  # type: ignore[misc]
    ) -> "OrderedDict[str, Any] | None":
        """The state_dict on rank 0, None on the others, as DeepSpeed's consolidation gives it."""
        if self.global_rank != 0:
            return None
        return OrderedDict(
            self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        )

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict


def _check_agreement(engine: "Engine", tag: str) -> None:
    mark = float(zlib.crc32(tag.encode()))
    low, high = (collectives.all_reduce(mark, op, engine) for op in ("min", "max"))
    if low != high:
        raise CheckpointError(f"the ranks give different tags; this one gives {tag!r}")


def _write_state(state: dict[str, Any], directory: Path, name: str) -> None:
    """By way of another name: a reader never sees a part."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / name
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import save_file

            # Tied tensors are one there: the first of their names stays.
            once = {id(value): key for key, value in reversed(state.items())}
            save_file({k: state[k].contiguous() for k in sorted(once.values())}, temporary)
        else:
            torch.save(state, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
