# SPDX-License-Identifier: Apache-2.0
"""What test_gradients.py runs in the ranks."""

import torch

import gan
import zoo
from workers import rank_and_world, with_smallest_window

SMALL = {"stage3_max_live_parameters": 1, "stage3_prefetch_bucket_size": 0}


def gans() -> dict[str, list[float]]:
    """Losses by case; those of "plain" are of all ranks' batches at once."""
    rank, world = rank_and_world()

    def of_all(k):
        return torch.cat([zoo.batch(r, k) for r in range(world)])

    results = {
        "plain": gan.train([gan.of_torch(model) for model in gan.models()], "module", of_all)
    }
    for name, stage, zero, plan in (("2", 2, {}, "per_rank"), ("3", 3, SMALL, "per_rank"),
                                    ("3-node_sum", 3, SMALL, "node_sum")):
        engines = []
        for i, model in enumerate(gan.models()):
            config = gan.config(stage, job=f"{name}-{i}", gradient_plan=plan)
            config["zero_optimization"] |= zero
            engines.append(with_smallest_window(model, config))
        results[name] = gan.train(
            [gan.of_engine(engine) for engine in engines], "module",
            lambda k: zoo.batch(rank, k),
        )
        for engine in engines:
            engine.destroy()
    return results
