# SPDX-License-Identifier: Apache-2.0
"""Serves a tiny GPT-2 from stage 3 without an optimizer, each rank as long as it likes; then trains
one and generates between steps as TRL does. Knows nothing of zerod. argv: none."""

import json
import os

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

rank = int(os.environ["RANK"])
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 90_000}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def tiny():
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=None, bos_token_id=None)).eval()


def generate(model, length):
    prompt = torch.arange(4)[None] + rank
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False,
        pad_token_id=0,
    )[0].tolist()


def generate_as_trl(engine, length):
    """trl.models.utils.unwrap_model_for_generation, at stage 3."""
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(engine.parameters()):
        parameters = [p for _, p in offload.module.named_parameters()]
        for parameter in parameters + [p for _, p in offload.module.ds_external_parameters()]:
            parameter.ds_active_sub_modules.clear()
        hooks = len(offload.forward_hooks)
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        tokens = generate(engine.module, length)
        offload._register_deepspeed_module(offload.module)
        assert hooks and len(offload.forward_hooks) == hooks
    return tokens


deepspeed.init_distributed(dist_backend="gloo")
length = 5 + 20 * rank  # ranks that end at different times
plain = generate(tiny(), length)
server, *_ = deepspeed.initialize(model=tiny(), config=config)
assert generate(server, length) == plain
assert generate(server, 3) == plain[:7]

optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
engine, *_ = deepspeed.initialize(model=tiny(), config=config | optimizer)
assert generate_as_trl(engine, length) == plain
losses = []
for _ in range(4):
    tokens = torch.arange(16)[None]
    engine.train()
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    engine.eval()
    assert len(generate_as_trl(engine, length)) == 4 + length
    losses.append(loss.item())
assert generate_as_trl(engine, length) != plain
assert generate(server, length) == plain  # the other engine's weights are its own
if rank == 0:
    print("RESULT", json.dumps({"losses": losses}))
