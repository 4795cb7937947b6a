# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk (docs/formats/checkpoint.md): written once, published whole or not at all.

Nothing here knows of engines or daemons: a folder can be read on a machine that has neither.
Functions raise CheckpointError with a sentence that says what to do.
"""

import ctypes
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zerod.errors import CheckpointError

FORMAT = "zerod-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
SHARD_BYTES_MAX = 512 << 20  # of one safetensors file, unless one tensor alone is larger
_PARTIAL = ".partial-"
_TAG = re.compile(r"[^/\0]{1,200}")
_RENAME_EXCHANGE = 2


@dataclass
class TensorEntry:
    """Where a tensor is: `key` in the safetensors file `file`; `crc32` is of its bytes."""

    file: str
    key: str
    crc32: int


@dataclass
class ParameterEntry:
    """One parameter: its fp32 weights and, where it is trained, its optimizer state."""

    name: str
    shape: list[int]
    trainable: bool
    frozen: bool
    aliases: list[str]  # further names of the same parameter (tied weights)
    kind: str | None = None  # of its optimizer, as Optimizer.kind() says
    steps: int = 0  # that it has been updated
    weight: TensorEntry | None = None  # None: left out, exclude_frozen_parameters
    state: dict[str, TensorEntry] = field(default_factory=dict)  # "exp_avg", ...


@dataclass
class Manifest:
    """What manifest.json holds."""

    global_steps: int
    skipped_steps: int
    world: int
    stage: int
    dtype: str  # of the parameters that the model computed with
    loss_scaler: dict[str, Any] | None
    parameters: list[ParameterEntry]
    buffers: dict[str, TensorEntry]
    rank_files: list[str]  # each rank's own state, by rank
    config: dict[str, Any]
    writer: str

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str, where: str) -> "Manifest":
        try:
            document = json.loads(text)
            if document.pop("format") != FORMAT:
                raise CheckpointError(f"{where} is not of a zerod checkpoint")
            version = document.pop("version")
            if version != VERSION:
                raise CheckpointError(
                    f"{where} has version {version}; this package reads version {VERSION}"
                )
            document["parameters"] = [_parameter(entry) for entry in document["parameters"]]
            document["buffers"] = {k: TensorEntry(**v) for k, v in document["buffers"].items()}
            return Manifest(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from error


def _parameter(entry: dict[str, Any]) -> ParameterEntry:
    entry = dict(entry)
    weight = entry.pop("weight")
    state = {key: TensorEntry(**value) for key, value in entry.pop("state").items()}
    return ParameterEntry(
        **entry, weight=TensorEntry(**weight) if weight is not None else None, state=state
    )


# --- Writing.


class ShardWriter:
    """Streams tensors into safetensors files `<stem>-00000.safetensors`, ... of a folder that is
    not published yet. Memory is bounded by one file."""

    def __init__(self, folder: Path, stem: str, shard_bytes_max: int = SHARD_BYTES_MAX) -> None:
        self._folder = folder
        self._stem = stem
        self._max = shard_bytes_max
        self._files = 0
        self._bytes = 0
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, key: str, tensor: torch.Tensor) -> TensorEntry:
        """`tensor`: of the CPU; its bytes must not change before close()."""
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._max:
            self._flush()
        tensor = tensor.contiguous()
        self._tensors[key] = tensor
        self._bytes += size
        return TensorEntry(self._file_name(), key, crc32_of(tensor))

    def close(self) -> None:
        if self._tensors:
            self._flush()

    def _file_name(self) -> str:
        return f"{self._stem}-{self._files:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self._folder / self._file_name()
        try:
            save_file(self._tensors, path, metadata={"format": "pt"})
        except Exception as error:  # safetensors has one kind for all
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        _sync(path)
        self._tensors = {}
        self._bytes = 0
        self._files += 1


def crc32_of(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def check_tag(tag: str) -> str:
    """The tag as a folder's name. CheckpointError where it is none."""
    if not _TAG.fullmatch(tag) or tag in (".", "..", LATEST) or tag.startswith("."):
        raise CheckpointError(f"the tag {tag!r} cannot be the name of a folder")
    return tag


def partial_folder(directory: Path, tag: str, nonce: str) -> Path:
    """Where a checkpoint is put together; a name that no reader looks at."""
    return directory / f".{tag}{_PARTIAL}{nonce}"


def clear_partial(directory: Path, tag: str) -> None:
    """Removes what earlier, interrupted saves of this tag left."""
    for path in directory.glob(f".{_escaped(tag)}{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _escaped(tag: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", tag)


def write_file(path: Path, data: bytes) -> None:
    """Durable when it returns, and never seen in part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    _sync(path.parent)


def publish(partial: Path, target: Path) -> None:
    """`partial`, complete, becomes `target`; what was there before is removed afterwards. At every
    moment `target` is one or the other, whole."""
    _sync(partial)
    if target.exists():
        _exchange(partial, target)
        _sync(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        os.rename(partial, target)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd = -100
    result = libc.renameat2(
        at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if result == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise CheckpointError(f"{a} cannot take the place of {b}: {os.strerror(code)}")
    # A file system that cannot exchange (NFS): the old one is kept until the new one is there.
    old = a.with_name(f"{a.name}.old")
    os.rename(b, old)
    os.rename(a, b)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Reading.


def latest_tag(directory: Path) -> str | None:
    """What `latest` names; None where there is no such file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def read_manifest(folder: Path) -> Manifest:
    """CheckpointError where `folder` is missing, incomplete, or of another kind."""
    if not folder.is_dir():
        raise CheckpointError(f"Directory '{folder}' doesn't exist")
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if any(folder.glob("*_model_states.pt")):
            raise CheckpointError(
                f"{folder} was written by DeepSpeed; its files cannot be read yet: save the weights"
                " with DeepSpeed's zero_to_fp32.py, and load those"
            ) from None
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no checkpoint of zerod") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


class TensorReader:
    """Reads tensors of one folder, each checked against its checksum. One file is open at a time;
    memory is bounded by one tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._file: Any = None

    def read(self, entry: TensorEntry, shape: list[int] | None = None) -> torch.Tensor:
        path = self._folder / entry.file
        try:
            tensor = self._open(entry.file).get_tensor(entry.key)
        except Exception as error:  # safetensors has one kind for all
            raise CheckpointError(f"{path}: {entry.key!r} cannot be read: {error}") from error
        if shape is not None and list(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {entry.key!r} has the shape {list(tensor.shape)}, the manifest says "
                f"{shape}"
            )
        if crc32_of(tensor) != entry.crc32:
            raise CheckpointError(
                f"{path}: {entry.key!r} is damaged (its checksum differs): load another checkpoint"
            )
        return tensor

    def shape(self, entry: TensorEntry) -> list[int]:
        """Of the tensor, without reading it."""
        try:
            return list(self._open(entry.file).get_slice(entry.key).get_shape())
        except Exception as error:
            path = self._folder / entry.file
            raise CheckpointError(f"{path}: {entry.key!r} cannot be read: {error}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None
            self._name = ""

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if name != self._name:
            self.close()
            if os.path.basename(name) != name:
                raise CheckpointError(f"the manifest names a file outside of its folder: {name!r}")
            self._file = safe_open(self._folder / name, framework="pt", device="cpu")
            self._file.__enter__()
            self._name = name
        return self._file

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.close()


def fp32_weights(
    folder: Path, manifest: Manifest, exclude_frozen_parameters: bool = False
) -> Iterator[tuple[str, list[str], torch.Tensor]]:
    """(name, further names, float32 values) of every parameter, then of every buffer (in its own
    type), each read when it is asked for."""
    with TensorReader(folder) as reader:
        for parameter in manifest.parameters:
            if exclude_frozen_parameters and parameter.frozen:
                continue
            if parameter.weight is None:
                continue
            yield parameter.name, parameter.aliases, reader.read(
                parameter.weight, parameter.shape
            )
        for name, entry in manifest.buffers.items():
            yield name, [], reader.read(entry)
