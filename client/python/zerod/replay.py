# SPDX-License-Identifier: Apache-2.0
"""A script that knows nothing of resuming, started again over a job that stands at step k.

It begins with its first batch. So the engine lets it run up to where the job stands: forward runs
without gradients, backward() and step() do nothing but count, and the schedule moves as it did.
With the k-th step the client's own state (random generators, buffers, schedule, what the user
added) is what was committed with step k, and training goes on: with the same data, where the
script's order of data follows from its seed. Evaluation within these steps sees the weights of
step k. It costs the forward passes of k steps.

Nothing that the script writes on the way reaches the job: it wrote it before. A checkpoint on the
way is left as it is where it is there; where it is gone, what is written is the job's state, so
that a script that deletes old ones always has one to go on from.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerod.engine import Engine

log = logging.getLogger("zerod")


class Replay:
    """Counts the steps up to `until`, of which those in `skipped` were not applied."""

    def __init__(self, until: int, skipped: set[int], rank: int) -> None:
        self.until = until
        self._skipped = skipped
        self._rank = rank
        self._told: set[str] = set()
        if rank == 0:
            log.warning(
                "the job stands at step %d: the script is let run up to there without training",
                until,
            )

    def was_skipped(self, step: int) -> bool:
        return step in self._skipped

    @property
    def skipped_steps(self) -> int:
        return len(self._skipped)

    def ends_with(self, step: int) -> bool:
        if step == self.until and self._rank == 0:
            log.warning("the script has come to step %d: training goes on", step)
        return step >= self.until

    def tell(self, what: str) -> None:
        """Once for each `what`."""
        if self._rank == 0 and what not in self._told:
            log.warning(
                "%s before step %d, where the job stands, changes nothing: the job's weights and "
                "optimizer state stay", what, self.until,
            )
        self._told.add(what)


class Replaying:
    """The part of Engine that lets a script come to where the job stands."""

    _replay: Replay | None

    @property
    def replaying(self) -> bool:
        """The script has not come to the job's step yet: nothing is trained."""
        return self._replay is not None

    @property
    def replay_until(self) -> int:
        """The step, as the script counts, that the job stands at. REQUIRES: replaying."""
        assert self._replay is not None
        return self._replay.until

    @property
    def job_steps(self: "Engine") -> tuple[int, int]:  # type: ignore[misc]
        """The steps that the job has made, and how many of them were skipped."""
        if self._replay is not None:
            return self._replay.until, self._replay.skipped_steps
        return self.global_steps, self.skipped_steps

    def passes_over(self, what: str) -> bool:
        """Whether `what` the script writes to the job was written before, and is told so."""
        if self._replay is not None:
            self._replay.tell(what)
        return self._replay is not None

    def replay_from(
        self: "Engine",  # type: ignore[misc]
        state: dict[str, Any],
        same_world: bool,
        lr_scheduler: bool,
        groups: bool,
    ) -> None:
        """The script has loaded a checkpoint of a step that the job has passed, or stands at."""
        self.restore_rank_state(state, same_world, lr_scheduler, groups)
        if self.global_steps >= self.replay_until:
            self._replay = None
            self._resume()

    def stop_replay(self) -> None:
        """The script has put other state into the job: there is nothing to come to."""
        self._replay = None

    def _plan_replay(self: "Engine") -> Replay:  # type: ignore[misc]
        parts = self._state.peek(self.client.client_state())
        until = parts["global_steps"] + 1
        skipped = parts["skipped_at"] + [until] * self.client.resumed_skipped
        return Replay(until, set(skipped), self.global_rank)

    def _replay_step(
        self: "Engine", replay: Replay, lr_kwargs: dict[str, Any]  # type: ignore[misc]
    ) -> None:
        self.gathering.reset()
        self.micro_steps += 1
        self.global_steps += 1
        # There is no gradient, but a script that prints its norm goes on.
        self._grad_norm = math.nan if self.computes_grad_norm() else None
        skipped = replay.was_skipped(self.global_steps)
        self.skipped_steps += int(skipped)
        self._step_applied = not skipped
        if replay.ends_with(self.global_steps):
            self._replay = None
            self._resume()
            self._tell_optimizer(overflow=skipped)
            return
        self._tell_optimizer(overflow=skipped)
        if not skipped:
            self._count_applied(lr_kwargs)


def choose(config: dict[str, Any], written_for_deepspeed: bool) -> bool:
    """Whether a resumed job replays: `zerod.restart`, else whether the script was written for
    DeepSpeed, where nothing tells it to resume."""
    restart = config["zerod"].get("restart")
    return written_for_deepspeed if restart is None else restart == "replay"
