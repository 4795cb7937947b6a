# SPDX-License-Identifier: Apache-2.0
"""The same script under zerod and under DeepSpeed, stage by stage and type by type: losses, norms,
learning rates, loss scales and skipped steps side by side.

    python -m venv --system-site-packages PEER
    DS_BUILD_OPS=0 PEER/bin/pip install deepspeed==0.19.8
    .venv/bin/python bench/curves/compare.py --deepspeed PEER/bin/python

DeepSpeed builds its CPU communication kernel when it first runs: that takes minutes. A line for
each case: the largest relative difference of losses and of norms, and whether the rest is equal.
Fails where a difference is above the bound. In fp16 a step on which the scale grows is left out of
the norms, and the bound is the wider one: there DeepSpeed divides by the new scale.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
WORLD = 2
ACCUMULATION = 2
BAD = [4, 10, 13]  # micro-steps that are made to overflow in fp16
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
RUN_SECONDS_MAX = 900


def configuration(stage: int, dtype: str) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {
            "lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {
            "total_num_steps": 12, "warmup_num_steps": 4, "warmup_max_lr": 2e-3,
            "warmup_type": "linear"}},
        "zero_optimization": {"stage": stage},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if stage > 0:  # which DeepSpeed refuses at 0
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "fp16":
        # Small, so that nothing overflows but what is made to: where a gradient is just too large
        # depends on the type that it is summed in, which is fp16 there and fp32 here.
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3}
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(system: str, python: str, config: dict, micro_steps: int, bad: list[int]) -> dict:
    """What rank 0 saw. Ranks are processes of this host; zerod's share an embedded daemon."""
    port = str(free_port())
    running = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(WORLD):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu", "TORCHELASTIC_RUN_ID": f"curves-{os.getpid()}-{port}",
                "PYTHONPATH": str(ROOT / "client/python"),
            }
            log = open(Path(folder) / f"{rank}", "w+", encoding="utf-8")
            running.append((log, subprocess.Popen(
                [python, str(WORKER), "--system", system, "--config", json.dumps(config),
                 "--micro-steps", str(micro_steps), "--bad", *map(str, bad)],
                stdout=log, stderr=subprocess.STDOUT, env=environment)))
        try:
            codes = [process.wait(RUN_SECONDS_MAX) for _, process in running]
        finally:
            for _, process in running:
                process.kill()
                process.wait()
        texts = []
        for log, _ in running:
            log.seek(0)
            texts.append(log.read())
            log.close()
    if any(codes):
        sys.exit(f"{system} ended with {codes}:\n" + "\n".join(t[-3000:] for t in texts))
    return next(json.loads(line[7:]) for line in texts[0].splitlines()
                if line.startswith("RESULT "))


def difference(ours: list, theirs: list) -> float:
    """The largest relative one; infinite where one side alone is finite. DeepSpeed tells no norm in
    fp32 at stage 0."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            continue
        if math.isfinite(a) and math.isfinite(b):
            worst = max(worst, abs(a - b) / max(abs(b), 1e-12))
        elif math.isfinite(a) != math.isfinite(b):
            return math.inf
    return worst


def without_growth(seen: dict) -> list:
    """The norms but of steps behind which the scale was larger."""
    scales = seen["scales"][::ACCUMULATION]
    grown = [b > a for a, b in zip(scales, scales[1:])] + [False]
    return [None if g else n for g, n in zip(grown, seen["norms"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--deepspeed", required=True, help="a Python that can import deepspeed")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--dtypes", nargs="*", default=list(BOUNDS))
    parser.add_argument("--micro-steps", type=int, default=24)
    parser.add_argument("--raw", help="a file that gets both sides of every case, a line each")
    args = parser.parse_args()
    failed = []
    for dtype in args.dtypes:
        for stage in args.stages:
            config = configuration(stage, dtype)
            bad = BAD if dtype == "fp16" else []
            ours = run("zerod", sys.executable, config, args.micro_steps, bad)
            theirs = run("deepspeed", args.deepspeed, config, args.micro_steps, bad)
            if args.raw:
                with open(args.raw, "a", encoding="utf-8") as file:
                    line = {"dtype": dtype, "stage": stage, "zerod": ours, "deepspeed": theirs}
                    file.write(json.dumps(line) + "\n")
            losses = difference(ours["losses"], theirs["losses"])
            norms = difference(without_growth(ours), without_growth(theirs))
            equal = {key: ours[key] == theirs[key] for key in ("rates", "scales", "skipped")}
            good = max(losses, norms) <= BOUNDS[dtype] and all(equal.values())
            print(f"{dtype} stage {stage}: losses {losses:.1e} norms {norms:.1e} "
                  f"skipped {ours['skipped'][-1]}/{theirs['skipped'][-1]} "
                  f"scale {ours['scales'][-1]:g}/{theirs['scales'][-1]:g} "
                  f"rates {'equal' if equal['rates'] else 'DIFFER'}, "
                  f"scales {'equal' if equal['scales'] else 'DIFFER'}, "
                  f"skipped {'equal' if equal['skipped'] else 'DIFFER'}"
                  f"{'' if good else '  <- beyond the bound'}", flush=True)
            if not good:
                failed.append((dtype, stage))
    if failed:
        sys.exit(f"beyond the bound: {failed}")


main()
