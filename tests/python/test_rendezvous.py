# SPDX-License-Identifier: Apache-2.0
"""Ranks that are started again agree on a name for their process group."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from zerod.as_deepspeed import rendezvous

WORLD = 3
LONG = timedelta(seconds=30)


def attempt(store, ranks=range(WORLD)) -> set[str]:
    with ThreadPoolExecutor(WORLD) as pool:
        return set(pool.map(lambda rank: rendezvous.agree(store, rank, WORLD, LONG), ranks))


def test_every_attempt_has_its_name():
    store = dist.HashStore()
    names = [attempt(store) for _ in range(3)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize("dead", range(WORLD))
def test_a_rank_that_dies_before_all_have_met(dead):
    """Its name is in the store, perhaps in a proposal; its successor takes its place."""
    store = dist.HashStore()
    attempt(store)
    store.set(f"start/{dead}", "0123456789abcdef")
    with ThreadPoolExecutor(WORLD) as pool:
        early = [pool.submit(rendezvous.agree, store, rank, WORLD, LONG)
                 for rank in range(WORLD) if rank != dead]
        if dead != 0:  # what rank 0 proposes holds the dead one's name
            proposed = threading.Event()
            for _ in range(3000):
                if b"0123456789abcdef" in store.get("proposal"):
                    break
                proposed.wait(0.01)
            assert b"0123456789abcdef" in store.get("proposal")
        assert not any(future.done() for future in early)
        successor = rendezvous.agree(store, dead, WORLD, LONG)
        assert {future.result() for future in early} == {successor}


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not come"):
        rendezvous.agree(store, 0, WORLD, timedelta(seconds=0.1))
