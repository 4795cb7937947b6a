# SPDX-License-Identifier: Apache-2.0
"""`disable_python_gc`: the cyclic garbage collector stands still while an engine wants it to."""

import gc

_holders = 0
_was_enabled = False


def pause() -> None:
    global _holders, _was_enabled
    if _holders == 0:
        _was_enabled = gc.isenabled()
        gc.disable()
    _holders += 1


def resume() -> None:
    """Once for each pause(): after the last it is as it was before the first."""
    global _holders
    _holders -= 1
    if _holders == 0 and _was_enabled:
        gc.enable()
