# SPDX-License-Identifier: Apache-2.0
"""What test_zero_init.py runs in the ranks with transformers, which asks a package named deepspeed
for the births."""

import copy
import importlib.machinery
import importlib.metadata
import sys
import types

import torch

import zerod
from workers import rank_and_world
from zero_init_workers import Peak, arenas



def stand_in() -> None:
    """What transformers needs of a package named deepspeed to load a model at stage 3."""
    import torch.distributed as dist

    def module(name: str, **names) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(names)
        sys.modules[name] = made
        return made

    accelerator = types.SimpleNamespace(current_device_name=lambda: "cpu")
    get_accelerator = lambda: accelerator  # noqa: E731
    partition = module(
        "deepspeed.runtime.zero.partition_parameters",
        zero_wrapper_for_fp_tensor_constructor=None, _orig_torch_arange=torch.arange,
        get_accelerator=get_accelerator,
    )
    zero = module("deepspeed.runtime.zero", partition_parameters=partition)
    runtime = module("deepspeed.runtime", zero=zero)
    accelerators = module("deepspeed.accelerator", get_accelerator=get_accelerator)
    comm = types.SimpleNamespace(get_rank=dist.get_rank, is_initialized=dist.is_initialized)
    module("deepspeed", zero=zerod.zero, comm=comm, runtime=runtime, accelerator=accelerators,
           __version__="0.19.8")
    version, metadata = importlib.metadata.version, importlib.metadata.metadata
    importlib.metadata.version = lambda n: "0.19.8" if n == "deepspeed" else version(n)
    importlib.metadata.metadata = lambda n: {} if n == "deepspeed" else metadata(n)


def from_pretrained(folder: str, store: str, config: dict, kind: str, state: bool = True) -> dict:
    """A model of transformers' at stage 3: loaded, loaded and resized, or made from scratch. What
    loading took of this rank's memory, and where it wanted the files' tensors."""
    import torch.distributed as dist

    stand_in()
    rank, world = rank_and_world()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    import transformers
    from transformers import modeling_utils
    from transformers.integrations.deepspeed import HfDeepSpeedConfig
    from transformers.models.llama import modeling_llama  # noqa: F401  not while memory is measured

    read_to = set()
    load_state_dict = modeling_utils.load_state_dict

    def noted(*args, map_location, **options):
        read_to.add(map_location)
        return load_state_dict(*args, map_location=map_location, **options)

    modeling_utils.load_state_dict = noted
    settings = copy.deepcopy(config) | {"zerod": {"job": kind}}
    alive = HfDeepSpeedConfig(settings)  # must live until the model is there
    torch.manual_seed(rank)
    with Peak() as peak:
        if kind == "scratch":
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(folder)
            )
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    if kind == "resized":
        model.resize_token_embeddings(model.config.vocab_size + 3)
    engine, *_ = zerod.initialize(model=model, config=settings)
    words = torch.arange(12).view(1, -1) + rank
    loss = engine(input_ids=words, labels=words).loss
    engine.backward(loss)
    engine.step()
    result = {
        "loss": float(loss.detach()), "names": names, "peak": peak.more, "read_to": read_to,
        "state": engine.state_dict() if state else {}, "arenas": arenas(),
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    engine.destroy()
    del alive
    dist.destroy_process_group()
    return result
