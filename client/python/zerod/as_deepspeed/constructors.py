# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's zero.Init replaces torch's tensor constructors by wrapped ones, and Transformers
wraps the wrapper. Here constructors stay what they are, so there is nothing to wrap."""

from collections.abc import Callable
from typing import Any


def zero_wrapper_for_fp_tensor_constructor(
    constructor: Callable[..., Any], *_: Any, **__: Any
) -> Callable[..., Any]:
    return constructor
