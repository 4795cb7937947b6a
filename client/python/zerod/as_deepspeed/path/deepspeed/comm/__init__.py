# SPDX-License-Identifier: Apache-2.0
"""torch.distributed under DeepSpeed's name."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "comm":
        return importlib.import_module("deepspeed.comm.comm")
    return importlib.import_module("zerod.as_deepspeed.distributed").get(name)
