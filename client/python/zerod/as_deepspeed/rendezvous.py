# SPDX-License-Identifier: Apache-2.0
"""Which attempt of the ranks makes a process group together.

torchrun's agents keep one store over restarts (their static rendezvous does, and it is the
default), and torch puts the keys of all attempts in one place there: a rank may find the address of
a peer that is dead, and wait for it for ever. Counts of restarts cannot tell attempts apart: every
agent has its own. So the ranks agree on who is there before they make the group.
"""

import hashlib
import secrets
import time
from datetime import timedelta
from typing import Any

_LOOK_SECONDS = 0.01


def agree(store: Any, rank: int, world: int, timeout: timedelta) -> str:
    """A name that these `world` processes have and no earlier ones had.

    Rank 0 proposes whoever has written its name last; all who find themselves in the proposal
    acknowledge it; with everybody's acknowledgement it holds. A rank that was started again has
    another name, so a proposal with its predecessor is never acknowledged by all, and is replaced.
    TimeoutError after `timeout`.
    """
    me = secrets.token_hex(8)
    store.set(f"start/{rank}", me)
    deadline = time.monotonic() + timeout.total_seconds()
    starts = [f"start/{i}" for i in range(world)]
    proposed = acknowledged = ""
    while time.monotonic() < deadline:
        if rank == 0 and store.check(starts):
            newest = ",".join(store.get(key).decode() for key in starts)
            if newest != proposed:
                proposed = newest
                store.set("proposal", proposed)
        proposal = store.get("proposal").decode() if store.check(["proposal"]) else ""
        if me in proposal.split(","):
            name = hashlib.sha256(proposal.encode()).hexdigest()[:16]
            if proposal != acknowledged:
                acknowledged = proposal
                store.add(f"acknowledged/{name}", 1)
            if store.add(f"acknowledged/{name}", 0) == world:
                return name
        time.sleep(_LOOK_SECONDS)
    missing = [i for i, key in enumerate(starts) if not store.check([key])]
    who = f"ranks {missing} have not come" if missing else "a rank has died meanwhile"
    raise TimeoutError(
        f"{world} ranks did not meet within {timeout.total_seconds():.0f} s: {who}"
    )
