# SPDX-License-Identifier: Apache-2.0
"""Stages."""

from enum import IntEnum


class ZeroStageEnum(IntEnum):
    """What is partitioned, each with all before it."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3
