# SPDX-License-Identifier: Apache-2.0
"""What zerod raises.

The daemon's answers are `ZerodError` and its subclasses, one for each canonical code, with the
daemon's own sentence. What this package finds out by itself is raised as the classes below.
"""

from zerod._zerod import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    ZerodError,
)


class ModelError(ValueError):
    """The model, or an optimizer for it, has something that cannot be served."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class UserWriteError(RuntimeError):
    """A parameter was re-pointed outside `GatheredParameters`."""


__all__ = [
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
]
