# SPDX-License-Identifier: Apache-2.0
"""The schedules."""

from zerod.as_deepspeed import face

LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR = "LRRangeTest", "OneCycle", "WarmupLR"
WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupDecayLR", "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

_EXPORTS = {
    "WarmupLR": "zerod.schedule:WarmupLR",
    "WarmupDecayLR": "zerod.schedule:WarmupDecayLR",
    "WarmupCosineLR": "zerod.schedule:WarmupCosineLR",
    "OneCycle": "zerod.schedule:OneCycle",
    "LRRangeTest": "zerod.schedule:LRRangeTest",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
