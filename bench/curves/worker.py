# SPDX-License-Identifier: Apache-2.0
"""One rank of bench/curves/compare.py: one script, whichever of the two engines it runs under. Rank
0 prints what it saw of every micro-step as one line of JSON."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_gpt

TINY = ["--layers", "3", "--width", "64", "--heads", "2", "--sequence", "32"]
BATCH = 4


def initialize(system: str, model: torch.nn.Module, config: dict):
    if system == "zerod":
        import zerod

        return zerod.initialize(model=model, config=config)
    import deepspeed

    # It asks the CPU for instructions of its own; the arithmetic is there without them.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=("zerod", "deepspeed"), required=True)
    parser.add_argument("--config", required=True, help="JSON text")
    parser.add_argument("--micro-steps", type=int, required=True)
    parser.add_argument("--bad", type=int, nargs="*", default=[],
                        help="micro-steps, from 0, whose gradients are to overflow")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(11)
    model = train_gpt.GPT(train_gpt.parse_arguments(TINY + ["--dropout", "0"]))
    engine, optimizer, _, _ = initialize(args.system, model, json.loads(args.config))
    data = torch.Generator().manual_seed(12)
    seen: dict[str, list] = {"losses": [], "norms": [], "rates": [], "scales": [], "skipped": []}
    for micro_step in range(args.micro_steps):
        tokens = torch.randint(0, 16, (world * BATCH, 33), generator=data).square() % 251
        loss = engine(tokens[rank * BATCH : (rank + 1) * BATCH])
        seen["losses"].append(loss.item())
        seen["rates"].append(optimizer.param_groups[0]["lr"])
        seen["scales"].append(float(getattr(optimizer, "loss_scale", 1.0)))
        engine.backward(loss * float("inf") if micro_step in args.bad else loss)
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary:
            norm = engine.get_global_grad_norm()
            seen["norms"].append(None if norm is None else float(norm))
            seen["skipped"].append(engine.skipped_steps)
    if rank == 0:
        print("RESULT " + json.dumps(seen), flush=True)


main()
