# SPDX-License-Identifier: Apache-2.0
"""Scripts that were written for DeepSpeed, on zerod: docs/from-deepspeed.md.

    python -m zerod.as_deepspeed accelerate launch train.py    # in front of a command
    export PYTHONPATH=$(python -m zerod.as_deepspeed --path):$PYTHONPATH
    zerod.enable_as_deepspeed()                                # at the top of the script

Each puts one folder in front of Python's path. It holds a package `deepspeed` and its metadata,
which Accelerate and Transformers look for; the package has names only and takes everything from
here. Nothing is in anybody's way until then.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path


_LOOKING_ONCE = ("accelerate", "transformers.integrations.deepspeed")


def path() -> str:
    """The folder that belongs in front of PYTHONPATH."""
    return str(Path(__file__).resolve().parent / "path")


def enable_as_deepspeed() -> None:
    """In this process and those it starts, `import deepspeed` finds zerod. Idempotent.

    RuntimeError where it comes too late: another package of that name is loaded already, or
    Accelerate or Transformers, which look once whether there is one.
    """
    loaded = sys.modules.get("deepspeed")
    if loaded is not None and not (loaded.__file__ or "").startswith(path()):
        raise RuntimeError(
            f"deepspeed is loaded already, from {loaded.__file__}: call "
            "zerod.enable_as_deepspeed() before anything imports it"
        )
    if path() not in sys.path:
        if importlib.util.find_spec("deepspeed") is None:
            for name in _LOOKING_ONCE:
                if name in sys.modules:
                    raise RuntimeError(
                        f"{name} is loaded already, and has found no deepspeed: call "
                        "zerod.enable_as_deepspeed() at the top of the script"
                    )
        sys.path.insert(0, path())
    os.environ["PYTHONPATH"] = prefixed(os.environ.get("PYTHONPATH", ""))
    importlib.invalidate_caches()


def prefixed(python_path: str) -> str:
    """PYTHONPATH with the folder in front."""
    rest = [part for part in python_path.split(os.pathsep) if part and part != path()]
    return os.pathsep.join([path(), *rest])
