# SPDX-License-Identifier: Apache-2.0
"""What scripts do with the parameters of an engine outside of the training loop."""

import copy

import pytest
import torch

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
    engine.weights.read = lambda managed, read=engine.weights.read: (
        reads.append(managed.index) or read(managed))
    with zerod.GatheredParameters(reversed(parameters), modifier_rank=0):
        parameters[0].data.fill_(0.5)
    assert reads == sorted(reads) and len(set(reads)) == len(parameters)
    with zerod.GatheredParameters(parameters):
        assert parameters[0].eq(0.5).all()
    engine.destroy()
    assert not hasattr(parameters[0], "ds_id")
