# SPDX-License-Identifier: Apache-2.0
"""The configuration."""

from zerod.as_deepspeed import face

# `optimizer.type`, in small letters.
ADAM_OPTIMIZER, ADAMW_OPTIMIZER, ADAGRAD_OPTIMIZER = "adam", "adamw", "adagrad"
LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER = "lamb", "lion", "muon"

_EXPORTS = {
    "DeepSpeedConfig": "zerod.as_deepspeed.entry:DeepSpeedConfig",
    "DeepSpeedConfigError": "builtins:ValueError",
}
__getattr__, __dir__ = face.names(__name__, _EXPORTS)
