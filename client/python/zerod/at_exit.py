# SPDX-License-Identifier: Apache-2.0
"""The end of the script: one that ran to its end leaves its jobs, any other end keeps their state.

An exception that nobody caught, sys.exit() with a failure, a signal and os._exit() are deaths to
the daemon: it keeps the state for whoever attaches next.
"""

import atexit
import os
import sys
from typing import Any

_engines: list[Any] = []
_process = os.getpid()
_failed = False
_installed = False


def leave_at_exit(engine: Any) -> None:
    """`engine.leave()` is called when the interpreter ends without an error."""
    global _installed
    _engines.append(engine)
    if not _installed:
        _installed = True
        atexit.register(_at_exit)
        sys.exit = _watched(sys.exit)  # type: ignore[assignment]


def forget(engine: Any) -> None:
    """It has left already."""
    _engines[:] = [e for e in _engines if e is not engine]


def _watched(original: Any) -> Any:
    """sys.exit() that remembers whether it was given a failure."""

    def exit(status: Any = None, /) -> None:
        global _failed
        _failed = status not in (None, 0, False)
        original(status)

    return exit


def _at_exit() -> None:
    if os.getpid() != _process or _failed or getattr(sys, "last_value", None) is not None:
        return
    for engine in list(_engines):
        try:
            engine.leave()
        except Exception as error:  # the interpreter is ending: nobody could catch it
            print(f"zerod: leaving the job failed: {error}", file=sys.stderr)
