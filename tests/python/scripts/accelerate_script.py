# SPDX-License-Identifier: Apache-2.0
"""Trains a small model by Accelerate, as a user would; knows nothing of zerod. argv: OPTIONS, JSON.

case       a: optimizer and schedule of the configuration; b: torch's; c: schedule of the
           configuration; d: optimizer of the configuration with torch's schedule; none: Accelerate
           without DeepSpeed
kill_at    the step after which rank 1 kills itself, in the launcher's first attempt
save, load a folder for save_state, after `save_at` steps, and load_state before training
"""

import hashlib
import json
import os
import signal
import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

options = {"case": "b", "stage": 2, "dtype": "fp32", "kill_at": 0, "epochs": 2, "dropout": 0.1,
           "save": "", "save_at": 0, "load": ""} | json.loads(sys.argv[1])
case = options["case"]

config = {
    "zero_optimization": {"stage": options["stage"]},
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
if options["dtype"] != "fp32":
    config[options["dtype"]] = {"enabled": True}
if case in ("a", "d"):
    config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
if case in ("a", "c"):
    params = {key: "auto" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")}
    config["scheduler"] = {"type": "WarmupLR", "params": params}

if case == "none":
    accelerator = Accelerator(gradient_accumulation_steps=2)
else:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
set_seed(1)
model = nn.Sequential(
    nn.Linear(8, 32), nn.Tanh(), nn.Dropout(options["dropout"]), nn.Linear(32, 1)
)
x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)


def decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))


if case in ("a", "c", "d"):
    from accelerate.utils import DummyOptim, DummyScheduler
if case in ("a", "d"):
    optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.01)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
if case in ("a", "c"):
    scheduler = DummyScheduler(optimizer, total_num_steps=16, warmup_num_steps=4)
else:
    real = torch.optim.SGD(model.parameters(), lr=1.0) if case == "d" else optimizer
    scheduler = decay(real)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
if options["load"]:
    accelerator.load_state(options["load"])

losses, rates, steps = [], [], 0
for epoch in range(options["epochs"]):
    for inputs, wanted in loader:
        with accelerator.accumulate(model):
            if options["dtype"] != "fp32":
                inputs = inputs.to({"bf16": torch.bfloat16, "fp16": torch.float16}[
                    options["dtype"]])
            loss = nn.functional.mse_loss(model(inputs).float(), wanted)
            accelerator.backward(loss)
            if case == "none" and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        steps += 1
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        rates.append(optimizer.param_groups[0]["lr"])
        if steps == options["save_at"]:
            accelerator.save_state(options["save"])
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if steps == options["kill_at"] and first and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

state = accelerator.unwrap_model(model).state_dict()
if accelerator.is_main_process:
    digest = hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in state.values()))
    print("RESULT", json.dumps({"losses": losses, "rates": rates, "weights": digest.hexdigest(),
                                "type": str(accelerator.distributed_type)}))
accelerator.end_training()
