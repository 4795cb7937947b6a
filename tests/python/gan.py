# SPDX-License-Identifier: Apache-2.0
"""Two models that train each other: the generator's gradients pass through the discriminator, and
leave gradients there that are nobody's. The loop is that of DeepSpeedExamples' GAN."""

import torch
from torch import nn

import zoo

STEPS = 3
# An eps that shows gradients of another size.
GROUP = {"lr": 1e-2, "betas": (0.5, 0.999), "eps": 1e-3}


def models() -> list[nn.Module]:
    """Generator and discriminator."""
    torch.manual_seed(11)
    return [nn.Sequential(zoo.Stack(), nn.Linear(5, size)) for size in (zoo.WIDTH, 1)]


def train(parts, clear: str, batches, steps: int = STEPS) -> list[float]:
    """`parts`: (callable, backward, step, {how to clear the gradients: function}) of both.
    `batches(k)` is this rank's k-th batch. The losses of every pass."""
    (generate, backward_g, step_g, clear_g), (judge, backward_d, step_d, clear_d) = parts
    loss_of = nn.functional.binary_cross_entropy_with_logits
    losses = []

    def judged(x, label):
        score = judge(x)
        loss = loss_of(score, torch.full_like(score, label))
        losses.append(float(loss.detach()))
        return loss

    for step in range(steps):
        clear_d[clear]()
        backward_d(judged(batches(3 * step), 1.0))
        made = generate(batches(3 * step + 1))
        backward_d(judged(made.detach(), 0.0))
        step_d()
        clear_g[clear]()
        backward_g(judged(made, 1.0))
        step_g()
    return losses


def of_engine(engine):
    clear = {
        "module": engine.module.zero_grad,
        "zero": lambda: engine.module.zero_grad(set_to_none=False),
        "engine": engine.zero_grad,
        "optimizer": engine.optimizer.zero_grad,
        "never": lambda: None,
    }
    return engine, engine.backward, engine.step, clear


def of_torch(model):
    optimizer = torch.optim.AdamW(model.parameters(), **GROUP, weight_decay=0.0)

    def step():
        optimizer.step()
        if never:  # as the step of an engine does
            optimizer.zero_grad()

    never = []
    clear = {name: optimizer.zero_grad for name in ("module", "engine", "optimizer")}
    clear["zero"] = lambda: optimizer.zero_grad(set_to_none=False)
    clear["never"] = lambda: never.append(True)
    return model, torch.Tensor.backward, step, clear


def config(stage: int, **zerod) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {**GROUP, "weight_decay": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zerod": zerod,
    }
