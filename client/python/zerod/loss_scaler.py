# SPDX-License-Identifier: Apache-2.0
"""`optimizer.loss_scaler` for scripts that log it. The daemon moves the scale."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerod.engine import Engine


class LossScaler:
    """What there is to read of the loss scale, with DeepSpeed's names; nothing can be set here."""

    scale_factor = 2.0

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    @property
    def cur_scale(self) -> float:
        """What the next step's loss is multiplied by: 1 but in fp16."""
        return float(self._engine.client.loss_scale)

    loss_scale = cur_scale

    @property
    def dynamic(self) -> bool:
        return self._engine.dynamic_loss_scale()

    dynamic_loss_scale = dynamic

    @property
    def cur_iter(self) -> int:
        """Steps made, with those that were skipped."""
        return self._engine.global_steps

    @property
    def scale_window(self) -> int:
        return int(self._engine.config["fp16"]["loss_scale_window"])

    @property
    def min_scale(self) -> float:
        return float(self._engine.config["fp16"]["min_loss_scale"])

    min_loss_scale = min_scale
