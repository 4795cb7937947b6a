# SPDX-License-Identifier: Apache-2.0
"""Runs a command in which `import deepspeed` finds zerod."""

import os
import sys

from zerod.as_deepspeed import path, prefixed

USAGE = """usage: python -m zerod.as_deepspeed COMMAND [ARGUMENT ...]
       python -m zerod.as_deepspeed --path

Runs COMMAND with a folder in front of PYTHONPATH, where `import deepspeed` finds zerod; --path
prints the folder. Zerod itself must be installed for the Python that COMMAND uses.
"""


def main(arguments: list[str]) -> int:
    if arguments == ["--path"]:
        print(path())
        return 0
    if arguments in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, end="", file=sys.stderr)
        return 2
    environment = dict(os.environ)
    environment["PYTHONPATH"] = prefixed(environment.get("PYTHONPATH", ""))
    try:
        os.execvpe(arguments[0], arguments, environment)
    except OSError as error:
        print(f"{arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
