# SPDX-License-Identifier: Apache-2.0
"""zerod: a model's training state in a daemon, used from PyTorch.

    engine, optimizer, loader, scheduler = zerod.initialize(model=model, config="config.json")
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

docs/pytorch.md says what of PyTorch works with it.
"""

from zerod._zerod import __version__
from zerod.collectives import all_reduce, barrier
from zerod.engine import Engine
from zerod.errors import (
    Aborted,
    AlreadyExists,
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
from zerod.fragments import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
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
from zerod.optimizer import SGD, Adagrad, Adam, AdamW, Lion
from zerod.schedule import WarmupLR

__all__ = [
    "SGD",
    "Aborted",
    "Adagrad",
    "Adam",
    "AdamW",
    "AlreadyExists",
    "DeadlineExceeded",
    "Engine",
    "FailedPrecondition",
    "GatheredParameters",
    "Internal",
    "InvalidArgument",
    "Lion",
    "Loader",
    "ModelError",
    "PermissionDenied",
    "ResourceExhausted",
    "Unavailable",
    "UserWriteError",
    "WarmupLR",
    "ZerodError",
    "__version__",
    "all_reduce",
    "barrier",
    "get_z3_leaf_modules",
    "initialize",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
]
