# SPDX-License-Identifier: Apache-2.0
"""Prints what Accelerate makes of its configuration."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState

accelerator = Accelerator()
accelerator.print(f"{AcceleratorState()}")
