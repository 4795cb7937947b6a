# SPDX-License-Identifier: Apache-2.0
"""What the daemon is told of a model: its modules, its parameters and who uses them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from zerod import _zerod
from zerod.errors import ModelError
from zerod.external import external_parameters
from zerod.leaf import z3_leaf_module

log = logging.getLogger("zerod")
# Modules that read parameters of their children without calling them: one piece to us.
_ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Modules without a forward of their own: whoever holds them uses their parameters.
_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ManagedParameter:
    """One parameter, with everything that this package needs to know of it."""

    index: int
    name: str  # the first of its names
    parameter: nn.Parameter
    trainable: bool  # it requires a gradient and is in a group of the optimizer
    frozen: bool  # it required no gradient
    group: int
    owners: list[str]  # paths of the modules that use it, as the daemon is told
    registered: list[tuple[nn.Module, str]]  # (module, attribute) pairs
    shape: tuple[int, ...] = ()
    elements: int = 0
    dtype: torch.dtype = torch.float32  # of the job's copies


@dataclass
class ModelDescription:
    """Parallel to what Client.attach() takes; `parameters` keeps torch's order."""

    modules: list[_zerod.ModuleInfo] = field(default_factory=list)
    parameters: list[ManagedParameter] = field(default_factory=list)

    def parameter_infos(self) -> list[_zerod.ParameterInfo]:
        return [
            _zerod.ParameterInfo(p.name, list(p.shape), p.trainable, p.group, p.owners)
            for p in self.parameters
        ]


def describe(
    model: nn.Module, dtype: torch.dtype, optimizer: torch.optim.Optimizer | None
) -> ModelDescription:
    """Walks the model. ModelError names what cannot be served, and what to do about it.

    Trainable is what requires a gradient and is in a group of `optimizer`.
    """
    groups = _groups(model, optimizer)
    description = ModelDescription()
    owner_of: dict[str, str] = {}
    for path, module in model.named_modules():
        _check_module(path, module)
        owner = _owner(path, module, owner_of, model)
        owner_of[path] = owner
        if owner == path or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            description.modules.append(
                _zerod.ModuleInfo(
                    path,
                    _type_name(module),
                    isinstance(module, _CONTAINERS),
                    leaf=z3_leaf_module(module),
                )
            )
    by_identity: dict[int, ManagedParameter] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            managed = by_identity.get(id(parameter))
            if managed is None:
                name = f"{path}.{attribute}" if path else attribute
                _check_parameter(name, parameter, dtype)
                group = groups.get(id(parameter))
                managed = ManagedParameter(
                    index=len(description.parameters),
                    name=name,
                    parameter=parameter,
                    trainable=parameter.requires_grad and group is not None,
                    frozen=not parameter.requires_grad,
                    group=group or 0,
                    owners=[],
                    registered=[],
                    shape=tuple(parameter.shape),
                    elements=parameter.numel(),
                    dtype=dtype,
                )
                by_identity[id(parameter)] = managed
                description.parameters.append(managed)
            managed.registered.append((module, attribute))
            if owner_of[path] not in managed.owners:
                managed.owners.append(owner_of[path])
    if not description.parameters:
        raise ModelError("the model has no parameters")
    for path, module in model.named_modules():
        for parameter in external_parameters(module):
            managed = by_identity.get(id(parameter))
            if managed is None:
                log.warning(
                    "the module %r was said to use a parameter of shape %s that the model does "
                    "not have", path, tuple(parameter.shape),
                )
                continue
            if owner_of[path] not in managed.owners:
                managed.owners.append(owner_of[path])
    return description


def callable_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, or the nearest one around it that has a forward."""
    while path and isinstance(model.get_submodule(path), _HOLDERS):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def paths_of(model: nn.Module) -> dict[int, list[str]]:
    """All paths of every module, by identity: a module can be registered several times."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def tensors_in(value: object, depth: int = 8) -> Iterator[torch.Tensor]:
    """The tensors of nested tuples, lists, dicts (so also ModelOutput) and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float)):
        return
    elif isinstance(value, dict) or hasattr(value, "items") and hasattr(value, "keys"):
        for item in value.values():  # type: ignore[attr-defined]
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None), depth - 1)


def _owner(path: str, module: nn.Module, owner_of: dict[str, str], model: nn.Module) -> str:
    """The path of the module whose forward reads the parameters that `module` registers."""
    if not path:
        return path
    parent = path.rpartition(".")[0]
    around = owner_of[parent]
    if isinstance(module, _HOLDERS):
        # Its own parameters are its holder's; its children are their own.
        return around
    if around != parent and not isinstance(model.get_submodule(parent), _HOLDERS):
        return around  # inside an atomic module
    if _is_atomic(model.get_submodule(around)) and path.startswith(f"{around}." if around else ""):
        return around
    return path


def _is_atomic(module: nn.Module) -> bool:
    return isinstance(module, _ATOMIC) or hasattr(module, "parametrizations")


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    known = {id(p): name for name, p in model.named_parameters()}
    groups: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer else []):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ModelError(
                    f"parameter group {index} has a parameter of shape {tuple(parameter.shape)} "
                    "that the model does not have"
                )
            groups[id(parameter)] = index
    return groups


def _check_module(path: str, module: nn.Module) -> None:
    what = f"the module {path!r}" if path else f"the model ({type(module).__name__})"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        raise ModelError(
            f"{what} makes sparse gradients, which are not served: pass sparse=False"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise ModelError(
            f"{what} writes into its weights in forward (max_norm), where they are "
            "read-only: leave max_norm out, and scale what forward looked up"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{what} is TorchScript, which runs no hooks: pass what it was made of"
        )


def _check_parameter(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
        raise ModelError(f"the parameter {name!r} is lazy: run the model once before initialize()")
    if parameter.device.type != "cpu":
        raise ModelError(f"the parameter {name!r} is on {parameter.device}; only the CPU is served")
    if parameter.dtype not in _DTYPES:
        raise ModelError(
            f"the parameter {name!r} is {parameter.dtype}; float32, bfloat16 and float16 are "
            "served. What is not trained can be a buffer"
        )
    if parameter.dtype != torch.float32 and dtype == torch.float32:
        kind = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
        raise ModelError(
            f"the parameter {name!r} is {parameter.dtype} in a float32 job: set {kind}.enabled, or "
            "call model.float() first"
        )
