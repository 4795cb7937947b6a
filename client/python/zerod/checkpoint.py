# SPDX-License-Identifier: Apache-2.0
"""An engine's state to a checkpoint and back.

Saving: local rank 0 of every node reads a part of the parameters from the daemons, whole, and
writes it; rank 0 publishes the folder when all have. Loading: rank 0 writes everything back, to
whatever layout, stage and number of ranks this job has. Both are collective, between steps.
"""

import copy
import logging
import os
import pickle
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zerod import checkpoint_folder as folders, collectives
from zerod._zerod import __version__
from zerod.checkpoint_folder import Manifest, ParameterEntry, ShardWriter, TensorEntry
from zerod.errors import CheckpointError
from zerod.model import ManagedParameter
from zerod.weights import model_buffers

if TYPE_CHECKING:
    from zerod.engine import Engine

log = logging.getLogger("zerod")
CONVERTER = Path(__file__).with_name("zero_to_fp32_script.py")


# --- Saving.


def save(
    engine: "Engine",
    save_dir: str | os.PathLike[str],
    tag: str,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> None:
    """Writes `save_dir`/`tag`. On an error nothing is published, and every rank raises."""
    directory = Path(save_dir)
    if _replayed(engine, directory / tag):
        return
    nonce = _agree_on_nonce(engine)
    partial = folders.partial_folder(directory, tag, nonce)
    try:
        _together(engine, lambda: _begin(engine, directory, tag, partial))
        _together(engine, lambda: _write_part(engine, partial, client_state,
                                              exclude_frozen_parameters))
        _together(engine, lambda: _publish(engine, directory, tag, partial, save_latest))
    except BaseException:
        if engine.global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _replayed(engine: "Engine", target: Path) -> bool:
    """A script that begins again saves what it has saved before: that one stays."""
    if not engine.replaying:
        return False
    # One rank looks: a folder may appear between two looks.
    there = engine.global_rank == 0 and (target / folders.MANIFEST).is_file()
    if engine.global_rank == 0:
        log.warning(
            "%s: not written anew while the script comes to where the job stands" if there else
            "%s: gets the job's state, which is ahead of the script's step", target,
        )
    return bool(collectives.all_reduce(float(there), "max", engine))


def _agree_on_nonce(engine: "Engine") -> str:
    """Rank 0's, for all."""
    number = secrets.randbits(48) if engine.global_rank == 0 else 0
    return f"{int(collectives.all_reduce(float(number), 'max', engine)):012x}"


def _together(engine: "Engine", action: Callable[[], None]) -> None:
    """Runs `action`; every rank raises where one did, and goes on when all have done it."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    failed = collectives.all_reduce(float(problem is not None), "max", engine)
    if problem is not None:
        raise problem
    if failed:
        raise CheckpointError("another rank failed at the checkpoint; its error says why")


def _begin(engine: "Engine", directory: Path, tag: str, partial: Path) -> None:
    if engine.global_rank != 0:
        return
    folders.check_tag(tag)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folders.clear_partial(directory, tag)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{partial} cannot be made: {error.strerror}; give a folder that may be written"
        ) from error


def _write_part(
    engine: "Engine", partial: Path, client_state: dict[str, Any], exclude_frozen: bool
) -> None:
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial.parent} is not the same folder on all nodes: give one that they share"
        )
    state = engine.rank_state() | {"client_state": client_state}
    folders.write_file(partial / _rank_file(engine.global_rank), pickle.dumps(state, protocol=5))
    if engine.local_rank != 0:
        return
    writer = ShardWriter(partial, f"state-{engine.node_rank:04d}")
    names = _names(engine)
    steps = engine.client.optimizer_steps()
    entries = [
        _write_parameter(engine, managed, names[managed.index], steps, writer, exclude_frozen)
        for managed in _share(engine.description.parameters, engine.node_rank, engine.nodes)
    ]
    buffers: dict[str, TensorEntry] = {}
    if engine.global_rank == 0:
        for name, buffer in model_buffers(engine.module, persistent_only=True).items():
            # A private copy: what is written must be what the checksum is of.
            buffers[name] = writer.add(f"{name}/buffer", buffer.detach().clone())
    writer.close()
    part = {"parameters": entries, "buffers": buffers}
    folders.write_file(partial / _part_file(engine.node_rank), pickle.dumps(part, protocol=5))


def _write_parameter(
    engine: "Engine",
    managed: ManagedParameter,
    names: list[str],
    steps: list[int],
    writer: ShardWriter,
    exclude_frozen: bool,
) -> ParameterEntry:
    entry = ParameterEntry(
        name=names[0],
        shape=list(managed.shape),
        trainable=managed.trainable,
        frozen=managed.frozen,
        aliases=names[1:],
    )
    if not (exclude_frozen and managed.frozen):
        entry.weight = writer.add(entry.name, engine.weights.read(managed))
    if managed.trainable:
        entry.kind = engine.optimizer.kinds()[managed.group]  # type: ignore[union-attr]
        entry.steps = steps[managed.index]
        for key, kind in _states(engine, managed).items():
            values = engine.weights.read(managed, kind)
            entry.state[key] = writer.add(f"{entry.name}/{key}", values)
    return entry


def _publish(
    engine: "Engine", directory: Path, tag: str, partial: Path, save_latest: bool
) -> None:
    if engine.global_rank != 0:
        return
    parts = [_read_part(partial, node) for node in range(engine.nodes)]
    steps, skipped = engine.job_steps
    manifest = Manifest(
        global_steps=steps,
        skipped_steps=skipped,
        world=engine.world_size,
        stage=engine.zero_optimization_stage(),
        dtype=str(engine.description.parameters[0].dtype).removeprefix("torch."),
        loss_scaler=engine.client.loss_scaler() if engine.fp16_enabled() else None,
        parameters=[entry for part in parts for entry in part["parameters"]],
        buffers=parts[0]["buffers"],
        rank_files=[_rank_file(rank) for rank in range(engine.world_size)],
        config=_plain(engine.config),
        writer=f"zerod {__version__}",
    )
    for node in range(engine.nodes):
        (partial / _part_file(node)).unlink()
    folders.write_file(partial / folders.MANIFEST, manifest.to_json().encode())
    folders.publish(partial, directory / tag)
    script = directory / "zero_to_fp32.py"
    folders.write_file(script, CONVERTER.read_bytes())
    script.chmod(0o755)
    if save_latest:
        folders.write_file(directory / folders.LATEST, tag.encode())


def _read_part(partial: Path, node: int) -> dict[str, Any]:
    try:
        part: dict[str, Any] = pickle.loads((partial / _part_file(node)).read_bytes())
        return part
    except FileNotFoundError:
        raise CheckpointError(
            f"what node {node} wrote is not in {partial.parent}: give a folder that all nodes share"
        ) from None


def _states(engine: "Engine", managed: ManagedParameter) -> dict[str, str]:
    """The names of the parameter's state tensors, each with Client.read()'s."""
    optimizer = engine.optimizer
    assert optimizer is not None  # it is trained
    return optimizer.states(optimizer.param_groups[managed.group])


def _share(parameters: list[ManagedParameter], node: int, nodes: int) -> list[ManagedParameter]:
    """The parameters that a node writes: consecutive, of about the same number of elements."""
    total = sum(p.elements for p in parameters) or 1
    chosen, before = [], 0
    for managed in parameters:
        if min(nodes - 1, (before + managed.elements // 2) * nodes // total) == node:
            chosen.append(managed)
        before += managed.elements
    return chosen


def _names(engine: "Engine") -> list[list[str]]:
    """All names of each parameter, by its index."""
    names: dict[int, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [names.get(id(p.parameter), [p.name]) for p in engine.description.parameters]


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pkl"


def _part_file(node: int) -> str:
    return f"part-{node:04d}.pkl"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which `steps_per_print` may be."""
    plain = copy.deepcopy(config)
    if plain.get("steps_per_print") == float("inf"):
        plain["steps_per_print"] = None
    return plain


# --- Loading.


def load(
    engine: "Engine",
    folder: Path,
    *,
    strict: bool,
    optimizer_states: bool,
    lr_scheduler_states: bool,
    module_only: bool,
    custom_load_fn: Callable[[Any, Any], None] | None = None,
) -> dict[str, Any]:
    """Puts back what `folder` holds; the user's own part of it is returned. CheckpointError before
    anything is changed where it does not fit the model; every rank raises then."""
    manifest, state = _read_on_all(engine, folder)
    same_world = manifest.world == engine.world_size
    if engine.replaying and (module_only or manifest.global_steps <= engine.replay_until):
        # It led to where the job stands now, or the script would not come to the same step.
        if module_only:
            engine.passes_over("load_checkpoint(load_module_only=True)")
        else:
            engine.replay_from(state, same_world, lr_scheduler_states, groups=optimizer_states)
        return state["client_state"]
    engine.stop_replay()
    found = _match(engine, manifest)
    trained = optimizer_states and not module_only and engine.optimizer is not None
    _together(engine, lambda: _check(engine, folder, manifest, found, strict, trained))
    engine.begin_write()
    if custom_load_fn is not None:
        _load_custom(engine, folder, manifest, custom_load_fn)
    weights = custom_load_fn is None
    _together(engine, lambda: _put_all(engine, folder, found, trained, weights))
    if trained:
        steps = engine.client.optimizer_steps()
        for managed, entry in found:
            if managed.trainable:
                steps[managed.index] = entry.steps
        scaler = manifest.loss_scaler if engine.fp16_enabled() else None
        engine.client.restore(steps, scaler)
    _together(engine, lambda: _load_buffers(engine, folder, manifest))
    engine.end_write()
    if not module_only:
        engine.restore_rank_state(state, same_world, lr_scheduler_states, groups=trained)
    return state["client_state"]


def _read_on_all(engine: "Engine", folder: Path) -> tuple[Manifest, dict[str, Any]]:
    read: list[Any] = []

    def action() -> None:
        manifest = folders.read_manifest(folder)
        rank = engine.global_rank if engine.global_rank < manifest.world else 0
        path = folder / _rank_file(rank)
        try:
            state = pickle.loads(path.read_bytes())
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        read.extend((manifest, state))

    _together(engine, action)
    return read[0], read[1]


def _match(
    engine: "Engine", manifest: Manifest
) -> list[tuple[ManagedParameter, ParameterEntry]]:
    by_name = {
        name: entry for entry in manifest.parameters for name in [entry.name, *entry.aliases]
    }
    pairs = []
    for managed, names in zip(engine.description.parameters, _names(engine)):
        entry = next((by_name[name] for name in names if name in by_name), None)
        if entry is not None:
            pairs.append((managed, entry))
    return pairs


def _check(
    engine: "Engine",
    folder: Path,
    manifest: Manifest,
    found: list[tuple[ManagedParameter, ParameterEntry]],
    strict: bool,
    trained: bool,
) -> None:
    problems = [
        f"{managed.name}: {entry.shape} in the checkpoint, {list(managed.shape)} in the model"
        for managed, entry in found
        if entry.shape != list(managed.shape)
    ]
    problems += _buffer_problems(engine, folder, manifest, strict)
    if strict:
        matched = {managed.index for managed, entry in found if entry.weight is not None}
        missing = [
            p.name
            for p in engine.description.parameters
            if p.index not in matched and not p.frozen
        ]
        used = {id(entry) for _, entry in found}
        unexpected = [entry.name for entry in manifest.parameters if id(entry) not in used]
        problems += [f"{name}: not in the checkpoint" for name in missing]
        problems += [f"{name}: not in the model" for name in unexpected]
    if trained:
        kinds = engine.optimizer.kinds()  # type: ignore[union-attr]
        problems += [
            f"{managed.name}: its optimizer was {entry.kind or 'none'}, it is "
            f"{kinds[managed.group]}"
            for managed, entry in found
            if managed.trainable and entry.kind != kinds[managed.group]
        ]
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit (load_optimizer_states=False leaves the optimizer's state "
            "out, load_module_strict=False allows for other names):\n" + "\n".join(problems[:20])
            + (f"\nand {len(problems) - 20} more" if len(problems) > 20 else "")
        )


def _buffer_problems(
    engine: "Engine", folder: Path, manifest: Manifest, strict: bool
) -> list[str]:
    buffers = model_buffers(engine.module, persistent_only=True)
    problems = []
    with folders.TensorReader(folder) as reader:
        for name in buffers.keys() & manifest.buffers.keys():
            shape = reader.shape(manifest.buffers[name])
            if shape != list(buffers[name].shape):
                problems.append(
                    f"{name}: a buffer of {shape} in the checkpoint, "
                    f"{list(buffers[name].shape)} in the model"
                )
    if strict:
        problems += [f"{name}: a buffer that is not in the checkpoint"
                     for name in buffers.keys() - manifest.buffers.keys()]
        problems += [f"{name}: a buffer that is not in the model"
                     for name in manifest.buffers.keys() - buffers.keys()]
    return sorted(problems)


def _put_all(
    engine: "Engine",
    folder: Path,
    found: list[tuple[ManagedParameter, ParameterEntry]],
    trained: bool,
    weights: bool,
) -> None:
    if engine.global_rank != 0:
        return
    with folders.TensorReader(folder) as reader:
        for managed, entry in found:
            _put(engine, reader, managed, entry, trained, weights)


def _put(
    engine: "Engine",
    reader: folders.TensorReader,
    managed: ManagedParameter,
    entry: ParameterEntry,
    trained: bool,
    weights: bool,
) -> None:
    if weights and entry.weight is not None:
        engine.weights.put(managed, reader.read(entry.weight, entry.shape))
    if trained and managed.trainable:
        for key, kind in _states(engine, managed).items():
            values = reader.read(entry.state[key], entry.shape)
            engine.weights.put(managed, values, kind)


def _load_custom(
    engine: "Engine", folder: Path, manifest: Manifest, load: Callable[[Any, Any], None]
) -> None:
    """DeepSpeed's hook: `load(src=state_dict, dst=module)` writes the parameters itself."""
    from zerod.gathered import GatheredParameters

    source = {
        name: values
        for first, more, values in folders.fp32_weights(folder, manifest)
        for name in [first, *more]
    }
    with GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        load(src=source, dst=engine.module)  # type: ignore[call-arg]


def _load_buffers(engine: "Engine", folder: Path, manifest: Manifest) -> None:
    buffers = model_buffers(engine.module, persistent_only=True)
    with folders.TensorReader(folder) as reader, torch.no_grad():
        for name, entry in manifest.buffers.items():
            if name in buffers and buffers[name].numel():
                buffers[name].copy_(reader.read(entry))
