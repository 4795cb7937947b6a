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
