# SPDX-License-Identifier: Apache-2.0
"""torch.optim's classes that DeepSpeed has none of its own for, with torch's arguments. Two keep
something from step to step beside tensors, which is made of the parameter's number of steps here:
what follows where their hyper-parameters change is said at NAdam and ASGD."""

from collections.abc import Iterable
from typing import Any, ClassVar

from zerod.optimizer import Optimizer


class RMSprop(Optimizer):
    """torch.optim.RMSprop. Whether there is a momentum, and whether it is centered, is fixed when
    initialize() is called: they say how much memory there is."""

    KEYS = ("lr", "alpha", "eps", "weight_decay", "momentum")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults)

    def kind(self, group: dict[str, Any]) -> str:
        centered = "_centered" if group["centered"] else ""
        return "rmsprop" + centered + ("_momentum" if group["momentum"] > 0 else "")

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return ("square_avg", *momentum, *(("grad_avg",) if group["centered"] else ()))

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().values(group), "centered": bool(group["centered"])}


class Adadelta(Optimizer):
    """torch.optim.Adadelta."""

    KIND = "adadelta"
    KEYS = ("lr", "rho", "eps", "weight_decay")
    STATE = ("square_avg", "acc_delta")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay})


class Adamax(Optimizer):
    """torch.optim.Adamax."""

    KIND = "adamax"
    KEYS = ("lr", "eps", "weight_decay")
    STATE = ("exp_avg", "exp_inf")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)


class RAdam(Optimizer):
    """torch.optim.RAdam."""

    KIND = "radam"
    KEYS: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay")
    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        decoupled = bool(group["decoupled_weight_decay"])
        return {**super().values(group), "decoupled": decoupled}


class NAdam(Optimizer):
    """torch.optim.NAdam. The product of its momenta is that of this step's betas and
    momentum_decay over all steps of the parameter: where they change, torch's still has the old
    ones among its factors. It vanishes within some tens / (1 - beta1) steps."""

    KIND = "nadam"
    KEYS = ("lr", "eps", "weight_decay", "momentum_decay")
    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        decoupled = bool(group["decoupled_weight_decay"])
        return {**super().values(group), "decoupled": decoupled}


class ASGD(Optimizer):
    """torch.optim.ASGD. A step's rate is made of the rate that the group had in the applied step
    before, as torch's is; it is kept in the group, and with the job's state. lambd, alpha and t0
    are this step's, where torch's are the step's before. A parameter that got no gradient in that
    step has the group's rate all the same, where torch keeps its own."""

    KIND = "asgd"
    KEYS = ("lr", "lambd", "alpha", "t0", "weight_decay")
    STATE = ("ax",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().values(group), "lr_before": group.get("lr_before", group["lr"])}

    def applied(self) -> None:
        for group in self.param_groups:
            group["lr_before"] = float(group["lr"])


class Rprop(Optimizer):
    """torch.optim.Rprop. The rate is what every element's step begins with in its parameter's first
    step, and has no meaning after it."""

    KIND = "rprop"
    KEYS = ("lr",)
    STATE = ("prev", "step_size")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
    ) -> None:
        super().__init__(params, {"lr": lr, "etas": tuple(etas), "step_sizes": tuple(step_sizes)})

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        eta_minus, eta_plus = group["etas"]
        step_min, step_max = group["step_sizes"]
        return {
            **super().values(group),
            "eta_minus": eta_minus,
            "eta_plus": eta_plus,
            "step_min": step_min,
            "step_max": step_max,
        }


# The arguments of each, by its name in the configuration.
OF_TORCH: dict[str, tuple[type[Optimizer], tuple[str, ...]]] = {
    "RMSprop": (RMSprop, ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")),
    "Adadelta": (Adadelta, ("lr", "rho", "eps", "weight_decay")),
    "Adamax": (Adamax, ("lr", "betas", "eps", "weight_decay")),
    "NAdam": (
        NAdam,
        ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
    ),
    "RAdam": (RAdam, ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")),
    "ASGD": (ASGD, ("lr", "lambd", "alpha", "t0", "weight_decay")),
    "Rprop": (Rprop, ("lr", "etas", "step_sizes")),
}


def of_torch(name: str, params: dict[str, Any], parameters: list[Any]) -> Optimizer:
    """One of these classes, as "optimizer" of the configuration describes it."""
    kind, keys = OF_TORCH[name]
    return kind(parameters, **{key: params[key] for key in keys})
