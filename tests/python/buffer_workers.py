# SPDX-License-Identifier: Apache-2.0
"""What test_zero_init.py runs in the ranks: what torch's constructors make inside Init."""

import copy

import torch
from torch import nn

import zerod
from zero_init_workers import CONFIG


class Positions(nn.Module):
    """Buffers as papers' code makes them."""

    def __init__(self) -> None:
        super().__init__()
        places = torch.arange(0, 9, dtype=torch.float).unsqueeze(1)
        waves = torch.exp(torch.arange(0, 8, 2).float() * -1.15)
        table = torch.zeros(9, 8)
        table[:, 0::2] = torch.sin(places * waves)
        table[:, 1::2] = torch.cos(places * waves)
        self.register_buffer("table", table)
        self.register_buffer("frequencies", waves)  # .float() is the script's word
        self.register_buffer("old", torch.Tensor(2).fill_(1.5), persistent=False)
        self.layer = nn.Linear(8, 8)
        self.register_buffer("score_bias", torch.full((8,), 5.01))
        self.register_buffer("score_scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x + self.table, self.layer.weight).square().mean()


class Routed(Positions):
    _keep_in_fp32_modules_strict = ["score_bias"]
    _keep_in_fp32_modules = ["score_*"]


def buffers_of_16_bits() -> list:
    """(names of the buffers that are fp32 when they are born, after initialize)."""
    def full(module: nn.Module) -> list[str]:
        return sorted(n for n, b in module.named_buffers() if b.dtype == torch.float32)

    results = []
    for case, (cls, precision, types) in enumerate((
        (Positions, "bf16", {}), (Positions, "fp16", {}),
        (Routed, "bf16", {}), (Routed, "fp16", {}),
        (Routed, "bf16", {"keep_in_fp32_modules": []}),
        (Routed, "bf16", {"keep_in_fp32_modules": ["ta*le", "old"]}),
        (Routed, "bf16", {"buffer_dtype": "fp32"}),
        (Routed, "bf16", {"buffer_dtype": "bf16"}),
    )):
        settings = copy.deepcopy(CONFIG) | {
            precision: {"enabled": True}, "data_types": types, "zerod": {"job": f"case-{case}"}}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        with zerod.zero.Init(config_dict_or_path=settings):
            model = nn.Sequential(cls())
        names = full(model)
        assert all(p.dtype == dtype for p in model.parameters())
        assert all(b.dtype in (dtype, torch.float32) for b in model.buffers())
        assert torch.ones(1).dtype == torch.float32
        engine, *_ = zerod.initialize(model=model, config=settings)
        if "0.table" not in full(model):  # else the types do not fit, as the user has asked
            loss = engine(torch.ones(9, 8, dtype=dtype))
            engine.backward(loss)
            engine.step()
            assert loss.isfinite()
        results.append((names, full(model), float(model[0].score_bias[0])))
        engine.destroy()
    return results


def initialized_within() -> None:
    """The engine's own tensors are what they always are."""
    settings = copy.deepcopy(CONFIG) | {"bf16": {"enabled": True}}
    with zerod.zero.Init(config_dict_or_path=settings):
        model = nn.Linear(8, 8)
        with zerod.GatheredParameters(model.weight, modifier_rank=0):
            model.weight.data.fill_(1 + 2**-7)
        engine, *_ = zerod.initialize(model=model, config=settings)
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()
        with zerod.GatheredParameters(model.weight):
            assert model.weight.dtype == torch.bfloat16
        master = engine.state_dict(master=True)["weight"]
        assert master.dtype == torch.float32
        assert not torch.equal(master, master.bfloat16().float())
    engine.destroy()
