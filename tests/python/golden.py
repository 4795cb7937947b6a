# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed 0.19.8 gave, written down once."""

# By name: type, params, and the rates of the optimizer steps from the first, for groups whose own
# rate is 0.5.
SCHEDULES = {
    "log": (
        "WarmupLR", dict(warmup_max_lr=1, warmup_num_steps=4), [0, 0, 0.5, 0.792481, 1, 1],
    ),
    "linear": (
        "WarmupLR", dict(warmup_max_lr=1, warmup_num_steps=4, warmup_type="linear"),
        [0, 0, 0.25, 0.5, 0.75, 1],
    ),
    "own rate": (
        "WarmupLR", dict(warmup_num_steps=4, warmup_type="linear"),
        [0, 0, 0.125, 0.25, 0.375, 0.5],
    ),
    "decay": (
        "WarmupDecayLR",
        dict(total_num_steps=10, warmup_max_lr=1, warmup_num_steps=4, warmup_type="linear"),
        [0, 0, 0.25, 0.5, 0.75, 1, 0.8333, 0.6667, 0.5, 0.3333, 0.1667, 0],
    ),
    "cosine": (
        "WarmupCosineLR",
        dict(total_num_steps=10, warmup_num_steps=4, warmup_min_ratio=0.1, cos_min_ratio=0,
             warmup_type="linear"),
        [0, 0.05, 0.1625, 0.275, 0.3875, 0.466506, 0.375, 0.25, 0.125, 0.033494, 0, 0],
    ),
    "one cycle": (
        "OneCycle",
        dict(cycle_min_lr=0.1, cycle_max_lr=1, cycle_first_step_size=4, decay_lr_rate=1,
             decay_step_size=2),
        [0.1, 0.325, 0.55, 0.775, 1, 0.775, 0.55, 0.325, 0.1, 0.066667, 0.05, 0.04],
    ),
    "range": (
        "LRRangeTest", dict(lr_range_test_min_lr=0.1, lr_range_test_step_size=2),
        [0.1, 0.15, 0.2, 0.25, 0.3, 0.35],
    ),
    "staircase": (
        "LRRangeTest",
        dict(lr_range_test_min_lr=0.1, lr_range_test_step_size=2, lr_range_test_staircase=True),
        [0.1, 0.1, 0.2, 0.2, 0.3, 0.3],
    ),
}
