# SPDX-License-Identifier: Apache-2.0
"""Gradients that another engine's backward pass leaves behind."""

import pytest
import torch

import cluster
import gan
import zoo


def engines(stage):
    import zerod

    return [
        zerod.initialize(model=model, config=gan.config(stage, job=f"gan-{i}"))[0]
        for i, model in enumerate(gan.models())
    ]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("stage", "clear"), [
    (0, "module"), (2, "module"), (3, "module"), (3, "zero"), (3, "engine"), (3, "optimizer"),
    (3, "never"),
])
def test_models_that_train_each_other(stage, clear):
    def batches(k):
        return zoo.batch(0, k)

    expected = gan.train([gan.of_torch(m) for m in gan.models()], clear, batches)
    made = engines(stage)
    assert gan.train([gan.of_engine(e) for e in made], clear, batches) == pytest.approx(
        expected, rel=1e-5)
    waiting = [p.grad is not None for p in made[1].module.parameters()]
    assert all(waiting) and not any(p.grad is not None for p in made[0].module.parameters())
    for engine in made:
        # Units are released behind a pass that is not their engine's, as behind their own.
        assert stage < 3 or not engine.client._held
        engine.destroy()


@pytest.mark.usefixtures("fake")
def test_gradients_of_two_engines_by_one_backward():
    """An encoder's and a decoder's: those that were left join their engine's step."""
    x = zoo.batch(0, 0)
    first, second = gan.models()
    second(first(x)).sum().backward()
    expected = [p.grad.clone() for model in (first, second) for p in model.parameters()]
    made = engines(3)
    made[1].backward(made[1](made[0](x)).sum())
    parameters = [p for engine in made for p in engine.module.parameters()]
    landed = [False] * len(list(first.parameters())) + [True] * len(list(second.parameters()))
    assert [p.grad is None for p in parameters] == landed
    with pytest.raises(RuntimeError, match="have been handed over"):
        made[1].zero_grad()
    got = []
    for engine in made:
        engine.backward_pass.flush()
        got += [engine.weights.read(p, "gradient") for p in engine.description.parameters]
        engine.step()
    for gradient, value in zip(got, expected):
        torch.testing.assert_close(gradient, value)
    assert all(p.grad is None for p in parameters)


@pytest.mark.usefixtures("fake")
def test_a_pass_that_raised_is_over():
    made = engines(3)
    x = zoo.batch(0, 0)
    loss = made[1](made[0](x)).sum()
    made[0].module[0].layers[0].inner.weight.register_hook(
        lambda gradient: (_ for _ in ()).throw(KeyError("of the script")))
    with pytest.raises(KeyError):
        made[0].backward(loss)
    made[1].zero_grad()
    made[1].backward(made[1](x).sum())
    assert all(p.grad is None for p in made[1].module.parameters())
    made[1].step()


def test_on_real_daemons():
    with cluster.daemons(1) as nodes:
        results = cluster.run("gradient_workers:gans", nodes, 2)
    expected = results[0]["plain"]
    for name in results[0]:
        mean = [(a + b) / 2 for a, b in zip(results[0][name], results[1][name])]
        assert mean == pytest.approx(expected, rel=1e-4), name


@pytest.mark.usefixtures("fake")
def test_backward_passes_that_are_summed_first():
    """step() is not taken for a micro-step inside of what sums them, where it would be lost."""
    engine = engines(1)[1]
    with engine.coalesce_grad_reduction():
        for k in range(2):
            engine.backward(engine(zoo.batch(0, k)).sum())
        with pytest.raises(AssertionError, match="inside coalesce_grad_reduction"):
            engine.step()
        for another in (engine.no_sync, engine.coalesce_grad_reduction):
            with pytest.raises(AssertionError, match="no_sync"), another():
                pass
    assert engine.global_steps == engine.micro_steps == 0
    engine.step()
    assert engine.global_steps == engine.micro_steps == 1


def test_checkpointing_of_activations_under_deepspeeds_name(monkeypatch):
    from zerod.as_deepspeed import checkpointing

    x, scale = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    calls = []

    def forward(value, factor=None, power=1):
        calls.append(power)
        return (value * factor) ** power

    checkpointing.checkpoint(forward, x, power=3, factor=scale).sum().backward()
    assert calls == [3, 3]
    assert x.grad.tolist() == [24.0] * 3 and scale.grad.tolist() == [12.0] * 3
    read = []

    def reader(config):
        if config in read:
            raise ValueError("is not served")
        read.append(config)

    monkeypatch.setattr(checkpointing, "_configured", False)
    monkeypatch.setattr(checkpointing, "DeepSpeedConfig", reader)
    read.append({"a": 1})
    with pytest.raises(ValueError, match="is not served"):
        checkpointing.configure(None, {"a": 1})
    assert not checkpointing.is_configured()
    checkpointing.configure(None, {"b": 1})
    assert checkpointing.is_configured() and {"b": 1} in read
