# SPDX-License-Identifier: Apache-2.0
"""One rank of one system in bench/compare/step.py or memory.py: trains a GPT on random tokens and
reports, from rank 0, the time of each step.

Systems: `zerod`, `ddp`, `fsdp2` (PyTorch's own, over gloo, fp32) and `limit`: forward and backward
alone, with no communication and no optimizer, and the speed of memory with all ranks copying.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

MODELS = {
    # compute-bound: many tokens per parameter
    "compute": dict(layers=6, width=512, heads=8, sequence=256, batch=4, vocabulary=50257),
    # communication-bound: 124M parameters, few tokens
    "comm": dict(layers=12, width=768, heads=12, sequence=64, batch=1, vocabulary=50257),
    "tiny": dict(layers=4, width=128, heads=4, sequence=64, batch=2, vocabulary=256),
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(
            2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tied head, so that 12 layers of 768 are the well-known 124M parameters."""

    def __init__(self, layers, width, heads, sequence, vocabulary, **_):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def copy_bandwidth() -> float:
    """Bytes read plus written per second by this rank while the other ranks copy as well."""
    source = torch.ones(64 << 20, dtype=torch.float32)
    target = torch.empty_like(source).copy_(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def memory_of(pid: int) -> int:
    """Proportional set size in bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        for line in f:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def build(args, config):
    """Returns (forward_backward, step, finish) of the chosen system."""
    torch.manual_seed(0)
    model = GPT(**config)
    rank = int(os.environ["RANK"])
    if args.system == "limit":
        if args.free_gradients:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def forward_backward(batch):
            loss = model(*batch)
            loss.backward()
            return loss
        return forward_backward, lambda: model.zero_grad(set_to_none=True), lambda: {
            "copy_bytes_per_second": copy_bandwidth()}
    if args.system == "zerod":
        import zerod
        ds = {"train_micro_batch_size_per_gpu": config["batch"], "gradient_clipping": 0.0,
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
              # DDP and FSDP2 compute no norm either.
              "zero_optimization": {"stage": args.stage, "compute_grad_norm": False},
              "zerod": json.loads(args.zerod)}
        engine, *_ = zerod.initialize(model=model, config=ds)
        del model
        info = engine.client.plan_text if hasattr(engine, "client") else ""

        def forward_backward(batch):
            loss = engine(*batch)
            engine.backward(loss)
            return loss

        def finish():
            engine.destroy()
            return {"plan": info}
        return forward_backward, engine.step, finish

    import torch.distributed as dist
    dist.init_process_group("gloo")
    if args.system == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def forward_backward(batch):
        loss = wrapped(*batch)
        loss.backward()
        return loss

    def step():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def finish():
        dist.barrier()
        dist.destroy_process_group()
        return {}
    return forward_backward, step, finish


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=["zerod", "ddp", "fsdp2", "limit"], required=True)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--free-gradients", action="store_true",
                        help="limit: each gradient is freed as soon as it is complete")
    parser.add_argument("--zerod", default="{}", help="the config's block 'zerod', as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = MODELS[args.model]
    forward_backward, step, finish = build(args, config)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    shape = (config["batch"], config["sequence"])
    rank0 = os.environ["RANK"] == "0"
    times, losses = [], []
    for i in range(args.warmup + args.steps):
        tokens = torch.randint(config["vocabulary"], shape, generator=generator)
        if rank0:
            # The parent reads its counters of traffic between these lines.
            print(json.dumps({"mark": "step", "index": i}), flush=True)
        start = time.perf_counter()
        loss = forward_backward((tokens, tokens))
        step()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    if rank0:
        print(json.dumps({"mark": "end"}), flush=True)
    result = finish()
    if rank0:
        result |= {"system": args.system, "seconds": times[args.warmup:], "losses": losses,
                   "parameters": sum(p.numel() for p in GPT(**config).parameters())
                   if args.system == "limit" else None}
        print(json.dumps({"mark": "result", **result}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
