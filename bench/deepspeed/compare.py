#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One unmodified DeepSpeed script under DeepSpeed and under zerod, alternating: step times, and the
peak of the PSS summed over all processes, the daemon included.

    python -m venv --system-site-packages PEER
    DS_BUILD_OPS=0 PEER/bin/pip install deepspeed==0.19.8
    bench/deepspeed/compare.py --deepspeed PEER/bin/python            training, 2 ranks
    bench/deepspeed/compare.py --deepspeed PEER/bin/python --serve    ZeRO-Inference, 4 ranks

DeepSpeed builds its kernels when it first runs: that takes minutes.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "compare"))

import harness
from memory import peak_of

SHIM = ROOT / "client/python/zerod/as_deepspeed/path"


def run(system: str, python: str, script: str, ranks: int, arguments: list[str]) -> dict:
    """Step times of rank 0, and the peak from its second step on."""
    extra = {"DS_ACCELERATOR": "cpu"}
    if system == "zerod":
        python = sys.executable
        extra["PYTHONPATH"] = f"{SHIM}:{ROOT / 'client/python'}"
    else:
        extra["PYTHONPATH"] = ""
    with harness.Network(1, None) as network, harness.Run(
        network, system, ranks, arguments, worker=HERE / script, python=python, extra=extra
    ) as started:
        started.start()
        peak, parts, result = peak_of(started)
    return {"system": system, "seconds": result["seconds"], "peak": peak, "parts": parts}


def compare(args, script: str, ranks: int, name: str, arguments: list[str]) -> None:
    seen: dict[str, list[dict]] = {"zerod": [], "deepspeed": []}
    for _ in range(args.rounds):
        for system, results in seen.items():
            result = run(system, args.deepspeed, script, ranks, arguments)
            results.append(result)
            print(json.dumps({"case": name, **result}), flush=True)
    line = {}
    for system, results in seen.items():
        line[system] = (
            statistics.median(s for r in results for s in r["seconds"]),
            statistics.median(r["peak"] for r in results),
        )
    (ours, our_peak), (theirs, their_peak) = line["zerod"], line["deepspeed"]
    print(f"{name}: zerod {ours:.3f} s, {our_peak / 1e9:.2f} GB; DeepSpeed {theirs:.3f} s, "
          f"{their_peak / 1e9:.2f} GB; {theirs / ours:.2f} x as fast, {our_peak / their_peak:.2f} "
          "of the memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", required=True, help="a Python that has DeepSpeed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="of train.py or serve.py")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []
    if args.serve:
        arguments = [*model, "--tokens", str(args.steps)]
        compare(args, "serve.py", args.ranks or 4, "serve", arguments)
        return
    for stage in args.stages.split(","):
        for dtype in args.dtypes.split(","):
            arguments = [*model, "--steps", str(args.steps), "--stage", stage, "--dtype", dtype]
            compare(args, "train.py", args.ranks or 2, f"stage {stage} {dtype}", arguments)


if __name__ == "__main__":
    main()
