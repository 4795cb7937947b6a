#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fp32 weights out of a checkpoint, without a daemon: DeepSpeed's zero_to_fp32 for our folders.

Memory is bounded by one file of the output; a state dict is what the caller asked for, whole.
"""

import argparse
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zerod import checkpoint_folder as folders
from zerod.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> "OrderedDict[str, torch.Tensor]":
    """A state_dict of fp32 weights, and of buffers in their own type. `checkpoint_dir` holds
    `latest` and the folders by tag. Tied parameters share a tensor.

    `lazy_mode` has no meaning: nothing is read twice, and the result is what was asked for.
    """
    folder = checkpoint_folder(checkpoint_dir, tag)
    manifest = folders.read_manifest(folder)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, more, values in folders.fp32_weights(folder, manifest, exclude_frozen_parameters):
        for each in [name, *more]:
            state[each] = values
    return state


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """Puts the fp32 weights into `model`, on the CPU, and returns it. A model whose parameters are
    an engine's gets parameters of its own: the engine is of no use after it."""
    from zerod.weights import detach_model

    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    detach_model(model)
    model = model.cpu().float()
    model.load_state_dict(state, strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the weights as Hugging Face's loaders read them: `pytorch_model.bin` or
    `model.safetensors`, or several of them with an index. Each file appears when it is whole."""
    folder = checkpoint_folder(checkpoint_dir, tag)
    manifest = folders.read_manifest(folder)
    output = Path(output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be made: {error.strerror}") from error
    plan = _plan(manifest, _bytes(max_shard_size), exclude_frozen_parameters)
    values = folders.fp32_weights(folder, manifest, exclude_frozen_parameters)
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    places: dict[str, str] = {}
    total = 0
    for i, count in enumerate(plan):
        name = f"{stem}.{suffix}"
        if len(plan) > 1:
            name = f"{stem}-{i + 1:05d}-of-{len(plan):05d}.{suffix}"
        shard: dict[str, torch.Tensor] = {}
        for _ in range(count):
            first, more, tensor = next(values)
            total += tensor.numel() * tensor.element_size()
            # Safetensors has no shared tensors: readers tie the other names again.
            for each in [first] if safe_serialization else [first, *more]:
                shard[each] = tensor
                places[each] = name
        _write(shard, output / name, safe_serialization)
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        path = output / f"{stem}.{suffix}.index.json"
        folders.write_file(path, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def checkpoint_folder(checkpoint_dir: str | os.PathLike[str], tag: str | None) -> Path:
    """The folder of `tag`, or of what `latest` names. ValueError where there is no `latest`."""
    directory = Path(checkpoint_dir)
    if tag is None:
        tag = folders.latest_tag(directory)
        if tag is None:
            raise CheckpointError(f"Unable to find 'latest' file at {directory / folders.LATEST}")
    return directory / tag


def _plan(manifest: folders.Manifest, limit: int | None, exclude_frozen: bool) -> list[int]:
    """How many of fp32_weights()'s tensors go into each file."""
    counts = [0]
    room = limit
    for size in _sizes(manifest, exclude_frozen):
        if room is not None and counts[-1] and size > room:
            counts.append(0)
            room = limit
        counts[-1] += 1
        if room is not None:
            room -= size
    return counts


def _sizes(manifest: folders.Manifest, exclude_frozen: bool) -> Iterator[int]:
    for parameter in manifest.parameters:
        if parameter.weight is None or exclude_frozen and parameter.frozen:
            continue
        elements = 1
        for dimension in parameter.shape:
            elements *= dimension
        yield 4 * elements
    for _ in manifest.buffers:
        yield 0  # small beside weights


def _bytes(size: str | int | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size {size!r} is no size like 5GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _write(shard: dict[str, torch.Tensor], path: Path, safe: bool) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if safe:
            from safetensors.torch import save_file

            save_file(shard, temporary, metadata={"format": "pt"})
        else:
            torch.save(shard, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Writes the fp32 weights of a checkpoint as Hugging Face's loaders read them."
    )
    parser.add_argument("checkpoint_dir", help="the folder with `latest` in it")
    parser.add_argument(
        "output_dir", help="a folder, made where it is not there"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of an output file [5GB]")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors")
    parser.add_argument("-t", "--tag", help="of the checkpoint [what `latest` names]")
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    options: Any = parser.parse_args(arguments)
    folder = checkpoint_folder(options.checkpoint_dir, options.tag)
    manifest = folders.read_manifest(folder)
    print(f"Processing zero checkpoint '{folder}'")
    print(f"Detected checkpoint of type zero stage {manifest.stage}, world_size: {manifest.world}")
    convert_zero_checkpoint_to_fp32_state_dict(
        options.checkpoint_dir,
        options.output_dir,
        options.max_shard_size,
        options.safe_serialization,
        options.tag,
        options.exclude_frozen_parameters,
    )
    print(f"Saved fp32 state dict to {options.output_dir}")


if __name__ == "__main__":
    main()
