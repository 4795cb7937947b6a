# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_checkpoint.py run."""

import copy
import os
from pathlib import Path

import torch
from torch import nn


def model() -> nn.Module:
    """Tied weights, a frozen parameter, a buffer that changes, dropout."""
    torch.manual_seed(5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 24)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 24))
                for _ in range(3)
            )
            self.norm = nn.LayerNorm(24)
            self.register_buffer("mean", torch.zeros(24))
            self.frozen = nn.Linear(24, 24)
            self.frozen.requires_grad_(False)
            self.head = nn.Linear(24, 40, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens).mean(1)
            for block in self.blocks:
                x = x + block(x)
            self.mean.lerp_(x.detach().float().mean(0), 0.1)
            return self.head(self.frozen(self.norm(x)))

    return Net()


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, 40, (6, 5), generator=generator)
    return tokens, tokens[:, 0]


def start(config: dict, seed: int = 11):
    import zerod

    engine, *_ = zerod.initialize(model=model(), config=copy.deepcopy(config))
    torch.manual_seed(seed + engine.global_rank)
    return engine


def train(engine, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens, labels = batch(engine.global_steps, engine.global_rank)
        loss = nn.functional.cross_entropy(engine(tokens).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state_of(engine) -> dict[str, torch.Tensor]:
    """fp32 weights, every optimizer state, buffers, by name."""
    state = {key: value.clone() for key, value in engine.state_dict(master=True).items()}
    optimizer = engine.optimizer
    for managed in engine.description.parameters:
        if managed.trainable:
            for key, kind in optimizer.states(optimizer.param_groups[managed.group]).items():
                state[f"{managed.name}/{key}"] = engine.weights.read(managed, kind)
    return state


def save_and_go_on(config: dict, directory: str, before: int, after: int, **options) -> dict:
    engine = start(config)
    train(engine, before)
    engine.save_checkpoint(directory, client_state={"rank": engine.global_rank}, **options)
    saved = state_of(engine)
    steps = engine.client.optimizer_steps()
    losses = train(engine, after)
    return {"saved": saved, "losses": losses, "steps": steps, "final": state_of(engine),
            "lr": engine.get_lr(), "scale": engine.loss_scale()}


def load_and_go_on(config: dict, directory: str, after: int, steps_first: int = 0,
                   **options) -> dict:
    engine = start(config, seed=99)
    train(engine, steps_first)
    path, client_state = engine.load_checkpoint(directory, **options)
    loaded = state_of(engine)
    steps = engine.client.optimizer_steps()
    counters = (engine.global_steps, engine.skipped_steps)
    losses = train(engine, after)
    return {"path": path, "client_state": client_state, "loaded": loaded, "steps": steps,
            "counters": counters, "losses": losses, "final": state_of(engine),
            "lr": engine.get_lr(), "scale": engine.loss_scale()}


def refused_load(config: dict, directory: str, change: str = "") -> tuple[str, bool]:
    """The error, and whether the state is what it was."""
    from zerod import CheckpointError

    engine = start(config)
    train(engine, 1)
    before = state_of(engine)
    try:
        engine.load_checkpoint(directory, **({"tag": change} if change else {}))
    except CheckpointError as error:
        after = state_of(engine)
        train(engine, 1)
        return str(error), all(torch.equal(before[k], after[k]) for k in before)
    return "", False


def refused_save(config: dict, directory: str, tags: list[str]) -> str:
    from zerod import CheckpointError

    engine = start(config)
    try:
        engine.save_checkpoint(directory, tag=tags[engine.global_rank])
    except CheckpointError as error:
        train(engine, 1)
        return str(error)
    return ""


def save_again_and_again(config: dict, directory: str, announce: str) -> None:
    """Until it is killed."""
    engine = start(config)
    for i in range(10_000):
        train(engine, 1)
        engine.save_checkpoint(directory, tag="same")
        if i == 1 and engine.global_rank == 0:
            Path(announce).write_text(str(os.getpid()))


def released_model(config: dict, directory: str) -> dict:
    from zerod.zero_to_fp32 import load_state_dict_from_zero_checkpoint

    engine = start(config)
    train(engine, 2)
    engine.save_checkpoint(directory)
    expected = state_of(engine)
    plain = load_state_dict_from_zero_checkpoint(engine.module, directory)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    tokens, labels = batch(0, 0)
    nn.functional.cross_entropy(plain(tokens), labels).backward()
    return {
        "expected": expected,
        "state": state,
        "gradients": all(p.grad is not None for p in plain.parameters() if p.requires_grad),
    }
