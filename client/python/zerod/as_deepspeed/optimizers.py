# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's optimizers by its names and arguments. All are computed by the daemon."""

from collections.abc import Iterable
from typing import Any

from zerod import optimizer as optimizers

_VALUES = "only the value that DeepSpeed has by default is served"


def _refuse(name: str, **flags: bool) -> None:
    for flag, set_otherwise in flags.items():
        if set_otherwise:
            raise NotImplementedError(f"{name}: {flag}: {_VALUES}")


class DeepSpeedCPUAdam(optimizers.Adam):
    """Adam, or with `adamw_mode` AdamW. `fp32_optimizer_states` must be true: moments are fp32."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _refuse(type(self).__name__, amsgrad=amsgrad,
                fp32_optimizer_states=not fp32_optimizer_states)
        super().__init__(
            model_params, lr, betas, eps, weight_decay, bias_correction, decoupled=adamw_mode
        )


class FusedAdam(optimizers.Adam):
    """Adam, or with `adam_w_mode` AdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        _refuse(type(self).__name__, amsgrad=amsgrad)
        super().__init__(
            params, lr, betas, eps, weight_decay, bias_correction, decoupled=adam_w_mode
        )


class DeepSpeedCPULion(optimizers.Lion):
    """Lion."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = True,
    ) -> None:
        # Accelerate passes adamw_mode to every optimizer; Lion's weight decay is always apart.
        _refuse(type(self).__name__, fp32_optimizer_states=not fp32_optimizer_states)
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLion(optimizers.Lion):
    """Lion."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)


class DeepSpeedCPUAdagrad(optimizers.Adagrad):
    """Adagrad."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,  # Accelerate passes it to every optimizer
    ) -> None:
        _refuse(type(self).__name__, amsgrad=amsgrad, adamw_mode=adamw_mode,
                fp32_optimizer_states=not fp32_optimizer_states)
        super().__init__(model_params, lr, eps=eps, weight_decay=weight_decay)


class FusedLamb(optimizers.Lamb):
    """LAMB."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        # The gradients' norm is clipped by gradient_clipping.
        _refuse(type(self).__name__, amsgrad=amsgrad, max_grad_norm=max_grad_norm != 0)
        super().__init__(
            params, lr, bias_correction, betas, eps, eps_inside_sqrt, weight_decay, max_coeff,
            min_coeff,
        )
