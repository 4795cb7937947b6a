# SPDX-License-Identifier: Apache-2.0
"""The training of `workers.train_small` without a daemon."""

import math

import torch

import workers

STEPS = 6


def plain(make, steps=STEPS, accumulation=1, clip=0.0, world=2, schedule=None):
    """The same training in one process: losses of rank 0, norms, weights. `schedule` makes a
    scheduler of the optimizer."""
    torch.manual_seed(5)
    model = workers.small_model()
    optimizer = make(workers.groups_of(model))
    scheduler = schedule(optimizer) if schedule is not None else None
    losses, norms = [], []
    for step in range(1, steps + 1):
        for micro in range(accumulation):
            for rank in range(world):
                x, y = workers.small_batch(step, micro, rank)
                loss = (model(x) - y).square().mean()
                (loss / (world * accumulation)).backward()
                if rank == 0:
                    losses.append(loss.item())
        limit = clip if clip > 0 else math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def rounded(dtype, states, lr, steps=24, world=2):
    """Losses of rank 0 where weights, and Adam's states if `states`, are rounded to `dtype` after
    each step: AdamW in fp32 on values read from 16 bits, gradients summed in fp32."""
    torch.manual_seed(5)
    model = workers.small_model().to(dtype)
    groups = [{**group, "params": [p.detach().float() for p in group["params"]]}
              for group in workers.groups_of(model)]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    seen = [p for group in workers.groups_of(model) for p in group["params"]]
    wide = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step in range(1, steps + 1):
        for rank in range(world):
            x, y = workers.small_batch(step, 0, rank)
            loss = (model(x.to(dtype)).float() - y).square().mean()
            gradients = torch.autograd.grad(loss, seen)
            for p, gradient in zip(wide, gradients, strict=True):
                p.grad = gradient.float() / world + (0 if rank == 0 else p.grad)
            if rank == 0:
                losses.append(loss.item())
        optimizer.step()
        for p, narrow in zip(wide, seen, strict=True):
            narrow.data.copy_(p)
            p.copy_(narrow.data)
            for name in ("exp_avg", "exp_avg_sq") if states else ():
                value = optimizer.state[p][name]
                value.copy_(value.to(dtype))
    return losses
