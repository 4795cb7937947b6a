# SPDX-License-Identifier: Apache-2.0
"""What the Python hooks around a unit cost in a forward pass, everything resident: the same model
through an engine and plain, in turns, per unit.

    PYTHONPATH=client/python .venv/bin/python bench/gather/hook.py

Compare with GatherRelease/resident of bench_gather, which is the part of libzerod_client.
"""

import copy
import json
import statistics
import time

import torch

import zerod

UNITS = 64
ROUNDS = 200


def seconds(call, x) -> float:
    began = time.perf_counter()
    call(x)
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(UNITS)))
    plain = copy.deepcopy(model)
    engine, *_ = zerod.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    })
    x = torch.randn(1, 8)
    ours, theirs = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            ours.append(seconds(engine, x))
            theirs.append(seconds(plain, x))
    before = engine.client.counters()
    result = {
        "bench": "gather hook", "units": UNITS,
        "plain_us_per_unit": statistics.median(theirs) / UNITS * 1e6,
        "hooked_us_per_unit": statistics.median(ours) / UNITS * 1e6,
        "gathers": before.gathers, "waits": before.gather_waits,
    }
    result["hook_us_per_unit"] = result["hooked_us_per_unit"] - result["plain_us_per_unit"]
    engine.destroy()
    print(json.dumps(result))


main()
