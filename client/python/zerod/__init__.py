# SPDX-License-Identifier: Apache-2.0
"""zerod: a model's training state in a daemon, used from PyTorch.

    engine, optimizer, loader, scheduler = zerod.initialize(model=model, config="config.json")
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

docs/pytorch.md says what of PyTorch works with it; docs/from-deepspeed.md how a script that was
written for DeepSpeed runs on it. Names are loaded when they are first used: importing the package
costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerod import zero
    from zerod._zerod import __version__
    from zerod.as_deepspeed import enable_as_deepspeed
    from zerod.collectives import all_reduce, barrier
    from zerod.engine import Engine
    from zerod.errors import (
        Aborted,
        AlreadyExists,
        CheckpointError,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        ModelError,
        PermissionDenied,
        ResourceExhausted,
        Unavailable,
        UserWriteError,
        ZerodError,
    )
    from zerod.external import register_external_parameter, unregister_external_parameter
    from zerod.fragments import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )
    from zerod.gathered import GatheredParameters
    from zerod.initialization import initialize
    from zerod.leaf import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        z3_leaf_module,
    )
    from zerod.loader import Loader
    from zerod.optimizer import SGD, Adagrad, Adam, AdamW, Lamb, Lion, Muon
    from zerod.parameter_status import ZeroParamStatus
    from zerod.schedule import WarmupLR
    from zerod.torch_optimizers import ASGD, Adadelta, Adamax, NAdam, RAdam, RMSprop, Rprop

_HOMES = {
    "_zerod": ("__version__",),
    "as_deepspeed": ("enable_as_deepspeed",),
    "collectives": ("all_reduce", "barrier"),
    "engine": ("Engine",),
    "errors": (
        "Aborted",
        "AlreadyExists",
        "CheckpointError",
        "DeadlineExceeded",
        "FailedPrecondition",
        "Internal",
        "InvalidArgument",
        "ModelError",
        "PermissionDenied",
        "ResourceExhausted",
        "Unavailable",
        "UserWriteError",
        "ZerodError",
    ),
    "external": ("register_external_parameter", "unregister_external_parameter"),
    "fragments": (
        "safe_get_full_fp32_param",
        "safe_get_full_grad",
        "safe_get_full_optimizer_state",
        "safe_get_local_fp32_param",
        "safe_get_local_grad",
        "safe_get_local_optimizer_state",
        "safe_set_full_fp32_param",
        "safe_set_full_grad",
        "safe_set_full_optimizer_state",
        "safe_set_local_fp32_param",
        "safe_set_local_grad",
        "safe_set_local_optimizer_state",
        "safe_update_full_grad_vectorized",
    ),
    "gathered": ("GatheredParameters",),
    "initialization": ("initialize",),
    "leaf": (
        "get_z3_leaf_modules",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "unset_z3_leaf_modules",
        "z3_leaf_module",
    ),
    "loader": ("Loader",),
    "optimizer": ("SGD", "Adagrad", "Adam", "AdamW", "Lamb", "Lion", "Muon"),
    "parameter_status": ("ZeroParamStatus",),
    "schedule": ("WarmupLR",),
    "torch_optimizers": ("ASGD", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "zero"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "zero":
        return importlib.import_module("zerod.zero")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'zerod' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zerod.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
