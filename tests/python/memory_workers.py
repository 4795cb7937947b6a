# SPDX-License-Identifier: Apache-2.0
"""What test_memory.py runs in the ranks."""

import os
import urllib.request

import torch
from torch import nn

import zerod


class Stack(nn.Module):
    """Layers of 2 x 256 x 1024 weights: large beside padding, pages and blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 1024, bias=False), nn.Tanh(),
                          nn.Linear(1024, 256, bias=False))
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def _engine(layers: int, config: dict):
    torch.manual_seed(0)
    return zerod.initialize(model=Stack(layers), config={
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}} | config)[0]


def train(layers: int, steps: int, config: dict, metrics: list[str]) -> dict:
    """Trains, and reads the metrics of its node while the job still has its memory."""
    engine = _engine(layers, config)
    losses = []
    for _ in range(steps):
        loss = engine(torch.ones(2, 256))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    address = metrics[int(os.environ["GROUP_RANK"])]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    zerod.barrier()
    parameters = sum(p.numel() for p in engine.module.parameters())
    engine.destroy()
    return {"losses": losses, "parameters": parameters, "metrics": text}


def sees_update(config: dict) -> dict:
    """Every rank's next forward sees the weights that the step wrote, at the same address."""
    engine = _engine(2, config)
    weight = next(engine.module.parameters())
    address = weight.data_ptr()
    seen = [float(weight.sum())]
    for _ in range(3):
        loss = engine(torch.ones(2, 256))
        engine.backward(loss)
        engine.step()
        seen.append(float(weight.sum()))
    same_address = weight.data_ptr() == address
    counters = engine.client.counters()
    zerod.barrier()
    engine.destroy()
    return {"seen": seen, "same_address": same_address, "waits": counters.gather_waits,
            "hits": counters.gather_hits}


def writes_in_private_copies(layers: int, config: dict) -> dict:
    """What rank 1 writes in a 16-bit job: the peak beside the model, by rank, and that the master
    copy of all else keeps its bits."""
    from zero_init_workers import Peak

    engine = _engine(layers, config)
    loss = engine(torch.ones(2, 256, dtype=torch.bfloat16))
    engine.backward(loss)
    engine.step()  # now the master copy has bits that bfloat16 has not
    parameters = list(engine.module.parameters())
    elements = sum(p.numel() for p in parameters)
    expected = engine.state_dict(master=True)
    expected["layers.0.0.weight"][:, 3] = 0.25
    expected["layers.1.2.weight"].fill_(-2.0)
    with Peak() as peak, zerod.GatheredParameters(parameters, modifier_rank=1):
        engine.module.layers[0][0].weight.data[:, 3] = 0.25
        engine.module.layers[1][2].weight.data = torch.full((256, 1024), -2.0)
    state = engine.state_dict(master=True)
    equal = all(torch.equal(state[name], value) for name, value in expected.items())
    # A tensor that does not fit is an error where it was given, and holds nobody up.
    wrong = zerod.GatheredParameters(parameters, modifier_rank=1)
    message = ""
    try:
        with wrong:
            parameters[0].data = torch.ones(2, 2)
    except ValueError as error:
        message = str(error)
    same = all(torch.equal(engine.state_dict(master=True)[name], value)
               for name, value in state.items())
    zerod.barrier()
    engine.destroy()
    return {"peak": peak.more, "bytes": 2 * elements, "equal": equal and same, "error": message}
