# SPDX-License-Identifier: Apache-2.0
"""Starts ranks and daemons of one run in network namespaces of its own, and counts its bytes."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DAEMON = ROOT / "build/release/daemon/server/zerod"
WORKER = Path(__file__).with_name("worker.py")
RUN_SECONDS_MAX = 600


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Network:
    """One namespace with loopback only, or two joined by a veth pair, optionally shaped."""

    def __init__(self, nodes: int, rate_mbit: int | None):
        tag = secrets.token_hex(3)
        self.names = [f"zd{tag}{n}" for n in range(nodes)]
        self.interfaces = ["lo"] if nodes == 1 else [f"v{tag}{n}" for n in range(nodes)]
        self.addresses = ["127.0.0.1"] if nodes == 1 else ["10.77.0.1", "10.77.0.2"]
        self.rate_mbit = rate_mbit

    def __enter__(self):
        for name in self.names:
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        if len(self.names) == 2:
            a, b = self.interfaces
            sh("ip", "link", "add", a, "netns", self.names[0], "type", "veth", "peer", "name", b,
               "netns", self.names[1])
            for name, interface, address in zip(self.names, self.interfaces, self.addresses):
                sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", interface)
                sh("ip", "-n", name, "link", "set", interface, "up")
                if self.rate_mbit:
                    sh("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", interface, "root",
                       "tbf", "rate", f"{self.rate_mbit}mbit", "burst", "512kb", "latency", "100ms")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def bytes_sent(self) -> int:
        """Over the interfaces between ranks, all nodes together."""
        total = 0
        for name, interface in zip(self.names, self.interfaces):
            text = sh("ip", "-n", name, "-s", "-j", "link", "show", interface)
            total += json.loads(text)[0]["stats64"]["tx"]["bytes"]
        return total


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pinned(cpu: int | None) -> list[str]:
    return [] if cpu is None else ["taskset", "-c", str(cpu)]


class Run:
    """One run of one system: `ranks` processes over the network's nodes, daemons for zerod."""

    def __init__(self, network: Network, system: str, ranks: int, arguments: list[str],
                 worker_threads: int = 0, worker: Path = WORKER, python: str = sys.executable,
                 extra: dict[str, str] | None = None):
        """`worker`, run by `python` with the variables `extra`, speaks as worker.py does."""
        self.network, self.system, self.ranks = network, system, ranks
        self.arguments = arguments
        self.worker_threads = worker_threads
        self.worker, self.python, self.extra = worker, python, extra or {}
        self.folder = Path(tempfile.mkdtemp(prefix="zerod-bench-"))
        self.daemons: list[subprocess.Popen] = []
        self.workers: list[subprocess.Popen] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.workers + self.daemons:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.workers + self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        nodes = len(self.network.names)
        cpus = os.cpu_count() or 1
        per_node = self.ranks // nodes
        environment = dict(os.environ, PYTHONPATH=str(ROOT / "client/python"),
                           MASTER_ADDR=self.network.addresses[0], MASTER_PORT=str(free_port()),
                           WORLD_SIZE=str(self.ranks), LOCAL_WORLD_SIZE=str(per_node),
                           OMP_NUM_THREADS="1", ZEROD_JOB=f"bench-{secrets.token_hex(4)}",
                           ZEROD_JOB_TOKEN=secrets.token_hex(16)) | self.extra
        if self.system == "zerod":
            self._start_daemons(nodes, environment)
        for rank in range(self.ranks):
            node = rank // per_node
            env = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank % per_node),
                       GROUP_RANK=str(node), GLOO_SOCKET_IFNAME=self.network.interfaces[node])
            if self.system == "zerod":
                env["ZEROD_ADDRESS"] = f"unix:{self.folder}/node{node}/zerod.sock"
            command = ["ip", "netns", "exec", self.network.names[node], *pinned(rank % cpus),
                       self.python, str(self.worker), "--system", self.system, *self.arguments]
            log = open(self.folder / f"rank{rank}.log", "w")
            self.workers.append(subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE if rank == 0 else log, stderr=log,
                text=True))

    def _start_daemons(self, nodes: int, environment: dict):
        addresses = []
        for node in range(nodes):
            home = self.folder / f"node{node}"
            home.mkdir()
            address = f"{self.network.addresses[node]}:{20000 + secrets.randbelow(20000)}"
            addresses.append(address)
            command = ["ip", "netns", "exec", self.network.names[node],
                       *pinned(None if nodes == 1 else node % (os.cpu_count() or 1)),
                       str(DAEMON), "--socket", str(home / "zerod.sock"), "--peer-listen", address,
                       "--insecure-peers", "--metrics-listen", "", "--worker-threads",
                       str(self.worker_threads), "--log-file", str(home / "log")]
            self.daemons.append(subprocess.Popen(command))
        deadline = time.monotonic() + 20
        for node in range(nodes):
            while not (self.folder / f"node{node}/zerod.sock").exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the daemon of node {node} did not start")
                time.sleep(0.02)
        if nodes > 1:
            environment["ZEROD_PEERS"] = ",".join(addresses)

    def follow(self, on_mark=lambda mark: None) -> dict:
        """Reads rank 0's lines to the end; returns its result with the bytes of each step."""
        sent, result = [], None
        deadline = time.monotonic() + RUN_SECONDS_MAX
        for line in self.workers[0].stdout:
            if not line.startswith("{"):
                continue
            record = json.loads(line)
            if record["mark"] in ("step", "end"):
                sent.append(self.network.bytes_sent())
                on_mark(record)
            elif record["mark"] == "result":
                result = record
            if time.monotonic() > deadline:
                raise RuntimeError("the run took too long")
        for rank, worker in enumerate(self.workers):
            if worker.wait(60) != 0:
                raise RuntimeError(f"rank {rank} of {self.system} failed:\n"
                                   + (self.folder / f"rank{rank}.log").read_text()[-3000:])
        steps = [b - a for a, b in zip(sent, sent[1:])]
        result["bytes"] = steps[-len(result["seconds"]):]
        return result

    def pids(self) -> list[int]:
        return [p.pid for p in self.workers + self.daemons]


def median(values) -> float:
    return statistics.median(values)
