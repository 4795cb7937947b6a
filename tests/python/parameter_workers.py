# SPDX-License-Identifier: Apache-2.0
"""What test_parameters.py runs in the ranks."""

import copy

import torch

import zoo
from workers import rank_and_world, with_smallest_window

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}
SMALL = {"stage3_max_live_parameters": 1, "stage3_prefetch_bucket_size": 0}


def digest(state: dict[str, torch.Tensor]) -> list[float]:
    return [float(value.double().sum()) for value in state.values()]


def three_engines_of_one_module() -> list[tuple]:
    """(module's state, that of the engine made of it, that after training) of each engine."""
    rank, _ = rank_and_world()
    torch.manual_seed(rank)
    model = zoo.Stack()
    results = []
    for stage, live in ((2, {}), (3, {}), (3, SMALL)):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **live}
        before = digest(model.state_dict())
        engine = with_smallest_window(model, copy.deepcopy(CONFIG) | {"zero_optimization": zero})
        begun = digest(engine.state_dict())
        for step in range(2):
            engine.backward(engine(zoo.batch(rank, step)).square().mean())
            engine.step()
        trained = digest(engine.state_dict())
        output = engine(zoo.batch(0, 0)).detach()
        assert torch.equal(copy.deepcopy(model)(zoo.batch(0, 0)), output)
        assert [unit.resident for unit in engine.client.units].count(False) == 4 * bool(live)
        engine.destroy()
        assert torch.equal(model(zoo.batch(0, 0)), output)
        results.append((before if results else begun, begun, trained))
    return results
