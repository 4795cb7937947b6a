# SPDX-License-Identifier: Apache-2.0
"""How the daemons of a job find each other: through the store that the launcher has anyway.

Local rank 0 of each node publishes its daemon's address; everybody reads all of them. The keys
hold the job and the node, not the attempt: torchrun counts restarts per node, so the nodes' counts
can differ, and a node would wait for a key that never comes. A key of an earlier attempt names the
same daemon, whose state the attempt came for. If that daemon was started anew at another address,
its shards are lost in any case, and the attach says so.
"""

import json
import os
import re
import secrets
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from zerod import _zerod
from zerod.launch import Launch

STORE_SECONDS_MAX = 600
_JOB = re.compile(r"[A-Za-z0-9._-]{1,128}")
_own_store: Any = None  # lives as long as the process: other ranks still read it
_own_name = ""  # of this launch, where nobody gave one


@dataclass(frozen=True)
class Peers:
    """The daemons' peer addresses by node rank, and the secret that the job's clients share."""

    addresses: list[str] = field(default_factory=list)
    job_token: str = ""


def job_id(configured: str, serial: int, launch: Launch) -> str:
    """The job's name: the config's, else ZEROD_JOB, else torchrun's run id, else a random one that
    is the same on all ranks and in all attempts of this launch.

    `serial`: how many engines of this process come before it; each needs a name of its own.
    """
    if configured:
        return _nth(configured, serial)
    name = os.environ.get("ZEROD_JOB") or os.environ.get("TORCHELASTIC_RUN_ID")
    if not name or name == "none":  # torchrun's run id where the user gave none
        global _own_name
        if not _own_name:
            _own_name = f"job-{secrets.token_hex(8)}"
            if launch.world > 1 or has_agent_store():
                # Not the launcher's address: the next launch has the same, and is another job.
                store = find_store(launch)
                _own_name = store.compare_set("zerod/name", "", _own_name).decode()
        name = _own_name
    if not _JOB.fullmatch(name):
        raise ValueError(
            f"the job id {name!r} is not allowed: 1 to 128 letters, digits, '.', '_' or '-'"
        )
    return _nth(name, serial)


def _nth(name: str, serial: int) -> str:
    return name if serial == 0 else f"{name}-{serial}"


def find_peers(job: str, launch: Launch, address: str) -> Peers:
    """All daemons' peer addresses. Waits for local rank 0 of every node, at most
    STORE_SECONDS_MAX."""
    if launch.nodes == 1:
        return Peers(job_token=os.environ.get("ZEROD_JOB_TOKEN", ""))
    static = [a.strip() for a in os.environ.get("ZEROD_PEERS", "").split(",") if a.strip()]
    token = os.environ.get("ZEROD_JOB_TOKEN", "")
    if static:
        if len(static) != launch.nodes:
            raise ValueError(f"ZEROD_PEERS names {len(static)} daemons for {launch.nodes} nodes")
        if not token:
            raise ValueError("with ZEROD_PEERS, ZEROD_JOB_TOKEN must be set, equal on all nodes")
        return Peers(static, token)
    store = find_store(launch)
    prefix = f"zerod/{job}"
    if launch.local_rank == 0:
        daemon = _zerod.ensure_daemon(address=address, job=job, node_rank=launch.node_rank)
        if not daemon.peer_address:
            raise RuntimeError(
                f"the daemon at {daemon.address} has no peer address: start it with --peer-listen"
            )
        value = {"peer_address": daemon.peer_address, "boot_id": daemon.boot_id,
                 "attempt": launch.attempt}
        store.set(f"{prefix}/daemon/{launch.node_rank}", json.dumps(value))
    # The first one to come chooses the secret; it stays for all attempts of this store.
    shared = store.compare_set(f"{prefix}/token", "", token or secrets.token_hex(16))
    keys = [f"{prefix}/daemon/{node}" for node in range(launch.nodes)]
    store.wait(keys, timedelta(seconds=STORE_SECONDS_MAX))
    addresses = [json.loads(store.get(key))["peer_address"] for key in keys]
    return Peers(addresses, shared.decode())


def find_store(launch: Launch) -> Any:
    """The launcher's store, else the default process group's, else one of our own next to it."""
    import torch.distributed as dist

    host = os.environ.get("MASTER_ADDR")
    port = os.environ.get("MASTER_PORT")
    timeout = timedelta(seconds=STORE_SECONDS_MAX)
    if has_agent_store() and host and port:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
    if dist.is_available() and dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if not host or not port:
        raise ValueError(
            f"{launch.world} ranks need MASTER_ADDR and MASTER_PORT, or ZEROD_JOB and (for several "
            "nodes) ZEROD_PEERS, to find each other: start the script with torchrun"
        )
    global _own_store
    if _own_store is None:
        _own_store = dist.TCPStore(
            host, int(port) + 1, is_master=launch.rank == 0, timeout=timeout, wait_for_workers=False
        )
    return _own_store


def has_agent_store() -> bool:
    """Whether torchrun's agents keep a store that outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
