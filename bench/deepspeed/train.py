# SPDX-License-Identifier: Apache-2.0
"""One rank of bench/deepspeed/compare.py: a plain DeepSpeed script. It does not know whether the
package `deepspeed` that it finds is DeepSpeed's or zerod's."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compare"))

from worker import GPT, MODELS


def mark(rank: int, **record) -> None:
    if rank == 0:
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", help="for the log only")
    parser.add_argument("--model", choices=MODELS, default="comm")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    settings = MODELS[args.model]
    config = {
        "train_micro_batch_size_per_gpu": settings["batch"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": args.stage},
        "bf16": {"enabled": args.dtype == "bf16"},
    }
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = GPT(**settings)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    torch.manual_seed(1 + rank)
    seconds = []
    for step in range(args.steps + 2):
        shape = (settings["batch"], settings["sequence"])
        tokens = torch.randint(0, settings["vocabulary"], shape)
        mark(rank, mark="step", index=step)
        began = time.perf_counter()
        loss = engine(tokens, tokens)
        engine.backward(loss)
        engine.step()
        if step >= 2:
            seconds.append(time.perf_counter() - began)
    mark(rank, mark="end")
    mark(rank, mark="result", seconds=seconds, loss=float(loss))


if __name__ == "__main__":
    main()
