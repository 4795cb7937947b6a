# SPDX-License-Identifier: Apache-2.0
"""A plain script for DeepSpeed that sets weights after initialize(), saves, keeps its two newest
checkpoints, and prints gradient norms. argv: OPTIONS, JSON: folder, pretrained (a checkpoint of
another run), kill_at, back_at (after this step it loads the checkpoint of two steps before)."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad, safe_set_full_fp32_param
from torch import nn

options = {"kill_at": 0, "back_at": 0, "pretrained": ""} | json.loads(sys.argv[1])
folder = Path(options["folder"])
rank = int(os.environ["RANK"])
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.05}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}
deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
engine, *_ = deepspeed.initialize(model=model, config=config)
if options["pretrained"]:
    engine.load_checkpoint(options["pretrained"], load_module_only=True)
    assert engine.global_steps == 0
engine.load_state_dict({name: value * 1.5 for name, value in engine.state_dict().items()})
with deepspeed.zero.GatheredParameters([model[2].weight], modifier_rank=0):
    if rank == 0:
        model[2].weight.data.fill_(0.25)
safe_set_full_fp32_param(model[2].bias, torch.full((1,), 0.125))
norms, saved = [], []
for step in range(1, 9):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = engine(x).square().mean()
    engine.backward(loss)
    gradient = safe_get_full_grad(model[0].weight) * 1.0
    engine.step()
    norms.append(f"{engine.get_global_grad_norm():.3f} {gradient.shape}")
    if step % 2 == 0:
        engine.save_checkpoint(folder, tag=f"at{step}")
        engine.save_16bit_model(folder, f"model{step}.bin")
        saved.append(f"at{step}")
        if rank == 0 and len(saved) > 2:
            shutil.rmtree(folder / saved[-3])
        if rank == 0:
            whole = [p.parent.name for p in folder.glob("at*/manifest.json")]
            print("CHECKPOINTS", first, step, sorted(whole), flush=True)
    if step == options["back_at"]:
        engine.load_checkpoint(folder, tag=f"at{step - 2}")
        assert engine.global_steps == step - 2
    deepspeed.comm.barrier()
    if step == options["kill_at"] and first and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
sums = {name: value.double().sum().item() for name, value in engine.state_dict().items()}
older = torch.load(folder / "model2.bin")["0.weight"].double().sum().item()
engine.load_checkpoint(folder, tag="at8")
assert engine.global_steps == (6 if options["back_at"] else 8)
if rank == 0:
    print("RESULT", json.dumps({"sums": sums, "older": older, "norms": norms}))
