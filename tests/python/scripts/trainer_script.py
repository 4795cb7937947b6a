# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny GPT-2 by the Trainer of Transformers; knows nothing of zerod. argv: OPTIONS, JSON:
stage, output, resume (from its checkpoint-4), lora."""

import json
import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

options = {"stage": 2, "resume": False, "lora": False} | json.loads(sys.argv[1])


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 400, (32,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def auto(*keys):
    return {key: "auto" for key in keys}


config = {
    "optimizer": {"type": "AdamW", "params": auto("lr", "betas", "eps", "weight_decay")},
    "scheduler": {"type": "WarmupLR",
                  "params": auto("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")},
    "zero_optimization": {
        "stage": options["stage"],
        "stage3_gather_16bit_weights_on_model_save": True,
        **auto("reduce_bucket_size", "stage3_prefetch_bucket_size",
               "stage3_param_persistence_threshold"),
    },
    "steps_per_print": 2000,
    **auto("gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
           "train_micro_batch_size_per_gpu"),
}
arguments = TrainingArguments(
    output_dir=options["output"], deepspeed=config, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, max_steps=8, save_steps=4, logging_steps=1, learning_rate=1e-3,
    warmup_steps=2, seed=3, report_to=[], disable_tqdm=True,
)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=64, n_layer=2, n_head=2))
if options["lora"]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
checkpoint = f"{options['output']}/checkpoint-4" if options["resume"] else None
trainer.train(resume_from_checkpoint=checkpoint)
trainer.save_model(f"{options['output']}/final")


def adapters():
    """What is trained, as the ranks compute with it; and what of the rest has changed."""
    import deepspeed

    trained, changed = {}, []
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model_wrapped) \
            .named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if parameter.requires_grad:
                trained[name] = parameter.detach().clone()
            elif not torch.equal(parameter.detach(), before[name]):
                changed.append(name)
    return trained, changed


more = {}
if options["lora"]:
    engine = trainer.model_wrapped
    trained, more["changed"] = adapters()
    more["moved"] = [name for name, value in trained.items()
                     if not torch.equal(value, before[name])]
    engine.save_16bit_model(options["output"], "trained.bin", exclude_frozen_parameters=True)
    whole = trainer.accelerator.get_state_dict(engine)
    if arguments.process_index == 0:
        torch.save(trained, f"{options['output']}/expected.bin")
        torch.save({name: whole[name] for name in trained}, f"{options['output']}/whole.bin")
        more["whole"] = sorted(whole) == sorted(engine.module.state_dict())
if arguments.process_index == 0:
    print("RESULT", json.dumps({
        "losses": {h["step"]: h["loss"] for h in trainer.state.log_history if "loss" in h},
        "rates": {h["step"]: h["learning_rate"] for h in trainer.state.log_history
                  if "learning_rate" in h},
        **more,
    }))
