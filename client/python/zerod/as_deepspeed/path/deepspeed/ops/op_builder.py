# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's builders of extensions: nothing is compiled on the user's machine here."""

from zerod.as_deepspeed import face

_BUILDERS = (
    "OpBuilder",
    "CPUAdamBuilder",
    "CPUAdagradBuilder",
    "CPULionBuilder",
    "FusedAdamBuilder",
    "FusedLambBuilder",
    "FusedLionBuilder",
)
_EXPORTS = {
    "AsyncIOBuilder": "deepspeed.ops.aio:AsyncIOBuilder",
    **{name: f"zerod.as_deepspeed.builders:{name}" for name in _BUILDERS},
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
