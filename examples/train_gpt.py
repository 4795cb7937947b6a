# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level GPT of about 10M parameters, on the source of Python's standard library.

    torchrun --nproc-per-node 2 examples/train_gpt.py --steps 100

Plain PyTorch but for four lines: initialize, backward, step and all_reduce are zerod's. A trainer
that is killed and started again goes on where it was: nothing here says so.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm


class Block(nn.Module):
    """One transformer block: attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, sequence, width = x.shape
        q, k, v = (
            part.view(batch, sequence, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, sequence, width)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.outer(F.gelu(self.inner(self.norm_2(x)))))


class GPT(nn.Module):
    """Predicts the next byte; returns the mean loss of a batch of windows."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, args.width)
        self.positions = nn.Embedding(args.sequence, args.width)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(
            Block(args.width, args.heads, args.dropout) for _ in range(args.layers)
        )
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        inputs, targets = window[:, :-1], window[:, 1:]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))


class Windows(Dataset[torch.Tensor]):
    """Consecutive windows of `sequence` bytes and the one after them."""

    def __init__(self, text: bytes, sequence: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.sequence = sequence

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.sequence

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self.sequence
        return self.data[begin : begin + self.sequence + 1].long()


def read_text(path: str | None) -> tuple[bytes, bytes]:
    """Text to train on, and 5 % that is held out."""
    if path is not None:
        text = Path(path).read_bytes()
        cut = len(text) * 95 // 100
        return text[:cut], text[cut:]
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        p for p in library.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"} & set(p.parts)
    )
    held_out = files[10::20]
    train = [p for i, p in enumerate(files) if i % 20 != 10]
    return tuple(b"\n".join(p.read_bytes() for p in part) for part in (train, held_out))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", type=int, default=3, choices=range(4), help="ZeRO stage")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="windows of a rank's micro-batch")
    parser.add_argument("--gradient-accumulation", type=int, default=1, metavar="N")
    parser.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm, 0: none")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--text", metavar="FILE", help="train on this instead")
    parser.add_argument("--evaluation-batches", type=int, default=16, metavar="N")
    parser.add_argument("--live-parameters", type=int, metavar="N",
                        help="size of the window (stage3_max_live_parameters)")
    parser.add_argument("--persistence-threshold", type=int, metavar="N",
                        help="smaller units stay gathered (stage3_param_persistence_threshold)")
    parser.add_argument("--gradient-plan", default="auto", choices=("auto", "per_rank", "node_sum"))
    parser.add_argument("--progress", metavar="FILE", help="append a line of JSON for each step")
    parser.add_argument("--results", metavar="FILE", help="write the results as JSON (rank 0)")
    return parser.parse_args(argv)


def make_config(args: argparse.Namespace) -> dict:
    zero = {"stage": args.stage}
    if args.live_parameters is not None:
        zero["stage3_max_live_parameters"] = args.live_parameters
    if args.persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = args.persistence_threshold
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "gradient_clipping": args.clip,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16"},
        "dataloader_drop_last": True,  # steps of equal size
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": args.lr / 10,
                "warmup_max_lr": args.lr,
                "warmup_num_steps": args.warmup,
                "warmup_type": "linear",
            },
        },
        "zerod": {"gradient_plan": args.gradient_plan},
    }


class Report:
    """The bar, the lines of progress, and at the end the results; of rank 0 alone."""

    def __init__(self, args: argparse.Namespace, enabled: bool, done: int) -> None:
        self.args = args
        self.enabled = enabled
        self.tokens = 0
        self.started = time.monotonic()
        self.bar = tqdm(total=args.steps, initial=done, unit="step", disable=not enabled,
                        dynamic_ncols=True)

    def step(self, number: int, loss: float, tokens: int) -> None:
        self.tokens += tokens
        if not self.enabled:
            return
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens_per_second():.0f} tokens/s")
        if self.args.progress:
            with open(self.args.progress, "a", encoding="utf-8") as file:
                line = {"step": number, "loss": loss, "time": time.time(), "pid": os.getpid()}
                file.write(json.dumps(line) + "\n")

    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.monotonic() - self.started)

    def finish(self, results: dict) -> None:
        self.bar.close()
        if self.enabled and self.args.results:
            temporary = Path(self.args.results + ".part")
            temporary.write_text(json.dumps(results), encoding="utf-8")
            temporary.rename(self.args.results)


def hash_of(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluate(engine: nn.Module, data: Dataset, args: argparse.Namespace, rank: int) -> float:
    """Mean loss of this rank's part of the held-out text. Draws no random numbers."""
    engine.eval()
    total = 0.0
    with torch.no_grad():
        for i in range(args.evaluation_batches):
            begin = (rank * args.evaluation_batches + i) * args.batch
            window = torch.stack([data[(begin + j) % len(data)] for j in range(args.batch)])
            total += engine(window).item()
    engine.train()
    return total / args.evaluation_batches


def train(args: argparse.Namespace) -> dict:
    import zerod

    train_text, held_out_text = read_text(args.text)
    torch.manual_seed(args.seed)
    model = GPT(args)
    parameters = sum(p.numel() for p in model.parameters())
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(args.seed + 1000 + rank)  # each rank its own dropout
    engine, _, loader, _ = zerod.initialize(
        model=model,
        training_data=Windows(train_text, args.sequence),
        config=make_config(args),
        seed=args.seed,
    )
    losses = engine.client_state.setdefault("losses", [])  # comes back after a restart
    report = Report(args, rank == 0, engine.global_steps)
    tokens = args.batch * args.sequence * args.gradient_accumulation * engine.world_size
    total = 0.0
    while engine.global_steps < args.steps:
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            total += loss.item() / args.gradient_accumulation
            if engine.is_gradient_accumulation_boundary():
                losses.append(zerod.all_reduce(total, "mean"))
                total = 0.0
                engine.step()
                report.step(engine.global_steps, losses[-1], tokens)
                if engine.global_steps == args.steps:
                    break
            else:
                engine.step()
    speed = report.tokens_per_second()
    held_out = Windows(held_out_text, args.sequence)
    validation = zerod.all_reduce(evaluate(engine, held_out, args, rank), "mean")
    results = {
        "losses": losses,
        "train_loss": losses[-1],
        "validation_loss": validation,
        "tokens_per_second": speed,
        "parameters": parameters,
        "world": engine.world_size,
        "weights_sha256": hash_of(engine.state_dict(master=True)) if rank == 0 else "",
    }
    report.finish(results)
    return results


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = train(parse_arguments())
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"train loss {results['train_loss']:.4f}, validation loss "
            f"{results['validation_loss']:.4f}, {results['tokens_per_second']:.0f} tokens/s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
