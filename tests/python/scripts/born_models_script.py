# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that read born parameters outside of GatheredParameters. argv: a folder,
a port."""

import json
import os
import sys

import deepspeed
import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
deepspeed.init_distributed(dist_backend="gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}
kinds = {
    # The bias of its tied head is padded to the head's size.
    transformers.BertForMaskedLM: transformers.BertConfig(**sizes),
    # A parametrized weight is looked up to be initialized, although it was loaded.
    transformers.Wav2Vec2Model: transformers.Wav2Vec2Config(
        **sizes, conv_dim=(8,), conv_kernel=(5,), conv_stride=(4,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
}
equal = {}
for kind, sizes in kinds.items():
    torch.manual_seed(1)
    plain = kind(sizes)
    plain.save_pretrained(sys.argv[1])
    alive = HfDeepSpeedConfig(config)
    born = kind.from_pretrained(sys.argv[1])
    del alive
    assert all(hasattr(p, "ds_id") for p in born.parameters())
    engine, *_ = deepspeed.initialize(model=born, config=config)
    state = engine.state_dict()
    equal[kind.__name__] = all(
        torch.equal(value, state[f"module.{name}"]) for name, value in plain.state_dict().items())
    engine.destroy()
print("RESULT", json.dumps(equal))
