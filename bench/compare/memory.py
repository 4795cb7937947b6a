#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One copy per node: the peak, over the steps, of the PSS summed over ranks and daemon.

    bench/compare/memory.py --ranks 2     zerod (both gradient plans), DDP, FSDP2; 124M parameters

The limit is what one copy of the state takes (fp32 weights, gradient, two moments: 16 bytes per
parameter) and what PyTorch takes for forward and backward in each rank, its gradients freed as they
come: measured in the same way, less the weights of each.
"""

import argparse
import json
import threading

import harness
from worker import memory_of


def peak_of(run) -> tuple[int, dict, dict]:
    """Samples until rank 0 has ended; returns the peak sum, its parts, and rank 0's result."""
    peak, parts = 0, {}
    stop = threading.Event()

    def sample():
        nonlocal peak, parts
        while not stop.wait(0.02):
            now = {}
            for name, processes in (("ranks", run.workers), ("daemon", run.daemons)):
                for i, process in enumerate(processes):
                    try:
                        now[f"{name} {i}"] = memory_of(process.pid)
                    except (FileNotFoundError, ProcessLookupError):
                        pass
            if sum(now.values()) > peak:
                peak, parts = sum(now.values()), now

    sampler = threading.Thread(target=sample)
    started = threading.Event()

    def on_mark(record):
        # The first step populates caches and is part of nobody's steady state.
        if record["mark"] == "step" and record["index"] == 1 and not started.is_set():
            started.set()
            sampler.start()
        elif record["mark"] == "end":
            stop.set()

    result = run.follow(on_mark)
    stop.set()
    sampler.join()
    return peak, parts, result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="comm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--systems", default="limit,zerod:node_sum,zerod:per_rank,ddp,fsdp2")
    args = parser.parse_args()
    summary = {}
    for entry in args.systems.split(","):
        system, _, plan = entry.partition(":")
        arguments = ["--model", args.model, "--steps", str(args.steps)]
        if plan:
            arguments += ["--zerod", json.dumps({"gradient_plan": plan})]
        if system == "limit":
            arguments += ["--free-gradients"]
        with harness.Network(1, None) as network, \
                harness.Run(network, system, args.ranks, arguments) as run:
            run.start()
            peak, parts, result = peak_of(run)
        if system == "limit":
            peak += (16 - 4 * args.ranks) * result["parameters"]
        summary[entry] = peak
        print(f"{entry:18} {peak / 1e9:6.2f} GB  "
              + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in parts.items()))
    print(json.dumps({"ranks": args.ranks, "model": args.model, "peak_pss_bytes": summary}))


if __name__ == "__main__":
    main()
