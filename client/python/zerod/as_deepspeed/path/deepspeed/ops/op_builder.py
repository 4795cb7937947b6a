# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's builders of extensions: nothing is compiled on the user's machine here."""

from zerod.as_deepspeed import face

_EXPORTS = {"AsyncIOBuilder": "deepspeed.ops.aio:AsyncIOBuilder"}
_NEVER = {
    name: "the building of DeepSpeed's extensions"
    for name in ("CPUAdamBuilder", "FusedAdamBuilder", "CPULionBuilder", "CPUAdagradBuilder")
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS, never=_NEVER)
