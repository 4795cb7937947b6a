# SPDX-License-Identifier: Apache-2.0
"""The same training as train_gpt.py with what PyTorch has itself: DistributedDataParallel and
torch.optim.AdamW. The same seed gives the same weights, data and dropout; the losses are compared
in tests/python/test_parity.py.

    torchrun --nproc-per-node 2 examples/train_gpt_ddp.py --steps 100
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from train_gpt import GPT, Report, Windows, evaluate, hash_of, parse_arguments, read_text
from zerod.loader import Loader
from zerod.schedule import WarmupLR


def mean_over_ranks(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def train(args) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    train_text, held_out_text = read_text(args.text)
    torch.manual_seed(args.seed)
    model = GPT(args)
    if args.dtype == "fp16":
        raise SystemExit("fp16 needs loss scaling, which this script has not: use fp32 or bf16")
    if args.dtype == "bf16":
        model.bfloat16()
    torch.manual_seed(args.seed + 1000 + rank)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    scheduler = WarmupLR(optimizer, args.lr / 10, args.lr, args.warmup, "linear")
    loader = Loader(
        Windows(train_text, args.sequence), args.batch, rank=rank, world=world, seed=args.seed,
        drop_last=True,
    )
    report = Report(args, rank == 0, 0)
    tokens = args.batch * args.sequence * args.gradient_accumulation * world
    losses: list[float] = []
    total, micro_step = 0.0, 0
    while len(losses) < args.steps:
        for batch in loader:
            micro_step += 1
            boundary = micro_step % args.gradient_accumulation == 0
            with contextlib.nullcontext() if boundary else ddp.no_sync():
                loss = ddp(batch)
                (loss / args.gradient_accumulation).backward()
            total += loss.item() / args.gradient_accumulation
            if not boundary:
                continue
            losses.append(mean_over_ranks(total))
            total = 0.0
            if args.clip > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            report.step(len(losses), losses[-1], tokens)
            if len(losses) == args.steps:
                break
    speed = report.tokens_per_second()
    held_out = Windows(held_out_text, args.sequence)
    results = {
        "losses": losses,
        "train_loss": losses[-1],
        "validation_loss": mean_over_ranks(evaluate(model, held_out, args, rank)),
        "tokens_per_second": speed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "world": world,
        "weights_sha256": hash_of(model.state_dict()) if rank == 0 else "",
    }
    report.finish(results)
    return results


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo")
    try:
        train(parse_arguments())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
