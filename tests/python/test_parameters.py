# SPDX-License-Identifier: Apache-2.0
"""What scripts do with the parameters of an engine outside of the training loop."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import cluster
import zoo

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}


def start(model, stage, **config):
    import zerod

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = copy.deepcopy(CONFIG) | {"zero_optimization": zero} | config
    engine, *_ = zerod.initialize(model=model, config=settings)
    return engine


def run(function, world=2, **arguments):
    with cluster.daemons(1) as nodes:
        return cluster.run("parameter_workers:" + function, nodes, world, **arguments)


# --- What is read of them.


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeeds_attributes_mean_stage_3(stage):
    """FastChat asserts that what has a ds_id is partitioned."""
    import zerod

    engine = start(zoo.Stack(), stage)
    parameters = list(engine.module.parameters())
    for name in ("ds_id", "ds_shape", "ds_numel", "ds_persist", "ds_status",
                 "ds_active_sub_modules"):
        assert [hasattr(p, name) for p in parameters] == [stage == 3] * len(parameters), name
    if stage == 3:
        assert all(p.ds_status == zerod.ZeroParamStatus.NOT_AVAILABLE for p in parameters)
    # Collective writes go in the order of the model, whatever the caller's.
    reads = []
    read = engine.weights.read
    engine.weights.read = lambda managed, **options: (
        reads.append(managed.index) or read(managed, **options))
    with zerod.GatheredParameters(reversed(parameters), modifier_rank=0):
        parameters[0].data.fill_(0.5)
    assert reads == sorted(reads) and len(set(reads)) == len(parameters)
    with zerod.GatheredParameters(parameters):
        assert parameters[0].eq(0.5).all()
    engine.destroy()
    assert not hasattr(parameters[0], "ds_id")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("stage, precision", [(0, {}), (3, {}), (3, {"bf16": {"enabled": True}})])
def test_frozen_parameters_that_are_excluded_are_not_read(stage, precision, tmp_path):
    """An adapter of a large model is saved in the memory of an adapter."""
    import zerod

    model = zoo.Stack()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    engine = start(model, stage, **precision)
    x = zoo.batch(0, 0).to(torch.bfloat16 if precision else torch.float32)
    engine.backward(engine(x).float().square().mean())
    engine.step()
    read, reads = engine.weights.read, []
    engine.weights.read = lambda managed, **options: (
        reads.append(managed.name) or read(managed, **options))
    expected = {name: value for name, value in engine.state_dict().items()
                if name.startswith("head.")}
    assert len(reads) > len(expected) > 0
    with zerod.GatheredParameters(list(model.head.parameters())):
        assert all(torch.equal(parameter, expected[f"head.{name}"])
                   for name, parameter in model.head.named_parameters())
    for way in (
        lambda: engine.module_state_dict(exclude_frozen_parameters=True),
        lambda: engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True),
        lambda: (engine.save_16bit_model(tmp_path, exclude_frozen_parameters=True)
                 and torch.load(tmp_path / "pytorch_model.bin")),
    ):
        reads.clear()
        state = way()
        assert sorted(reads) == sorted(state) == sorted(expected)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert len(engine.state_dict()) > len(expected)  # the next one is whole again
    engine.destroy()
    assert engine.module_state_dict(exclude_frozen_parameters=True).keys() == expected.keys()


# --- After the engine.


def train(engine, steps):
    for step in range(steps):
        engine.backward(engine(zoo.batch(0, step)).square().mean())
        engine.step()


def on_no_module(model):
    """Nothing of an engine is on the module."""
    from zerod.hooks import WatchedParameters

    for module in model.modules():
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not isinstance(module._parameters, WatchedParameters)
        assert "__reduce_ex__" not in module.__dict__
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
        assert "__deepcopy__" not in parameter.__dict__
        assert not hasattr(parameter, "ds_status")
    return True


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_module_outlives_its_engine(stage, precision):
    model = zoo.Stack()
    if precision:
        model.bfloat16()
    x = zoo.batch(0, 9).to(next(model.parameters()).dtype)
    engine = start(model, stage, **precision)
    for step in range(2):
        engine.backward(engine(x * (step + 1)).square().mean())
        engine.step()
    expected, output = engine.state_dict(), engine(x).detach()
    engine.destroy()
    assert on_no_module(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(model(x), output) and torch.equal(engine(x), output)
    # It is trained by torch, ...
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    model.load_state_dict(expected)
    # ... and by another engine.
    again = start(model, stage, zerod={"job": "again"}, **precision)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    again.backward(again(x).square().mean())
    again.step()
    assert not torch.equal(again.state_dict()["head.weight"], expected["head.weight"])
    again.leave()
    assert on_no_module(model)


@pytest.mark.usefixtures("fake")
def test_a_module_whose_weights_cannot_be_read_is_a_warning(fake, caplog):
    engine = start(zoo.Stack(), 3)
    engine.client.read = lambda *_: (_ for _ in ()).throw(fake.ERRORS["Aborted"]("the job ended"))
    names = [name for name, _ in engine.module.named_parameters()]
    engine.destroy()
    text = caplog.records[-1].getMessage()
    assert f"of {names[0]!r} and {len(names) - 1} other parameters" in text
    assert "the job ended" in text and engine.client.closed


def test_free_memory_and_prepare_again():
    """What find_executable_batch_size does, on real daemons: stage 2, then 3, then 3 with a window
    that holds a part of the model."""
    first, second = run("three_engines_of_one_module")
    assert first == second
    for state, begun, trained in first:
        assert state == begun != trained
    assert first[0][2] == first[1][0] and first[1][2] == first[2][0]


# --- Copies.


class Tied(nn.Module):
    """Two names of one parameter, a buffer, and a hook of the script's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(zoo.Block(), zoo.Block())
        self.head = nn.Linear(zoo.WIDTH, zoo.WIDTH)
        self.layers[1].norm.weight = self.layers[0].norm.weight
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.head.register_forward_hook(_double)

    def forward(self, x):
        return self.head(self.layers(x)) * self.scale


def _double(module, args, output):
    return 2 * output


def by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch": by_torch,
}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_copy_is_plain(stage, way):
    """For an average of the weights, or a reference model."""
    engine = start(Tied(), stage)
    x = zoo.batch(0, 0)
    train(engine, 1)
    output = engine(x).detach()
    twin = WAYS[way](engine.module)
    forward_hooks = twin.head.__dict__["_forward_hooks"]
    assert len(forward_hooks) == 1
    forward_hooks.clear()
    assert on_no_module(twin) and not twin.head._forward_hooks_always_called
    assert twin.layers[0].norm.weight is twin.layers[1].norm.weight
    twin.head.register_forward_hook(_double)
    assert torch.equal(twin(x), output)
    # Each goes its own way.
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(twin(x), output) and torch.equal(engine(x), output)
    train(engine, 1)
    assert not torch.equal(engine(x), output)
    part = WAYS[way](engine.module.layers[0])
    expected = engine.state_dict()
    assert all(torch.equal(value, expected[f"layers.0.{name}"])
               for name, value in part.state_dict().items())
    engine.destroy()
