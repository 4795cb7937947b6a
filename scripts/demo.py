# SPDX-License-Identifier: Apache-2.0
"""Trains examples/train_gpt.py through zerod daemons on this machine and shows what came out.

Each node is a daemon and a torchrun of its own. Figures of the daemons are their own metrics.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo_cluster import Cluster, Trainers, read_progress  # noqa: E402
from demo_report import print_table, write_curve  # noqa: E402

KILLS = 3
DETECTION_SECONDS_MAX = 30  # of a daemon's death, for everybody, launcher included


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", type=int, default=3, choices=range(4), help="ZeRO stage [3]")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="[fp32]")
    parser.add_argument("--steps", type=int, help="optimizer steps [400, with --kill 40]")
    parser.add_argument("--seed", type=int, default=1, help="[1]")
    parser.add_argument("--nodes", type=int, default=2, help="daemons [2]")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="[1]")
    parser.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="[1]")
    parser.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm [1.0]")
    parser.add_argument("--text", metavar="FILE", help="train on this [the standard library]")
    parser.add_argument("--kill", choices=("trainer", "daemon"),
                        help="kill such processes at random instants and check what follows")
    parser.add_argument("--output", metavar="FOLDER", default=str(ROOT / ".demo"),
                        help="loss.png, results.json and logs go here [.demo]")
    args = parser.parse_args()
    for name in ("nodes", "ranks_per_node", "gradient_accumulation"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.steps is None:
        args.steps = 40 if args.kill else 400
    if args.steps < (4 * (KILLS + 1) if args.kill else 1):
        parser.error("--steps is too small")
    return args


def trainer_flags(args: argparse.Namespace) -> list[str]:
    flags = [
        "--stage", str(args.stage), "--dtype", args.dtype, "--steps", str(args.steps),
        "--seed", str(args.seed), "--clip", str(args.clip),
        "--gradient-accumulation", str(args.gradient_accumulation),
    ]
    if args.text:
        flags += ["--text", str(Path(args.text).resolve())]
    return flags


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_plain(args: argparse.Namespace, cluster: Cluster, folder: Path, job: str) -> dict:
    """One undisturbed training; its results with what the daemons said of it."""
    with Trainers(cluster, args, trainer_flags(args), folder, job, restarts=0) as trainers:
        code = trainers.wait(cluster.sample)
    if code != 0:
        raise SystemExit(f"the training failed, see {folder}/*.log")
    results = json.loads((folder / f"{job}.json").read_text())
    results["daemons"] = cluster.last_samples()
    results["trainer_pss_bytes"] = trainers.peak_pss
    return results


def run_kill_trainer(args: argparse.Namespace, cluster: Cluster, folder: Path) -> dict:
    """Kills trainers; losses and weights must be those of an undisturbed run."""
    say("first an undisturbed run, to compare with")
    whole = run_plain(args, cluster, folder, "whole")
    say(f"now the same, killing trainers {KILLS} times")
    chance = random.Random(args.seed)
    seconds: list[float] = []
    with Trainers(cluster, args, trainer_flags(args), folder, "killed", restarts=100) as trainers:
        for i in range(KILLS):
            aim = args.steps * (i + 1) // (KILLS + 1)
            if not trainers.wait_for_step(aim):
                raise SystemExit(f"the training ended before step {aim}, see {folder}/*.log")
            # Anywhere within a step: forward, backward, between the decision and its application.
            time.sleep(chance.random() * trainers.step_seconds())
            victims = trainers.workers()
            if i != KILLS - 1:  # the last time, all of them
                victims = [chance.choice(victims)]
            before = read_progress(trainers.progress)[-1]["step"]
            killed = time.time()
            trainers.kill(victims)
            if not trainers.wait_for_step(before + 1, since=killed):
                raise SystemExit(f"the training did not come back, see {folder}/*.log")
            seconds.append(trainers.first_step_after(killed) - killed)
            say(f"\nkilled {len(victims)} of {trainers.world} trainers after step {before}; the "
                f"next step came {seconds[-1]:.1f} s later")
        code = trainers.wait(cluster.sample)
    if code != 0:
        raise SystemExit(f"the training failed, see {folder}/*.log")
    killed_results = json.loads((folder / "killed.json").read_text())
    same = killed_results["losses"] == whole["losses"] and (
        killed_results["weights_sha256"] == whole["weights_sha256"]
    )
    say(f"losses and weights {'equal' if same else 'DIFFER FROM'} the undisturbed run's")
    return whole | {
        "kill": "trainer",
        "kills": KILLS,
        "seconds_from_kill_to_next_step": seconds,
        "start_and_import_seconds": trainers.start_and_import_seconds(),
        "equal_to_undisturbed": same,
    }


def run_kill_daemon(args: argparse.Namespace, cluster: Cluster, folder: Path) -> dict:
    """Kills one daemon; every trainer must end with an error that says what was lost."""
    chance = random.Random(args.seed)
    with Trainers(cluster, args, trainer_flags(args), folder, "lost", restarts=0) as trainers:
        if not trainers.wait_for_step(args.steps // 2):
            raise SystemExit(f"the training ended early, see {folder}/*.log")
        time.sleep(chance.random() * trainers.step_seconds())
        victim = chance.randrange(args.nodes)
        killed = time.time()
        cluster.kill(victim)
        ended = trainers.wait_all_ended(DETECTION_SECONDS_MAX)
        seconds = time.time() - killed
    said = trainers.errors()
    for node, sentence in enumerate(said):
        say(f"node {node}: {sentence or 'NO ERROR'}")
    return {
        "kill": "daemon",
        "killed_node": victim,
        "all_trainers_ended": ended,
        "seconds_until_all_ended": seconds,
        "errors": said,
        "every_node_said_why": all(said),
    }


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGINT, interrupt)  # also where the shell had it ignored
    signal.signal(signal.SIGTERM, interrupt)
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.json*"), *folder.glob("*.log"), *folder.glob("*.png")]:
        old.unlink()
    cluster = Cluster(args.nodes, folder, tempfile.mkdtemp(prefix="zerod-demo-"))
    try:
        with cluster:
            if args.kill == "trainer":
                results = run_kill_trainer(args, cluster, folder)
            elif args.kill == "daemon":
                results = run_kill_daemon(args, cluster, folder)
            else:
                results = run_plain(args, cluster, folder, "demo")
    except KeyboardInterrupt:
        say("\ninterrupted; everything is stopped")
        return 130
    results["options"] = {k: v for k, v in vars(args).items() if k != "output"}
    if "losses" in results:
        print_table(results)
        write_curve(results["losses"], results["validation_loss"], folder / "loss.png")
        print(f"loss curve: {os.path.relpath(folder / 'loss.png')}", flush=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results), flush=True)
    good = results.get("equal_to_undisturbed", True) and results.get("every_node_said_why", True)
    return 0 if good and results.get("all_trainers_ended", True) else 1


if __name__ == "__main__":
    sys.exit(main())
