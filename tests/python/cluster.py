# SPDX-License-Identifier: Apache-2.0
"""Real daemons and real ranks for tests: every process is ended by pid, every wait has a limit."""

import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START_SECONDS_MAX = 30
RUN_SECONDS_MAX = 240


def daemon_binary() -> Path | None:
    """ZEROD_BINARY, else the newest build of the tree."""
    if os.environ.get("ZEROD_BINARY"):
        return Path(os.environ["ZEROD_BINARY"])
    built = [p for p in ROOT.glob("build/*/daemon/server/zerod") if p.is_file()]
    release = ROOT / "build/release/daemon/server/zerod"
    if release in built:
        return release
    return max(built, key=lambda p: p.stat().st_mtime, default=None)


def zerodctl_binary() -> Path:
    """Of the same build."""
    binary = daemon_binary()
    assert binary is not None, "the daemon is not built: run scripts/setup"
    return binary.parents[2] / "client/ctl/zerodctl"


def metric(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    total = 0.0
    for line in text.splitlines():
        if line.split("{")[0].split(" ")[0] == name and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            total += float(line.rsplit(" ", 1)[1])
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Daemon:
    """One zerod process in a folder of its own."""

    def __init__(self, *flags: str, wrapper: tuple[str, ...] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zerod-test-"))
        self.address = f"unix:{self.folder}/zerod.sock"
        self.peer = f"127.0.0.1:{free_port()}"
        self.metrics = f"127.0.0.1:{free_port()}"
        self.log = self.folder / "log"
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(self.folder / "notify"))
        notify.settimeout(START_SECONDS_MAX)
        binary = daemon_binary()
        assert binary is not None, "the daemon is not built: run scripts/setup"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*wrapper, str(binary), "--socket", f"{self.folder}/zerod.sock",
                 "--peer-listen", self.peer, "--metrics-listen", self.metrics,
                 "--drain-seconds", "0", *flags],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {"NOTIFY_SOCKET": str(self.folder / "notify")},
            )
        try:
            while b"READY=1" not in notify.recv(4096):
                pass
        except TimeoutError:
            self.kill()
            raise AssertionError(f"the daemon did not start: {self.log.read_text()}") from None
        finally:
            notify.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Its metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        return metric(self.metrics, name, **labels)

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError("the daemon did not end on SIGTERM") from None
        code = self.process.returncode
        log = self.log.read_text(errors="replace")
        shutil.rmtree(self.folder)
        assert code in (0, -signal.SIGKILL), f"the daemon ended with {code}:\n{log[-4000:]}"


@contextlib.contextmanager
def daemons(count: int, *flags: str):
    """That many nodes. The log of each is shown where the test fails."""
    running = []
    try:
        for _ in range(count):
            running.append(Daemon(*flags))
        yield running
    except BaseException:
        for daemon in running:
            print(f"--- daemon {daemon.pid}\n{daemon.log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        for daemon in running:
            daemon.stop()


class Rank:
    """A process that runs `function` of a module in this folder; its result is pickled back."""

    def __init__(self, function: str, arguments: dict, environment: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zerod-rank-"))
        self.result_path = self.folder / "result"
        self.output = self.folder / "output"
        (self.folder / "arguments").write_bytes(pickle.dumps(arguments))
        paths = [str(HERE), str(ROOT / "client/python"), str(ROOT / "examples")]
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "rank_main.py"), function, str(self.folder)],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}
                | environment,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, seconds: float = RUN_SECONDS_MAX) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            text = self.output.read_text(errors="replace")[-4000:]
            raise AssertionError(f"rank {self.pid} did not end in {seconds} s:\n{text}") from None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def result(self, seconds: float = RUN_SECONDS_MAX):
        """AssertionError with its output where it failed."""
        code = self.wait(seconds)
        if code != 0 or not self.result_path.exists():
            raise AssertionError(f"rank {self.pid} ended with {code}:\n{self.text()[-6000:]}")
        return pickle.loads(self.result_path.read_bytes())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def place(nodes, rank: int, world: int, job: str, attempt: int = 0) -> dict[str, str]:
    """The environment of one rank: ranks are dealt to the nodes in order."""
    local_world = world // len(nodes)
    node = rank // local_world
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % local_world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "GROUP_RANK": str(node),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "ZEROD_ADDRESS": nodes[node].address,
        "ZEROD_PEERS": ",".join(d.peer for d in nodes) if len(nodes) > 1 else "",
        "ZEROD_JOB": job,
        "ZEROD_JOB_TOKEN": "a token of the tests",
    }


@contextlib.contextmanager
def ranks(function: str, nodes, world: int, job: str = "test", attempt: int = 0, **arguments):
    """`world` running ranks; whatever still runs at the end is killed."""
    running = []
    try:
        for rank in range(world):
            environment = place(nodes, rank, world, job, attempt)
            running.append(Rank(function, arguments, environment))
        yield running
    finally:
        for rank in running:
            rank.close()


def run(function: str, nodes, world: int, job: str = "test", **arguments) -> list:
    """The results of all ranks. The first that fails ends the others."""
    with ranks(function, nodes, world, job, **arguments) as running:
        wait_all(running)
        return [rank.result() for rank in running]


def run_alone(function: str, **arguments):
    """The result of one process that needs no daemon."""
    rank = Rank(function, arguments, {})
    try:
        return rank.result()
    finally:
        rank.close()


def wait_any(running, seconds: float = RUN_SECONDS_MAX) -> Rank:
    """The first that ends."""
    poller = select.poll()
    fds = {os.pidfd_open(rank.pid): rank for rank in running}
    try:
        for fd in fds:
            poller.register(fd, select.POLLIN)
        ready = poller.poll(seconds * 1000)
        assert ready, f"none of the ranks ended in {seconds} s:\n{running[0].text()[-3000:]}"
        return fds[ready[0][0]]
    finally:
        for fd in fds:
            os.close(fd)


def wait_all(running, seconds: float = RUN_SECONDS_MAX) -> None:
    """Until all have ended, or one with a failure: its output is the message."""
    poller = select.poll()
    fds = {}
    for rank in running:
        fd = os.pidfd_open(rank.pid)
        fds[fd] = rank
        poller.register(fd, select.POLLIN)
    try:
        left = dict(fds)
        while left:
            ready = poller.poll(seconds * 1000)
            if not ready:
                texts = "\n".join(f"--- {r.pid}\n{r.text()[-1500:]}" for r in left.values())
                raise AssertionError(f"ranks did not end in {seconds} s:\n{texts}")
            for fd, _ in ready:
                poller.unregister(fd)
                rank = left.pop(fd)
                if rank.wait() != 0:
                    # The others may have the cause.
                    texts = "\n".join(f"--- {r.pid}\n{r.text()[-3000:]}" for r in running)
                    raise AssertionError(f"rank {rank.pid} ended with {rank.wait()}:\n{texts}")
    finally:
        for fd in fds:
            os.close(fd)


def read_lines(path: Path) -> list[dict]:
    """Complete lines of a file of JSON lines, [] where it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]
