# SPDX-License-Identifier: Apache-2.0
"""Deaths, wrong input, and what is left behind."""

import os
import random
import re
import signal

import pytest
import torch

import cluster

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0,
                          "stage3_max_live_parameters": 16384},
}
STEPS = 30


def wait_for_step(paths, step, running, seconds=60):
    """Until every rank has reported `step`."""
    import select

    fds = [os.pidfd_open(rank.pid) for rank in running]
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    try:
        for _ in range(int(seconds / 0.01)):
            lines = [cluster.read_lines(path) for path in paths]
            if all(any(line["step"] >= step for line in of_rank) for of_rank in lines):
                return
            if poller.poll(10):
                break
        texts = "\n".join(rank.text()[-3000:] for rank in running)
        raise AssertionError(f"step {step} did not come:\n{texts}")
    finally:
        for fd in fds:
            os.close(fd)


def same(a, b):
    return (
        a["losses"] == b["losses"]
        and all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
        and all(torch.equal(a["buffers"][k], b["buffers"][k]) for k in a["buffers"])
    )


# Its rate is made of the step before's, which is the trainer's to remember.
ASGD = {
    "optimizer": {"type": "ASGD", "params": {"lr": 1e-2, "lambd": 0.1, "t0": 5}},
    "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.95}},
}


@pytest.mark.parametrize("nodes,per_node,plan,change", [
    (1, 1, "per_rank", {}), (2, 1, "per_rank", {}), (1, 2, "node_sum", {}),
    (1, 1, "per_rank", ASGD),
])
def test_killed_trainers_go_on_bit_for_bit(nodes, per_node, plan, change, tmp_path):
    world = nodes * per_node
    config = BASE | {"zerod": {"gradient_plan": plan}} | change
    chance = random.Random(nodes * 10 + per_node)
    with cluster.daemons(nodes) as running:
        expected = cluster.run(
            "workers:train_and_report", running, world, "whole", steps=STEPS,
            progress=str(tmp_path / "whole"), config=config,
        )
        progress = tmp_path / "killed"
        paths = [tmp_path / f"killed.{rank}" for rank in range(world)]
        for attempt, until in enumerate((3, 11, 18, 25, None)):
            with cluster.ranks(
                "workers:train_and_report", running, world, "killed", attempt, steps=STEPS,
                progress=str(progress), config=config,
            ) as trainers:
                if until is None:
                    cluster.wait_all(trainers)
                    results = [t.result() for t in trainers]
                    break
                wait_for_step(paths, until, trainers)
                victims = trainers if until == 18 else [chance.choice(trainers)]
                for victim in victims:
                    os.kill(victim.pid, signal.SIGKILL)
                for trainer in trainers:
                    if trainer not in victims:
                        assert trainer.wait(60) != 0
                        assert re.search("Aborted|Unavailable|FailedPrecondition", trainer.text())
    assert results[0]["resumed"] > 0
    for ours, whole in zip(results, expected):
        assert same(ours, whole)


def test_a_dead_daemon_ends_every_trainer(tmp_path):
    with cluster.daemons(2) as running:
        with cluster.ranks(
            "workers:train_and_report", running, 2, steps=100000, config=BASE,
            progress=str(tmp_path / "p"),
        ) as trainers:
            wait_for_step([tmp_path / "p.0", tmp_path / "p.1"], 5, trainers)
            running[1].kill()
            for trainer in trainers:
                assert trainer.wait(30) != 0
            assert "member 1" in trainers[0].text()


def test_sigstop_of_a_trainer_is_not_a_fault(tmp_path):
    with cluster.daemons(2) as running:
        with cluster.ranks(
            "workers:train_and_report", running, 2, steps=40, config=BASE,
            progress=str(tmp_path / "p"),
        ) as trainers:
            paths = [tmp_path / "p.0", tmp_path / "p.1"]
            wait_for_step(paths, 3, trainers)
            os.kill(trainers[0].pid, signal.SIGSTOP)
            before = running[0].value("zerod_committed_step")
            with pytest.raises(AssertionError, match="did not end"):
                trainers[1].wait(7)  # longer than a lease
            assert running[0].value("zerod_committed_step") <= before + 1
            os.kill(trainers[0].pid, signal.SIGCONT)
            cluster.wait_all(trainers)


def test_wrong_input_is_refused_and_hurts_nobody(tmp_path):
    def attach(nodes, world=1, **arguments):
        return cluster.run("workers:attach_one", nodes, world, "mine", **arguments)

    with cluster.daemons(1) as running:
        with cluster.ranks(
            "workers:train_and_report", running, 1, "other", steps=10**6, config=BASE,
            progress=str(tmp_path / "p"),
        ) as trainers:
            wait_for_step([tmp_path / "p.0"], 2, trainers)
            # Two layouts in one job: whoever comes second is refused, the first goes on waiting.
            pair = []
            try:
                for rank, model in enumerate(("stack", "lora")):
                    pair.append(cluster.Rank("workers:attach_one",
                                             {"model": model, "config": BASE},
                                             cluster.place(running, rank, 2, "layouts")))
                text = cluster.wait_any(pair).result()
                assert text.startswith("FAILED_PRECONDITION") and "is different" in text
            finally:
                for rank in pair:
                    rank.close()
            # The name of a job whose rank lives.
            text = cluster.run("workers:attach_one", running, 1, "other", model="stack",
                               config=BASE)[0]
            assert re.match("ALREADY_EXISTS|FAILED_PRECONDITION", text)
            # More than there is.
            huge = BASE | {"zerod": {"client_state_bytes_max": 1 << 30, "staging_bytes": 1 << 44,
                                     "gradient_plan": "node_sum"}}
            assert attach(running, model="stack", config=huge)[0].startswith("RESOURCE_EXHAUSTED")
            # A window below the largest set that must be readable at once.
            small = BASE | {"zero_optimization": {**BASE["zero_optimization"],
                                                  "stage3_max_live_parameters": 100}}
            text = attach(running, model="tied_head", config=small)[0]
            assert re.match("FAILED_PRECONDITION|RESOURCE_EXHAUSTED|INVALID_ARGUMENT", text)
            assert "stage3_max_live_parameters" in text
            before = running[0].value("zerod_committed_step", job="other")
            wait_for_step([tmp_path / "p.0"], before + 3, trainers)
            assert trainers[0].process.poll() is None


@pytest.mark.parametrize("function", ["write_outside", "read_released"])
def test_a_fault_names_the_parameter(function):
    with cluster.daemons(1) as running:
        config = BASE | {"zerod": {"guard_pages": True}}
        with cluster.ranks(f"workers:{function}", running, 1, config=config) as trainers:
            assert trainers[0].wait() == -signal.SIGSEGV
            text = trainers[0].text()
    assert re.search(r"layers\.0\.inner\.weight|head\.weight", text)


def test_nothing_is_left_behind():
    config = BASE | {"zerod": {"linger_seconds": 0}}
    with cluster.daemons(1) as running:
        daemon = running[0]

        def jobs(count, first):
            half = count // 2
            cluster.run("workers:many_jobs", running, 1, count=half, first=first, config=config)
            ends = cluster.run("workers:dying_jobs", running, 1, count=half, first=first,
                               config=config)[0]
            assert set(ends) <= {signal.SIGKILL, signal.SIGABRT, signal.SIGALRM}, ends
            with cluster.ranks("workers:train_and_report", running, 2, f"dies-{first}",
                               steps=10**6, config=config,
                               progress=f"{daemon.folder}/p{first}") as trainers:
                from pathlib import Path

                wait_for_step([Path(f"{daemon.folder}/p{first}.{r}") for r in range(2)], 2,
                              trainers)
                for trainer in trainers:
                    os.kill(trainer.pid, signal.SIGKILL)
                    trainer.wait()

        jobs(10, 0)
        fds = settled(daemon)
        early = series(daemon), daemon.rss_bytes()
        jobs(40, 100)
        settled(daemon, fds, early[1] + (2 << 20))
        assert series(daemon) == early[0]


def series(daemon):
    return sorted({line.rsplit(" ", 1)[0] for line in daemon.text().splitlines()
                   if not line.startswith("#") and "exposer" not in line})


def settled(daemon, fds=None, rss_max=None, scrapes=2000):
    """Until no job is left and, where told, as few fds are open as then and no more memory is held
    than `rss_max` (a job's last thread may still be freeing it); how many fds are.

    Each scrape is a round trip of some milliseconds, so this ends. Its own connection is an fd
    that may live a moment longer than its answer: the fewest fds of many looks are the daemon's.
    """
    fewest = []
    for _ in range(scrapes):
        if daemon.value("zerod_jobs") != 0:
            fewest.clear()
            continue
        fewest.append(daemon.fds())
        settled_fds = len(fewest) >= 50 and fds in (None, min(fewest[-50:]))
        if settled_fds and (rss_max is None or daemon.rss_bytes() <= rss_max):
            return min(fewest[-50:])
    raise AssertionError(f"jobs, fds ({fewest[-50:]}, not {fds}) or memory ({daemon.rss_bytes()} "
                         f"bytes, not {rss_max}) stay: " + daemon.text())


def test_forked_workers_read_and_hurt_nobody():
    config = BASE | {"zero_optimization": {"stage": 1}}
    with cluster.daemons(1) as running:
        difference, steps = cluster.run("workers:forked_workers", running, 1, config=config)[0]
    assert difference < 1e-5 and steps == 3


def test_clean_and_failed_ends_of_a_script():
    start = (
        "import sys, os, torch, zerod, zoo\n"
        "def main():\n"
        "    engine, *_ = zerod.initialize(model=zoo.Stack(), config=CONFIG)\n"
        "    engine.backward(engine(zoo.batch(0, 0)).sum())\n"
        "    engine.step()\n"
        "main()\n"
    ).replace("CONFIG", repr(BASE))
    with cluster.daemons(1) as running:
        daemon = running[0]
        for job, end, code, stays in (
            ("clean", "", 0, False),
            ("exit0", "sys.exit(0)", 0, False),
            ("exit3", "sys.exit(3)", 3, True),
            ("raises", "raise KeyError('x')", 1, True),
            ("dies", "os._exit(0)", 0, True),
        ):
            with cluster.ranks("workers:run_script", running, 1, job, source=start + end) as ran:
                assert ran[0].wait() == code, ran[0].text()
            assert (daemon.value("zerod_committed_step", job=job) == 1) is stays, job
