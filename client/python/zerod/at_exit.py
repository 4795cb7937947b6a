# SPDX-License-Identifier: Apache-2.0
"""The end of the script: one that ran to its end leaves its jobs, any other end keeps their state.

An exception that nobody caught, sys.exit() with a failure, a signal and os._exit() are deaths to
the daemon: it keeps the state for whoever attaches next. A process of `multiprocessing` that was
forked ends by os._exit() always, but tells before whether its function has returned.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from typing import Any

_engines: list[Any] = []
_process = 0  # whose engines they are
_failed = False


def leave_at_exit(engine: Any) -> None:
    """`engine.leave()` is called when the process ends without an error."""
    global _process
    if _process != os.getpid():
        if not _process:
            sys.exit = _watched(sys.exit)  # type: ignore[assignment]
        _process = os.getpid()
        _engines.clear()  # of the process that this one was forked from
        atexit.register(_at_exit)
        if multiprocessing.parent_process() is not None:
            multiprocessing.util.Finalize(None, _at_end_of_child, exitpriority=0)
            _watch_interrupts()
    _engines.append(engine)


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


def _watch_interrupts() -> None:
    """torch.multiprocessing ends its processes by SIGINT, also when their parent is killed, and
    catches what that raises: the function has not returned then."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        return

    def interrupted(number: int, frame: Any) -> None:
        global _failed
        _failed = True
        before(number, frame)

    signal.signal(signal.SIGINT, interrupted)


def _at_end_of_child() -> None:
    """Runs while the error that ended the process's function, if there was one, passes by."""
    error = sys.exc_info()[1]
    clean = isinstance(error, SystemExit) and error.code in (None, 0, False)
    if error is None or clean:
        _at_exit()


def _at_exit() -> None:
    if os.getpid() != _process or _failed or getattr(sys, "last_value", None) is not None:
        return
    for engine in list(_engines):
        try:
            engine.leave()
        except Exception as error:  # the interpreter is ending: nobody could catch it
            print(f"zerod: leaving the job failed: {error}", file=sys.stderr)
