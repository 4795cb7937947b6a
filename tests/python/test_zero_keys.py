# SPDX-License-Identifier: Apache-2.0
"""Keys of "zero_optimization" that the package itself gives their meaning, over the double of the
extension, and one that shows on real daemons only."""

import pytest
import torch
from torch import nn

import cluster
import zoo
from test_package import gradient_events, same, start


def test_without_overlap_units_are_handed_over_after_the_pass(fake):
    def run(overlap):
        torch.manual_seed(2)
        engine = start(
            zoo.Stack(layers=2), fake, gradient_accumulation_steps=2,
            zero_optimization={"overlap_comm": overlap},
        )
        for _ in range(3):
            events = gradient_events(engine, [zoo.batch(0, 0), zoo.batch(0, 1)])
        state = engine.state_dict()
        engine.destroy()
        marks = [i for i, event in enumerate(events) if event[0] == "scatter" and event[2]]
        last_land = max(i for i, event in enumerate(events) if event[0] == "land")
        return sum(i < last_land for i in marks), len(marks), state

    early, marks, expected = run(None)
    assert early == marks - 1 > 0
    assert run(True)[0] == early
    early, same_marks, state = run(False)
    assert early == 0 and same_marks == marks
    assert same(state, expected)


def test_compute_grad_norm(fake):
    for wanted in (True, False):
        engine = start(zoo.Stack(), fake, zero_optimization={"compute_grad_norm": wanted})
        engine.backward(engine(zoo.batch(0, 0)).square().mean())
        engine.step()
        assert (engine.get_global_grad_norm() is not None) == wanted
        engine.destroy()


def test_a_changed_trace_is_a_warning(fake, caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(zoo.Block() for _ in range(3))

        def forward(self, x, order):
            for i in order:
                x = self.layers[i](x)
            return x

    def run(orders, **zero):
        caplog.clear()
        engine = start(Model(), fake, zero_optimization=zero)
        for order in orders:
            engine.backward(engine(zoo.batch(0, 0), order).square().mean())
            engine.step()
        engine.destroy()
        return [r.getMessage() for r in caplog.records if "gather" in r.getMessage()]

    orders = [(0, 1, 2), (0, 1, 2), (1, 0, 2), (1, 0, 2), (1, 0)]
    warnings = run(orders, log_trace_cache_warnings=True)
    assert len(warnings) == 2
    assert "gather 1 of the step was of unit 'layers.1', in the step before of 'layers.0'" in (
        warnings[0]
    )
    assert run(orders) == []


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(zoo.WIDTH, 2)
        self.experts = nn.ModuleList(zoo.Block() for _ in range(2))

    def forward(self, x):
        return self.experts[0](x) + self.experts[1](x) * self.router(x)[:, :1]


def units_with(fake, model, **zero):
    engine = start(model, fake, zero_optimization=zero)
    names = [unit.name for unit in engine.client.units]
    engine.destroy()
    return names


def test_leaf_modules_of_the_configuration(fake, caplog):
    def leaf(**keys):
        return {"leaf_module": {"classes": [], "names": [], "name_suffixes": []} | keys}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Experts(), Experts()

    apart = [f"{part}.{module}" for part in "ab" for module in ("router", "experts.0", "experts.1")]
    assert units_with(fake, Whole()) == apart
    for name in ("Experts", f"{Experts.__module__}.Experts"):
        assert units_with(fake, Whole(), **leaf(classes=[name])) == ["a", "b"]
    assert units_with(fake, Whole(), **leaf(names=["a"])) == ["a", *apart[3:]]
    assert units_with(fake, Whole(), **leaf(name_suffixes=["b"])) == [*apart[:3], "b"]
    assert not caplog.records
    assert units_with(fake, Whole(), **leaf(
        classes=["Router"], names=["c"], name_suffixes=["xyz"])) == apart
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "no module is a 'Router'" in text
    assert "leaf_module.names: no module fits ['c']" in text
    assert "leaf_module.name_suffixes: no module fits ['xyz']" in text
    caplog.clear()
    default = ["transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock"]
    assert units_with(fake, Whole(), **leaf(classes=default)) == apart
    assert not caplog.records


def test_module_granularity(fake, caplog):
    def elements(module):
        return sum(p.numel() for p in module.parameters())

    block, experts = zoo.Block(), Experts()
    of_block = elements(block) // 4  # itself and three with parameters
    of_experts = elements(experts) // 10  # two blocks, the router and itself
    assert of_experts < of_block
    key = "stage3_module_granularity_threshold"
    model = nn.Sequential(Experts(), zoo.Block())
    assert units_with(fake, model, **{key: of_experts - 1})[0] == "0.router"
    assert f"the finest is a Experts with {of_experts}" in caplog.records[-1].getMessage()
    model = nn.Sequential(Experts(), nn.Linear(zoo.WIDTH, 3))
    assert units_with(fake, model, **{key: of_experts}) == ["0", "1"]


def test_leaf_module_functions():
    import zerod

    model = nn.Sequential(Experts(), zoo.Block(), zoo.Block())
    assert not zerod.z3_leaf_module(model) and zerod.get_z3_leaf_modules(model) == []
    assert zerod.set_z3_leaf_modules(model, [Experts, "Linear"])[0] is model[0]
    assert zerod.z3_leaf_module(model[0]) and zerod.z3_leaf_module(model[1].inner)
    assert model[1] not in zerod.get_z3_leaf_modules(model)
    zerod.unset_z3_leaf_modules(model, [nn.Linear])
    assert zerod.get_z3_leaf_modules(model) == [model[0]]
    assert zerod.set_z3_leaf_modules_by_name(model, ["1"]) == ([model[1]], [])
    found, missing = zerod.set_z3_leaf_modules_by_suffix(
        model, ["inner", "nowhere"], raise_if_not_found=False
    )
    assert model[2].inner in found and missing == ["nowhere"]
    zerod.set_z3_leaf_module(model[2], True)
    assert model[2] in zerod.get_z3_leaf_modules(model)
    for refused in (
        lambda: zerod.set_z3_leaf_modules(model, [nn.Conv2d]),
        lambda: zerod.unset_z3_leaf_modules(model, ["Conv2d"]),
        lambda: zerod.set_z3_leaf_modules_by_name(model, ["9"]),
        lambda: zerod.set_z3_leaf_modules_by_suffix(model, ["9"]),
    ):
        with pytest.raises(ValueError):
            refused()
    assert zerod.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unused_parameters_are_an_error_where_asked(stage):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "ignore_unused_parameters": False},
        "zerod": {"job": "unused"},
    }
    with cluster.daemons(2) as nodes:
        results = cluster.run("workers:unused_parameters", nodes, 2, job="unused", config=config)
        expected = cluster.run("workers:unused_parameters", nodes, 2, job="unused", config=config,
                               leave_out=True)
    for errors, step, weights in results:
        refused = stage in (1, 2)
        assert len(errors) == refused
        assert step == (2 if refused else 3)  # the refused step's number is not used up
        if refused:
            assert "no rank has a gradient in this step for never.weight, never.bias: " in errors[0]
        assert same(weights, results[0][2])
        # Of a step that is refused nothing is left.
        assert same(weights, expected[0][2]) == refused
