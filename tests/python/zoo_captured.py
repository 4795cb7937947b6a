# SPDX-License-Identifier: Apache-2.0
"""More cases of zoo.py: models whose later passes have parameters that an earlier one looked up."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo import CASES, WIDTH, Block, Stack, Train, batch, case, simple


def captured(call) -> Callable[[int, int], tuple[nn.Module, Train]]:
    """`call(block, x, table)`: a parameter that was looked up once, for all blocks."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(WIDTH, WIDTH)
            self.other = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, table):
            return torch.tanh(self.own(x) + self.other(table).mean(0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, WIDTH)
            self.layers = nn.ModuleList(Relative() for _ in range(3))

        def forward(self, x):
            table = self.table.weight
            x = x.requires_grad_() + self.table(torch.arange(len(x)) % 5)
            for layer in self.layers:
                x = call(layer, x, table)
            return x @ table.t()

    return lambda rank, world: (Model(), simple(rank))


case(captured(lambda block, x, table: block(x, table)), "captured_parameter")
case(captured(lambda block, x, table: checkpoint(block, x, table=table, use_reentrant=False)),
     "captured_parameter_checkpoint")
case(captured(lambda block, x, table: checkpoint(
    lambda x: block(x, table[:3]), x, use_reentrant=True)), "captured_parameter_reentrant")


@case
def captured_parameter_inside(rank, world):
    """As models of transformers are checkpointed: below the hooks of the modules."""
    model, train = CASES["captured_parameter"](rank, world)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model, train


@case
def gradient_penalty(rank, world):
    """The norm of a gradient is part of the loss; a forward and another backward come between."""

    def train(engine, step):
        x = batch(rank, step).requires_grad_()
        (slope,) = torch.autograd.grad(engine(x).sum(), x, create_graph=True)
        engine.backward(engine(batch(rank, step + 500)).square().mean(), retain_graph=True)
        loss = engine(x).abs().mean() + (slope.norm(dim=1) - 1).square().mean()
        engine.backward(loss)
        return loss.item()

    return Stack(), train


@case
def parametrized_for_a_while(rank, world):
    """A parametrization that comes and goes with each forward, as of LoRA on experts in PEFT."""

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            object.__setattr__(self, "scale", scale)

        def forward(self, weight):
            return weight * self.scale

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH)
            self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

        def forward(self, x):
            nn.utils.parametrize.register_parametrization(
                self.base, "weight", Scaled(self.scale))
            try:
                return self.base(x)
            finally:
                nn.utils.parametrize.remove_parametrizations(
                    self.base, "weight", leave_parametrized=False)

    return nn.Sequential(Wrapped(), nn.Tanh(), Wrapped(), nn.Linear(WIDTH, 3)), simple(rank)


@case
def encoder_alone(rank, world):
    """generate() calls an encoder, whose embedding is tied to others, outside of any forward."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(7, WIDTH)
            self.encoder = nn.Sequential(nn.Embedding(7, WIDTH), Block())
            self.encoder[0].weight = self.tokens.weight
            self.head = nn.Linear(WIDTH, 7, bias=False)

        def forward(self, tokens, encoded):
            return self.head(self.tokens(tokens) + encoded)

    def train(engine, step):
        tokens = torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(step + rank))
        with torch.no_grad():
            first = engine(tokens, engine.module.encoder(tokens)).sum()
        loss = engine(tokens, engine.module.encoder(tokens)).square().mean()
        engine.backward(loss)
        return loss.item() + first.item()

    return Model(), train


@case
def asked_for_their_type(rank, world):
    """A forward that looks at each block before it calls it: no more than a few are held for it."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x.to(block.weight.dtype)))
            return x

    def train(engine, step):
        gathering = engine.gathering
        most = 0

        def look(*_):
            nonlocal most
            most = max(most, sum(gathering.held))

        handles = [block.register_forward_hook(look) for block in engine.module.blocks]
        loss = engine(batch(rank, step)).square().mean()
        for handle in handles:
            handle.remove()
        assert most <= 6, most
        engine.backward(loss)
        return loss.item()

    return Stack(), train


def gave_back(call) -> Callable[[int, int], tuple[nn.Module, Train]]:
    """Modules that return a parameter of theirs, or a view of it, for others to read: more of them
    at a time than parameters that were only looked up stay gathered for."""

    class Query(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(3, WIDTH) / 8)

        def forward(self, count):
            return {"query": self.query.expand(count, -1, -1)} if count else (self.query,)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.ModuleList(Query() for _ in range(6))
            self.layers = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x):
            x = x.requires_grad_() * 1
            views = [query(len(x))["query"] for query in self.queries]
            whole = [query(0)[0] for query in self.queries]
            for layer, view, query in zip(self.layers, views, whole):
                x = call(read, layer, x, view, query)
            return x

    def read(layer, x, view, query):
        return layer(x + view.mean(1) * query.sum(0))

    return lambda rank, world: (Model(), simple(rank))


case(gave_back(lambda function, *args: function(*args)), "parameter_given_back")
case(gave_back(partial(checkpoint, use_reentrant=False)), "parameter_given_back_checkpoint")
case(gave_back(partial(checkpoint, use_reentrant=True)), "parameter_given_back_reentrant")
