# SPDX-License-Identifier: Apache-2.0
"""One rank of bench/deepspeed/compare.py --serve: ZeRO-Inference, stage 3 without an optimizer, as
a plain DeepSpeed script. Every rank continues its own text, token by token."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compare"))

from worker import GPT

SIZES = {
    "500M": dict(layers=24, width=1280, heads=20, sequence=64, vocabulary=50257),
    "tiny": dict(layers=4, width=128, heads=4, sequence=64, vocabulary=256),
}


class Decoder(GPT):
    """Gives the logits of the next token."""

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x[:, -1]), self.tokens.weight)


def mark(rank: int, **record) -> None:
    if rank == 0:
        print(json.dumps(record), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", help="for the log only")
    parser.add_argument("--model", choices=SIZES, default="500M")
    parser.add_argument("--tokens", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Decoder(**SIZES[args.model])
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    text = torch.arange(16)[None] + rank
    seconds = []
    for index in range(args.tokens + 1):
        mark(rank, mark="step", index=index)
        began = time.perf_counter()
        token = engine(text).argmax(-1)
        text = torch.cat((text, token[None]), dim=1)
        if index > 0:
            seconds.append(time.perf_counter() - began)
    deepspeed.comm.barrier()
    mark(rank, mark="end")
    mark(rank, mark="result", seconds=seconds, text=text[0].tolist())


if __name__ == "__main__":
    main()
