# SPDX-License-Identifier: Apache-2.0
"""scripts/demo without its set-up: torchrun, the launcher's store, metrics, and a clean end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cluster
import pytest


@pytest.fixture
def folder():
    """With a short path, since sockets are made there."""
    with tempfile.TemporaryDirectory(prefix="zerod-test-") as path:
        yield Path(path)


def start(*flags, output):
    return subprocess.Popen(
        [sys.executable, str(cluster.ROOT / "scripts/demo.py"), "--output", str(output), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"ZEROD_BINARY": str(cluster.daemon_binary()), "TMPDIR": str(output)},
    )


def left_of(output):
    """Processes that have the folder in their command line, and what lies in it beside results."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(output).encode() in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
        except OSError:
            pass
    return pids, list(output.glob("zerod-demo-*"))


def test_demo_shows_figures_and_leaves_nothing(folder):
    text = folder / "text"
    text.write_bytes(b"".join(p.read_bytes() for p in sorted(cluster.HERE.glob("*.py"))))
    demo = start("--steps", "3", "--text", str(text), output=folder)
    out, err = demo.communicate(timeout=300)
    assert demo.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert len(figures["losses"]) == 3 and len(figures["daemons"]) == 2
    assert all(d["scattered_bytes_total"] > 0 and d["sent_bytes_total"] > 0
               for d in figures["daemons"])
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert left_of(folder) == ([], [])


def test_interrupted_demo_leaves_nothing(folder):
    demo = start("--steps", "100000", output=folder)
    try:
        # A line on standard error says that it has started, the next that it trains.
        for line in demo.stderr:
            if line.startswith("step "):
                break
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=120)
        assert demo.returncode == 130
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()
    assert left_of(folder) == ([], [])
