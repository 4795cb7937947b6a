# SPDX-License-Identifier: Apache-2.0
"""Models that break naive gathering. Each case is a model and what is done with it in one step.

A case is a function of (rank, world) that returns (model, train): `train(engine, step)` does
everything up to engine.step() and returns a float to compare.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 24
Train = Callable[[object, int], float]
CASES: dict[str, Callable[[int, int], tuple[nn.Module, Train]]] = {}


def case(function, name: str = ""):
    CASES[name or function.__name__] = function
    return function


def batch(rank: int, step: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(*(shape or (6, WIDTH)), generator=generator)


def simple(rank: int) -> Train:
    def train(engine, step):
        loss = engine(batch(rank, step)).square().mean()
        engine.backward(loss)
        return loss.item()

    return train


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@case
def stack(rank, world):
    return Stack(), simple(rank)


@case
def sequential(rank, world):
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3)), simple(rank)


@dataclass
class Output:
    hidden: torch.Tensor
    extra: list


class DictBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x=None):
        hidden = torch.tanh(self.a(x["hidden"]))
        return {"hidden": hidden, "both": Output(self.b(hidden), [hidden * 2])}


@case
def dict_outputs(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(DictBlock() for _ in range(3))

        def forward(self, x):
            out = {"hidden": x}
            total = 0
            for layer in self.layers:
                out = layer(x=out)
                total = total + out["both"].hidden.square().mean() + out["both"].extra[0].mean()
            return {"loss": total}

    def train(engine, step):
        loss = engine(batch(rank, step))["loss"]
        engine.backward(loss)
        return loss.item()

    return Model(), train


@case
def frozen_first_block(rank, world):
    model = Stack()
    model.layers[0].requires_grad_(False)
    return model, simple(rank)


@case
def frozen_middle_block(rank, world):
    model = Stack()
    model.layers[1].requires_grad_(False)
    model.layers[1].eval()
    return model, simple(rank)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@case
def lora(rank, world):
    model = Stack().requires_grad_(False)
    for layer in model.layers:
        layer.inner, layer.outer = Lora(layer.inner), Lora(layer.outer)
    return model, simple(rank)


@case
def multihead_attention(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.layers = nn.ModuleList(
                nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2)
            )
            self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True)

        def forward(self, x):
            x = x + self.first(x, x, x, need_weights=False)[0]
            for layer in self.layers:
                x = x + layer(x, x, x)[0]
            return self.encoder(x)

    def train(engine, step):
        x = batch(rank, step, 2, 5, WIDTH)
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.eval()
        with torch.no_grad():
            fast = engine(x).square().mean().item()
        engine.train()
        return loss.item() + fast

    return Model(), train


@case
def tied_head(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(11, WIDTH)
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(WIDTH, 11, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x):
            x = self.tokens(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x) + F.linear(x, self.tokens.weight)

    def train(engine, step):
        tokens = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(step + rank))
        loss = F.cross_entropy(engine(tokens).view(-1, 11), tokens.view(-1))
        engine.backward(loss)
        return loss.item()

    return Model(), train


@case
def tied_layers(rank, world):
    model = Stack()
    model.layers[2].inner.weight = model.layers[0].inner.weight
    return model, simple(rank)


@case
def weight_read_by_parent(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)
            self.b = nn.Linear(WIDTH, WIDTH)
            self.table = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

        def forward(self, x):
            x = F.linear(torch.relu(self.a(x)), self.b.weight, self.b.bias)
            return x * self.table[0] + self.table[1]

    return Model(), simple(rank)


class Shared(nn.Module):
    """One block used three times, with or without checkpoints."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.entry(x)
        for _ in range(3):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


@case
def shared_layer(rank, world):
    return Shared(), simple(rank)


@case
def shared_layer_checkpoint(rank, world):
    return Shared(reentrant=False), simple(rank)


@case
def shared_layer_checkpoint_reentrant(rank, world):
    return Shared(reentrant=True), simple(rank)


@case
def checkpointed_pairs(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def pair(self, i, x):
            return self.layers[i + 1](F.dropout(self.layers[i](x), 0.1, self.training))

        def forward(self, x):
            x = checkpoint(self.pair, 0, x, use_reentrant=False)
            x = x.detach().requires_grad_() * 1 + x if self.training else x
            return checkpoint(self.pair, 2, x, use_reentrant=True)

    return Model(), simple(rank)


@case
def frozen_base_checkpointed(rank, world):
    model = Shared(reentrant=False)
    model.block.requires_grad_(False)
    return model, simple(rank)


@case
def two_backwards(rank, world):
    def train(engine, step):
        first = engine(batch(rank, step)).square().mean()
        engine.backward(first)
        second = engine(batch(rank, step + 500)).abs().mean()
        engine.backward(second)
        return first.item() + second.item()

    return Stack(), train


@case
def retain_graph(rank, world):
    def train(engine, step):
        out = engine(batch(rank, step))
        engine.backward(out.square().mean(), retain_graph=True)
        engine.backward(out.abs().mean())
        return out.sum().item()

    return Stack(), train


@case
def plain_loss_backward(rank, world):
    def train(engine, step):
        loss = engine(batch(rank, step)).square().mean()
        loss.backward()
        return loss.item()

    return Shared(reentrant=True), train


@case
def evaluation_between(rank, world):
    def train(engine, step):
        loss = engine(batch(rank, step)).square().mean()
        engine.backward(loss)
        with torch.no_grad():
            seen = engine(batch(rank, step + 900)).sum().item()
        return loss.item() + seen

    return Stack(), train


@case
def evaluation_on_rank_0(rank, world):
    def train(engine, step):
        loss = engine(batch(rank, step)).square().mean()
        engine.backward(loss)
        if rank == 0:
            engine.eval()
            with torch.no_grad():
                for i in range(3):
                    loss = loss + engine(batch(rank, step + 900 + i)).sum()
            engine.train()
        return loss.item()

    return Stack(), train


@case
def unequal_micro_steps(rank, world):
    def train(engine, step):
        total = 0.0
        for i in range(1 + (rank + step) % 3):
            engine.set_gradient_accumulation_boundary(i == (rank + step) % 3)
            loss = engine(batch(rank, 10 * step + i)).square().mean()
            engine.backward(loss)
            if i < (rank + step) % 3:
                engine.step()
            total += loss.item()
        return total

    return Stack(), train


@case
def mixture_of_experts(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(WIDTH, 4)
            self.experts = nn.ModuleList(Block() for _ in range(4))
            self.never = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, first):
            weights = self.router(x).softmax(-1)
            out = x
            for i in (first, (first + 1) % 3):
                out = out + weights[:, i : i + 1] * self.experts[i](x)
            return out

    def train(engine, step):
        loss = engine(batch(rank, step), (rank + step) % 3).square().mean()
        engine.backward(loss)
        return loss.item()

    return Model(), train


@case
def leaf_module(rank, world):
    """Experts that are gathered with their router, whichever are called."""
    from zerod import set_z3_leaf_modules

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(WIDTH, 4)
            self.experts = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x, first):
            weights = self.router(x).softmax(-1)
            for i in (first, (first + 1) % 3):
                x = x + weights[:, i : i + 1] * self.experts[i](x)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Experts(), Experts()

        def forward(self, x, first):
            return self.second(self.first(x, first), first + 1)

    def train(engine, step):
        assert [u.name for u in engine.client.units] == ["first", "second"]
        loss = engine(batch(rank, step), (rank + step) % 2).square().mean()
        engine.backward(loss)
        return loss.item()

    model = Model()
    set_z3_leaf_modules(model, [Experts])
    return model, train


@case
def experts_by_turns(rank, world):
    """Three micro-steps; in none of them do two ranks use the same experts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Block() for _ in range(6))
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x, first):
            for i in (first, first + 2, first + 1):
                x = self.experts[i % 6](x)
            return self.head(x)

    def train(engine, step):
        total = 0.0
        for i in range(3):
            loss = engine(batch(rank, 10 * step + i), 3 * rank + step + i).square().mean()
            engine.set_gradient_accumulation_boundary(i == 2)
            engine.backward(loss)
            if i < 2:
                engine.step()
            total += loss.item()
        return total

    return Model(), train


@case
def exception_in_forward(rank, world):
    class Model(Stack):
        def forward(self, x, fail_at=-1):
            for i, layer in enumerate(self.layers):
                if i == fail_at:
                    raise KeyError("on purpose")
                x = layer(x)
            return self.head(x)

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.bad = nn.ModuleList(BadBlock() for _ in range(2))

        def forward(self, x, fail_at=-1):
            return self.bad[1](self.model(x, fail_at), fail_at == 7)

    class BadBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x, fail):
            x = self.linear(x)
            if fail:
                raise KeyError("on purpose")
            return x

    def train(engine, step):
        for fail_at in (1, 7):
            try:
                engine(batch(rank, step), fail_at)
                raise AssertionError("it should have failed")
            except KeyError:
                pass
        return simple(rank)(engine, step)

    return Fails(), train


@case
def all_reduce_in_forward(rank, world):
    import zerod

    class Synced(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.scale(x)
            mean = zerod.all_reduce(x.detach().mean().item(), "mean")
            return x - mean

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Synced() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Model(), simple(rank)


@case
def compiled(rank, world):
    return torch.compile(Stack(), backend="aot_eager"), simple(rank)


@case
def buffers(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.BatchNorm1d(WIDTH)
            self.b = nn.Linear(WIDTH, 4)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return self.b(self.norm(self.a(x)))

    return Model(), simple(rank)


@case
def parametrized(rank, world):
    model = Stack()
    for layer in model.layers:
        nn.utils.parametrizations.weight_norm(layer.inner)
    return model, simple(rank)


@case
def recurrent(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(WIDTH, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    def train(engine, step):
        loss = engine(batch(rank, step, 2, 4, WIDTH)).square().mean()
        engine.backward(loss)
        return loss.item()

    return Model(), train


@case
def one_module_in_two_places(rank, world):
    class Holder(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.own = nn.Linear(WIDTH, WIDTH)
            self.shared = shared

        def forward(self, x):
            return self.shared(torch.tanh(self.own(x)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(Holder(shared) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Model(), simple(rank)


@case
def scalar_and_empty_parameters(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.linear = nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.linear(x) * self.gain + self.nothing.sum()

    return Model(), simple(rank)


@case
def second_order(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)
            self.outer = nn.Linear(WIDTH, 1)

        def forward(self, x):
            x = x.requires_grad_()
            y = self.outer(torch.tanh(self.inner(x)))
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y + slope.square().sum(1, keepdim=True)

    return Model(), simple(rank)


@case
def transposed_parameter(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, WIDTH).t())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x @ self.weight)

    return Model(), simple(rank)
