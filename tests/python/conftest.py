# SPDX-License-Identifier: Apache-2.0
import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT / "client" / "python"), str(ROOT / "examples")]

import fake_zerod  # noqa: E402

# Started in the background by a shell, this process ignores SIGINT, and so would what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test file is collected: one that imports the package would bring the real extension.
fake_zerod.install()


@pytest.fixture
def no_job(fake, monkeypatch):
    """Nothing may begin a job."""
    def attach(**options):
        pytest.fail("a job was begun")

    monkeypatch.setattr(fake.Client, "attach", staticmethod(attach))


@pytest.fixture
def fake(monkeypatch):
    """The extension's double. Tests against a daemon run their ranks in processes of their own."""
    for name in ("RANK", "WORLD_SIZE", "ZEROD_JOB", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    fake_zerod.Client.jobs.clear()
    yield fake_zerod
    from zerod import at_exit

    at_exit._engines.clear()
