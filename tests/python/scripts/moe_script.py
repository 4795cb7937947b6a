# SPDX-License-Identifier: Apache-2.0
"""Trains a small mixture of experts by Accelerate, each rank with experts of its own. Knows nothing
of zerod. argv: OPTIONS, JSON.

stage   of ZeRO; -1: Accelerate without DeepSpeed
leaf    whether transformer_moe_cls_names names the layer of experts
"""

import json
import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs
from torch import nn

EXPERTS = 4
options = {"stage": 3, "leaf": True} | json.loads(sys.argv[1])
config = {
    "zero_optimization": {"stage": options["stage"], "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
}


class MixtureLayer(nn.Module):
    """One expert for each input: those that begin with less than zero have experts 0 and 1."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(EXPERTS))

    def forward(self, x):
        choice = (x[:, 0] >= 0).long() * 2 + (x[:, 1] >= 0).long()
        output = torch.zeros_like(x)
        for index in choice.unique().tolist():
            output[choice == index] = torch.tanh(self.experts[index](x[choice == index]))
        return output


if options["stage"] < 0:
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused])
else:
    classes = {"transformer_moe_cls_names": "MixtureLayer"} if options["leaf"] else {}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, **classes))
rank = accelerator.process_index
torch.manual_seed(0)
model = nn.Sequential(MixtureLayer(), nn.Linear(16, 16), MixtureLayer(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
if options["stage"] < 0:
    model, optimizer = accelerator.prepare(model, optimizer)
else:
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

losses = []
for step in range(6):
    data = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, 16, generator=data)
    x[:, 0] = x[:, 0].abs() * (1 if rank else -1)  # no expert of the first layer serves both ranks
    loss = model(x).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
state = accelerator.unwrap_model(model).state_dict()
units = len(model.client.units) if options["stage"] >= 0 else 0
if accelerator.is_main_process:
    print("RESULT", json.dumps({
        "losses": losses, "units": units,
        "sums": {name: value.double().abs().sum().item() for name, value in state.items()},
    }))
accelerator.end_training()
