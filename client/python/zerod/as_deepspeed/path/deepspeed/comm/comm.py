# SPDX-License-Identifier: Apache-2.0
"""deepspeed.comm by its longer name."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return importlib.import_module("zerod.as_deepspeed.distributed").get(name)
