#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Step time and bytes per parameter of zerod beside DDP and FSDP2 and beside the limit.

The systems alternate in one run, each round with fresh processes, so a machine that changes speed
changes it for all. The limit is derived from the same run: forward and backward alone (all ranks
at once), plus landing each rank's gradient (8 bytes per parameter), plus one pass of AdamW over
all gradients (per parameter: 4 bytes a rank's gradient, 24 for weights and moments), both at the
measured speed of memory, plus the bytes that ZeRO must move over the speed of the link.

    bench/compare/step.py --model comm                 one node, 2 ranks
    bench/compare/step.py --model comm --nodes 2       two namespaces joined by veth
    bench/compare/step.py --model comm --nodes 2 --mbit 1000
"""

import argparse
import json
import sys

import harness


def limit_seconds(alone: dict, parameters: int, nodes: int, ranks: int, mbit: int | None) -> dict:
    """The terms of the formula above; all ranks share the machine's memory."""
    speed = alone["copy_bytes_per_second"] * ranks
    per_node = ranks // nodes
    terms = {
        "forward_backward": harness.median(alone["seconds"]),
        "landing": 8 * parameters * ranks / speed,
        "adamw": (4 * per_node + 24 / nodes) * parameters * nodes / speed,
        # Gathered once (4 bytes) and scattered (4 bytes), less the part that is one's own.
        "wire": 8 * parameters * (nodes - 1) / nodes / (mbit * 125000) if mbit else 0.0,
    }
    return terms | {"total": sum(terms.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="comm")
    parser.add_argument("--nodes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mbit", type=int, help="shape the link")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--zerod", default="{}")
    parser.add_argument("--systems", default="limit,zerod,ddp,fsdp2")
    parser.add_argument("--raw", help="append every run's line to this file")
    args = parser.parse_args()
    systems = args.systems.split(",")
    seconds = {s: [] for s in systems}
    wire = {s: [] for s in systems}
    limits, plan, parameters = [], "", None
    for round_index in range(args.rounds):
        for system in systems:
            arguments = ["--model", args.model, "--steps", str(args.steps), "--stage",
                         str(args.stage), "--zerod", args.zerod]
            with harness.Network(args.nodes, args.mbit) as network, \
                    harness.Run(network, system, args.ranks, arguments) as run:
                run.start()
                result = run.follow()
            seconds[system].append(harness.median(result["seconds"]))
            wire[system].append(harness.median(result["bytes"]))
            plan = result.get("plan") or plan
            if system == "limit":
                parameters = result["parameters"]
                limits.append(limit_seconds(result, parameters, args.nodes, args.ranks, args.mbit))
            line = {"round": round_index, "system": system, **result}
            print(json.dumps(line), file=sys.stderr)
            if args.raw:
                with open(args.raw, "a") as f:
                    f.write(json.dumps(line) + "\n")
    report(args, systems, seconds, wire, limits, plan, parameters)


def report(args, systems, seconds, wire, limits, plan, parameters):
    summary = {"model": args.model, "nodes": args.nodes, "ranks": args.ranks, "mbit": args.mbit,
               "stage": args.stage, "rounds": args.rounds, "plan": plan, "parameters": parameters,
               "seconds": {s: harness.median(seconds[s]) for s in systems}}
    print(f"{args.model}, {args.nodes} node(s) x {args.ranks // args.nodes} rank(s), "
          f"{args.mbit or 'unlimited'} Mbit/s, medians of {args.rounds}; {plan}")
    for system in systems:
        own, ratios = seconds[system], []
        if "zerod" in systems and system != "zerod":
            ratios = [a / b for a, b in zip(own, seconds["zerod"])]
        per_parameter = harness.median(wire[system]) / (parameters or 1)
        summary.setdefault("bytes_per_parameter", {})[system] = per_parameter
        text = f"{system:8} {harness.median(own):8.3f} s  [{min(own):.3f}, {max(own):.3f}]"
        if system != "limit":
            text += f"  {per_parameter:6.2f} bytes per parameter on the wire, all ranks"
        if ratios:
            text += f"  {harness.median(ratios):5.2f} x zerod's time"
            summary.setdefault("ratio_to_zerod", {})[system] = harness.median(ratios)
        print(text)
    if limits:
        total = harness.median([t["total"] for t in limits])
        summary["limit"] = {k: harness.median([t[k] for t in limits]) for k in limits[0]}
        if "zerod" in systems:
            summary["zerod_over_limit"] = harness.median(
                [z / t["total"] for z, t in zip(seconds["zerod"], limits)])
            times = summary["zerod_over_limit"]
            print(f"limit {total:.3f} s; zerod takes {times:.2f} x the limit: "
                  + ", ".join(f"{k} {v:.3f}" for k, v in summary["limit"].items()))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
