# SPDX-License-Identifier: Apache-2.0
"""Saves and loads by Accelerate at moments other than between two steps; knows nothing of zerod.
argv: OPTIONS, JSON: stage, folder."""

import hashlib
import json
import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import set_seed
from torch import nn

options = {"stage": 3, "folder": ""} | json.loads(sys.argv[1])
config = {
    "zero_optimization": {
        "stage": options["stage"],
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 4,
    "sequence_parallel_size": 1,
    "tensor_parallel": {"autotp_size": 1},
}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
set_seed(1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)


def micro_step(index):
    generator = torch.Generator().manual_seed(index * 10 + accelerator.process_index)
    inputs = torch.randn(4, 8, generator=generator)
    with accelerator.accumulate(model):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def weights():
    state = accelerator.get_state_dict(model)
    rate = optimizer.param_groups[0]["lr"]
    if state is None:  # another rank's
        return ""
    data = b"".join(value.float().numpy().tobytes() for value in state.values())
    return hashlib.sha256(data).hexdigest()[:8] + f" {rate:.6f}"


def folder(name):
    return f"{options['folder']}/{name}"


results = {"begun": weights()}
accelerator.save_state(folder("begun"))
for index in range(8):
    micro_step(index)
    if index == 3:
        accelerator.save_state(folder("between"))
        results["between"] = weights()
results["whole"] = weights()

# From before the first step.
accelerator.load_state(folder("begun"))
results["begun_again"] = weights()
for index in range(4):
    micro_step(index)
# What is loaded is saved again, and is the same.
accelerator.load_state(folder("between"))
accelerator.save_state(folder("again"))
accelerator.load_state(folder("begun"))
accelerator.load_state(folder("again"))
for index in range(4, 8):
    micro_step(index)
results["from_again"] = weights()

# Within an accumulation: what is on its way is no part of what is saved, and goes on.
accelerator.load_state(folder("between"))
micro_step(4)
accelerator.save_state(folder("within"))
for index in range(5, 8):
    micro_step(index)
results["past_within"] = weights()
micro_step(8)
try:
    accelerator.load_state(folder("within"))
    results["load_within"] = "loaded"
except RuntimeError as error:
    results["load_within"] = str(error)
micro_step(9)
accelerator.load_state(folder("within"))
results["within"] = weights()
micro_step(5)
results["from_within"] = weights()
if accelerator.is_main_process:
    print("RESULT", json.dumps(results))
accelerator.end_training()
