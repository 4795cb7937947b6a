# SPDX-License-Identifier: Apache-2.0
"""The processes of the demo: daemons, launchers and trainers, all ended by pid."""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZEROD = Path(os.environ.get("ZEROD_BINARY") or ROOT / "build/release/daemon/server/zerod")
START_SECONDS_MAX = 30
END_SECONDS_MAX = 20
STEP_SECONDS_MAX = 120
SAY_SECONDS = 10
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_progress(path: Path) -> list[dict]:
    """The steps that rank 0 has reported so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def pss_bytes(pid: int) -> int:
    """Memory of a process, shared pages divided among those who map them; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+)", text, re.M)
    return int(found.group(1)) * 1024 if found else 0


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    result = []
    for child in children(pid):
        result += [child, *descendants(child)]
    return result


class Cluster:
    """The daemons: one per node, each with a socket, peer port and metrics port of its own."""

    def __init__(self, nodes: int, output: Path, folder: str) -> None:
        self.nodes = nodes
        self.output = output
        self.folder = Path(folder)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.metrics: list[str] = []
        self._samples: list[dict] = [{} for _ in range(nodes)]

    def address(self, node: int) -> str:
        return f"unix:{self.folder}/{node}/zerod.sock"

    def __enter__(self) -> "Cluster":
        try:
            for node in range(self.nodes):
                self._start(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, node: int) -> None:
        folder = self.folder / str(node)
        folder.mkdir(mode=0o700)
        self.metrics.append(f"127.0.0.1:{free_port()}")
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(folder / "notify"))
        notify.settimeout(START_SECONDS_MAX)
        with open(self.output / f"daemon{node}.log", "wb") as log:
            self.processes.append(subprocess.Popen(
                [str(ZEROD), "--socket", f"{folder}/zerod.sock", "--peer-listen", "127.0.0.1:0",
                 "--metrics-listen", self.metrics[node], "--drain-seconds", "0"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_die_with_parent,
                env=os.environ | {"NOTIFY_SOCKET": str(folder / "notify")},
            ))
        try:
            while b"READY=1" not in notify.recv(4096):
                pass
        except TimeoutError:
            raise SystemExit(f"daemon {node} did not start, see {self.output}/daemon{node}.log") \
                from None
        finally:
            notify.close()

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, node: int) -> None:
        self.processes[node].kill()
        self.processes[node].wait()

    def sample(self) -> None:
        """Keeps each daemon's figures of this moment: its series go with the job."""
        for node, address in enumerate(self.metrics):
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            values = {
                name: _sum(text, f"zerod_{name}")
                for name in ("committed_step", "gathered_bytes_total", "scattered_bytes_total",
                             "sent_bytes_total", "received_bytes_total", "window_growths_total")
            }
            if not values["committed_step"]:
                continue
            kinds = re.findall(r'^zerod_memory_bytes\{.*?kind="(\w+)".*?\} (\S+)', text, re.M)
            values["memory_bytes"] = {kind: float(value) for kind, value in kinds if float(value)}
            values["resident_bytes"] = _sum(text, "process_resident_memory_bytes")
            values["pss_bytes"] = pss_bytes(self.processes[node].pid)
            self._samples[node] = values

    def last_samples(self) -> list[dict]:
        return list(self._samples)


def _sum(text: str, name: str) -> float:
    return sum(float(v) for v in re.findall(rf"^{name}(?:\{{.*?\}})? (\S+)", text, re.M))


class Trainers:
    """A torchrun for each node, and the trainers under it."""

    def __init__(
        self, cluster: Cluster, args: argparse.Namespace, flags: list[str], folder: Path, job: str,
        restarts: int,
    ) -> None:
        self.world = args.nodes * args.ranks_per_node
        self.progress = folder / f"{job}.progress.jsonl"
        self.logs = [folder / f"{job}.node{node}.log" for node in range(args.nodes)]
        self.peak_pss: list[int] = []
        self.launchers: list[subprocess.Popen[bytes]] = []
        port = free_port()
        self._bar_shown = False
        self._said_at = time.monotonic()
        for node in range(args.nodes):
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", str(args.nodes),
                "--nproc-per-node", str(args.ranks_per_node), "--node-rank", str(node),
                "--master-addr", "127.0.0.1", "--master-port", str(port), "--rdzv-id", job,
                "--max-restarts", str(restarts), "--monitor-interval", "0.1",
                str(ROOT / "examples/train_gpt.py"), *flags,
                "--progress", str(self.progress), "--results", str(folder / f"{job}.json"),
            ]
            environment = os.environ | {
                "ZEROD_ADDRESS": cluster.address(node), "ZEROD_JOB": job, "OMP_NUM_THREADS": "1",
                "TQDM_MININTERVAL": "0.5",
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT / "client/python"), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
            }
            # The bar is rank 0's; everything else goes to the logs, with the bar where it is not
            # shown on a terminal.
            with open(self.logs[node], "wb") as log:
                shown = node == 0 and sys.stderr.isatty() and restarts == 0
                self._bar_shown = shown if node == 0 else self._bar_shown
                self.launchers.append(subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=None if shown else log,
                    env=environment, start_new_session=True, preexec_fn=_die_with_parent,
                ))

    def __enter__(self) -> "Trainers":
        return self

    def __exit__(self, *_: object) -> None:
        left = [pid for launcher in self.launchers for pid in descendants(launcher.pid)]
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()  # it ends its workers
        for launcher in self.launchers:
            try:
                launcher.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        for pid in left:
            if _is_trainer(pid):
                os.kill(pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        found = [p for launcher in self.launchers for p in descendants(launcher.pid)]
        return [pid for pid in found if _is_trainer(pid)]

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self, sample: Callable[[], None]) -> int:
        """Until all have ended, or one with a failure: its exit status."""
        while True:
            codes = [launcher.poll() for launcher in self.launchers]
            if any(codes):
                return next(code for code in codes if code)
            if all(code == 0 for code in codes):
                return 0
            sample()
            self._say_progress()
            sizes = [pss_bytes(pid) for pid in self.workers()]
            if sum(sizes) > sum(self.peak_pss):
                self.peak_pss = sizes
            time.sleep(0.5)

    def _say_progress(self) -> None:
        """Where no bar is shown, a line now and then."""
        if self._bar_shown or time.monotonic() < self._said_at + SAY_SECONDS:
            return
        self._said_at = time.monotonic()
        lines = read_progress(self.progress)
        text = f"step {lines[-1]['step']}, loss {lines[-1]['loss']:.4f}" if lines else "starting"
        print(text, file=sys.stderr, flush=True)

    def wait_all_ended(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(launcher.poll() is not None for launcher in self.launchers):
                return not self.workers()
            time.sleep(0.05)
        return False

    def wait_for_step(self, step: int, since: float = 0.0) -> bool:
        """False where the trainers ended, or no step came for long."""
        deadline = time.monotonic() + STEP_SECONDS_MAX
        last = 0
        while time.monotonic() < deadline:
            lines = [line for line in read_progress(self.progress) if line["time"] > since]
            if any(line["step"] >= step for line in lines):
                return True
            if len(lines) > last:
                last, deadline = len(lines), time.monotonic() + STEP_SECONDS_MAX
            if any(launcher.poll() is not None for launcher in self.launchers):
                return False
            time.sleep(0.02)
        return False

    def first_step_after(self, moment: float) -> float:
        return next(x["time"] for x in read_progress(self.progress) if x["time"] > moment)

    def step_seconds(self) -> float:
        times = [line["time"] for line in read_progress(self.progress)[-5:]]
        return (times[-1] - times[0]) / max(1, len(times) - 1) if times else 1.0

    def start_and_import_seconds(self) -> float:
        """What a restarted trainer needs before it can ask for anything: measured apart."""
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch, tqdm, torch.utils.data"], check=True)
        return time.monotonic() - began

    def errors(self) -> list[str]:
        """The last zerod error in each node's log."""
        pattern = re.compile(r"zerod\.\S*(?:Aborted|Unavailable|FailedPrecondition)\S*: .*")
        said = []
        for log in self.logs:
            found = pattern.findall(log.read_text(errors="replace"))
            said.append(found[-1] if found else "")
        return said


def _is_trainer(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    named = any(part.endswith(b"examples/train_gpt.py") for part in command)
    return named and b"torch.distributed.run" not in command and state != "Z"
