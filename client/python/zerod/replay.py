# SPDX-License-Identifier: Apache-2.0
"""A script that knows nothing of resuming, started again over a job that stands at step k.

It begins with its first batch. So the engine lets it run up to where the job stands: forward runs
without gradients, backward() and step() do nothing but count, and the schedule moves as it did.
With the k-th step the client's own state (random generators, buffers, schedule, what the user
added) is what was committed with step k, and training goes on: with the same data, where the
script's order of data follows from its seed. Evaluation within these steps sees the weights of
step k. It costs the forward passes of k steps.
"""

import logging
from typing import Any

log = logging.getLogger("zerod")


class Replay:
    """Counts the steps up to `until`, of which those in `skipped` were not applied."""

    def __init__(self, until: int, skipped: set[int], rank: int) -> None:
        self.until = until
        self._skipped = skipped
        self._rank = rank
        if rank == 0:
            log.warning(
                "the job stands at step %d: the script is let run up to there without training",
                until,
            )

    def was_skipped(self, step: int) -> bool:
        return step in self._skipped

    def ends_with(self, step: int) -> bool:
        if step == self.until and self._rank == 0:
            log.warning("the script has come to step %d: training goes on", step)
        return step >= self.until


def choose(config: dict[str, Any], written_for_deepspeed: bool) -> bool:
    """Whether a resumed job replays: `zerod.restart`, else whether the script was written for
    DeepSpeed, where nothing tells it to resume."""
    restart = config["zerod"].get("restart")
    return written_for_deepspeed if restart is None else restart == "replay"
