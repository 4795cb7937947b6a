# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.zero.Init`."""

from typing import Any

from zerod import zero_init
from zerod.as_deepspeed import distributed


class Init(zero_init.Init):
    """zerod.zero.Init, which also makes torch.distributed's default group where there is none, as
    scripts rely on: what they ask of it inside comes before deepspeed.initialize()."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        distributed.init_distributed()
        super().__init__(*args, **keywords)
