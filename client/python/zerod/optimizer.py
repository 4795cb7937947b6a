# SPDX-License-Identifier: Apache-2.0
"""The optimizer as the training script sees it: its groups. The state and the update are the
daemon's."""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from zerod import _zerod
from zerod.errors import ModelError
from zerod.loss_scaler import LossScaler
from zerod.parameter_offload import ParameterOffload

if TYPE_CHECKING:
    from zerod.engine import Engine

STATE_KINDS = ("exp_avg", "exp_avg_sq", "third")  # what Client.read() calls them

# Flat tensors of DeepSpeed's optimizers that scripts reach into, as far as there is another way.
_DEEPSPEEDS_OWN = {
    "single_partition_of_fp32_groups": "fp32_param",
    "fp32_partitioned_groups_flat": "fp32_param",
    "fp32_groups_flat_partition": "fp32_param",
    "averaged_gradients": "grad",
    "fp32_groups_gradients_flat": "grad",
}


class Optimizer(torch.optim.Optimizer):
    """An optimizer over parameters that live in the daemon.

    `param_groups` are read at every step, so schedulers work on them as on any optimizer's. There
    is no state here, and `step()` is the engine's. `loss_scale` is what the next step's loss is
    multiplied by (1 but in fp16), `overflow` whether the last step was skipped for gradients that
    were not finite.
    """

    discard_gradients: Callable[[bool], None] | None = None  # the engine's
    loss_scale: float = 1.0
    overflow: bool = False
    parameter_offload: ParameterOffload  # at stage 3 only, as in DeepSpeed
    _given: torch.optim.Optimizer | None = None  # see adopt()
    _engine: "weakref.ref[Engine] | None" = None  # see serve()
    KIND: ClassVar[str]  # as Client.attach takes it
    KEYS: ClassVar[tuple[str, ...]]  # numbers that a group and _zerod.Group have alike
    # What torch calls the tensors of state that the daemon keeps, in the order of STATE_KINDS.
    STATE: ClassVar[tuple[str, ...]] = ()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one whose place this one has taken. AttributeError where there was none: scripts
        look for the innermost as long as there is this attribute."""
        if self._given is None:
            raise AttributeError  # what it says is __getattr__'s
        return self._given

    @property
    def fp16_groups(self) -> list[list[torch.nn.Parameter]]:
        """The parameters of each group."""
        return [list(group["params"]) for group in self.param_groups]

    @property
    def _global_grad_norm(self) -> float | None:
        return self._the_engine().get_global_grad_norm()

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """The engine's backward(), but `loss` is divided by the accumulation steps already."""
        self._the_engine().backward(loss, retain_graph, scale_wrt_gas=False)

    def serve(self, engine: "Engine") -> None:
        """Before training: it is this engine's optimizer."""
        self._engine = weakref.ref(engine)

    def _the_engine(self) -> "Engine":
        engine = self._engine() if self._engine is not None else None
        if engine is None:
            raise RuntimeError("the optimizer's engine is not there: call zerod.initialize()")
        return engine

    @property
    def cur_scale(self) -> float:
        """DeepSpeed's other name of `loss_scale`."""
        return self.loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether `loss_scale` moves by itself: fp16 without a scale in the configuration."""
        return self._the_engine().dynamic_loss_scale()

    def needs_scaler(self) -> bool:
        """Whether a loss must go through engine.scale() where its own backward() is called."""
        return self._the_engine().fp16_enabled()

    @property
    def loss_scaler(self) -> LossScaler:
        """The loss scale, to look at."""
        return LossScaler(self._the_engine())

    @property
    def loss_scale_config(self) -> LossScaler:
        """DeepSpeed's name of `loss_scaler` at stage 0."""
        return self.loss_scaler

    def __getattr__(self, name: str) -> Any:
        if name in _DEEPSPEEDS_OWN:
            what = _DEEPSPEEDS_OWN[name]
            raise AttributeError(
                f"{name} is DeepSpeed's own: weights and gradients are the daemon's here, by "
                f"parameter; safe_get_full_{what}(p) and safe_get_local_{what}(p) read them, "
                "safe_set_ writes them"
            )
        if name == "optimizer":
            raise AttributeError(f"this {type(self).__name__} has taken no other optimizer's place")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def mark_stepped(self) -> None:
        """torch's schedulers warn where they are stepped before their optimizer; theirs may be the
        one whose place this one has taken."""
        for optimizer in (self, self._given):
            if optimizer is not None:
                optimizer._opt_called = True

    def kind(self, group: dict[str, Any]) -> str:
        """What the daemon updates the group by, for the life of the job."""
        return self.KIND

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's hyper-parameters of this moment, as _zerod.Group takes them."""
        values = {key: group[key] for key in self.KEYS}
        if "betas" in self.defaults:
            values["beta1"], values["beta2"] = group["betas"]
        return values

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Of the tensors that are kept for a parameter of the group."""
        return self.STATE

    def states(self, group: dict[str, Any]) -> dict[str, str]:
        """The same names, each with what Client.read() and put() call its tensor."""
        return dict(zip(self.state_names(group), STATE_KINDS))

    def kinds(self) -> list[str]:
        return [self.kind(group) for group in self.param_groups]

    def groups(self) -> list[_zerod.Group]:
        """The groups' values of this moment, for STEP. ValueError for what no step can take."""
        result = []
        for i, group in enumerate(self.param_groups):
            values = {
                key: value if isinstance(value, bool) else float(value)
                for key, value in self.values(group).items()
            }
            betas = [values[key] for key in ("beta1", "beta2") if key in values]
            usable = all(0 <= beta < 1 for beta in betas) and values.get("eps", 0.0) >= 0
            if not usable or not all(math.isfinite(value) for value in values.values()):
                told = ", ".join(f"{key} {value}" for key, value in values.items())
                raise ValueError(
                    f"parameter group {i}: {told}: betas must lie in [0, 1), eps must not be "
                    "negative, all must be finite"
                )
            result.append(_zerod.Group(**values))
        return result

    def applied(self) -> None:
        """A step was applied: the groups still have its values, and no schedule has moved yet."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # Without its wrapper, which loads torch's compiler: seconds of every start.
        unwrapped = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
        (unwrapped or torch.optim.Optimizer.add_param_group)(self, param_group)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("the daemon takes the optimizer's steps: call engine.step()")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of what waits in `.grad` (engine.zero_grad); nothing where gradients of the step have
        been handed over: engine.step() uses them up."""
        if self.discard_gradients is not None:
            self.discard_gradients(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("state"):
            raise ValueError("the optimizer's state is the daemon's and cannot be loaded from here")
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"{len(saved)} parameter groups for {len(self.param_groups)}")
        for group, values in zip(self.param_groups, saved):
            group.update({key: value for key, value in values.items() if key != "params"})


class Adam(Optimizer):
    """torch.optim.Adam, whose weight decay is L2 regularization unless `decoupled`."""

    KIND = "adam"
    KEYS = ("lr", "eps", "weight_decay")
    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        decoupled: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled,
        }
        super().__init__(params, defaults)

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            **super().values(group),
            "decoupled": bool(group["decoupled_weight_decay"]),
            "bias_correction": bool(group.get("bias_correction", True)),
        }


class AdamW(Adam):
    """torch.optim.AdamW: the weight decay is apart from the gradient."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, decoupled=True)


class Lion(Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms"."""

    KIND = "lion"
    KEYS = ("lr", "weight_decay")
    STATE = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})


class Adagrad(Optimizer):
    """torch.optim.Adagrad."""

    KIND = "adagrad"
    KEYS = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
    STATE = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults)


class SGD(Optimizer):
    """torch.optim.SGD. Whether there is a momentum is fixed when initialize() is called: without
    one there is no memory for it."""

    KEYS = ("lr", "momentum", "dampening", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum, and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def kind(self, group: dict[str, Any]) -> str:
        return "sgd_momentum" if group["momentum"] != 0 else "sgd"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().values(group), "nesterov": bool(group["nesterov"])}


class Lamb(Optimizer):
    """You et al., "Large Batch Optimization for Deep Learning", with what DeepSpeed's FusedLamb has
    beside it: the ratio of a tensor's norm to its update's lies within [min_coeff, max_coeff].

    Norms are of whole parameters, at every stage and on any number of nodes.
    """

    KIND = "lamb"
    STATE = ("exp_avg", "exp_avg_sq")
    KEYS = ("lr", "eps", "weight_decay", "min_coeff", "max_coeff")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(f"min_coeff {min_coeff} and max_coeff {max_coeff} bound no ratio")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        flags = {key: bool(group[key]) for key in ("bias_correction", "eps_inside_sqrt")}
        return {**super().values(group), **flags}


class Muon(Optimizer):
    """Jordan et al., https://kellerjordan.github.io/posts/muon/, with Nesterov's momentum, and for
    what is no hidden matrix AdamW: DeepSpeed's MuonWithAuxAdam.

    A group's "use_muon", else a parameter's attribute `use_muon`, says what is updated by which;
    each group is split in two where its parameters differ. A rate of its own for one of the two is
    `muon_lr` or `adam_lr`. Matrices, and filters of 4 dimensions as matrices of as many rows as
    they have filters, may be updated by Muon; the orthogonal update is multiplied by
    sqrt(max(1, rows / columns)).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        ns_method: str = "gram",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        rates = {
            True: next(rate for rate in (muon_lr, lr, 0.02) if rate is not None),
            False: next(rate for rate in (adam_lr, lr, 3e-4) if rate is not None),
        }
        defaults = {
            "use_muon": False,
            "lr": rates[False],
            "momentum": momentum,
            "ns_method": ns_method,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(_halves(list(params), rates), defaults)
        for group in self.param_groups:
            if group["ns_method"] not in ("gram", "standard"):
                raise ValueError(f'ns_method {group["ns_method"]!r} is not "gram" or "standard"')

    def kind(self, group: dict[str, Any]) -> str:
        return "muon" if group["use_muon"] else "adam"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def values(self, group: dict[str, Any]) -> dict[str, Any]:
        values = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if not group["use_muon"]:
            beta1, beta2 = group["betas"]
            return {**values, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        standard = group["ns_method"] == "standard"
        return {
            **values,
            "momentum": group["momentum"],
            "nesterov": True,
            "standard_newton_schulz": standard,
        }


def _halves(params: list[Any], rates: dict[bool, float]) -> list[dict[str, Any]]:
    """Each group's part for Muon, then its part for Adam, with their rates."""
    groups = [item for item in params if isinstance(item, dict)]
    loose = [item for item in params if not isinstance(item, dict)]
    if loose:
        groups.append({"params": loose})
    result = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        members = [p for p in members if p.requires_grad]
        for use_muon, rate in rates.items():
            half = []
            for p in members:
                flag = group.get("use_muon", getattr(p, "use_muon", None))
                if flag is None:
                    raise ModelError(
                        f"Muon does not know what a parameter of shape {tuple(p.shape)} is: set "
                        '"use_muon" of its group, or its attribute use_muon, to True for hidden '
                        "matrices and to False for embeddings, the head, norms and biases"
                    )
                if bool(flag) == use_muon:
                    half.append(p)
            if half:
                result.append({"lr": rate, **group, "params": half, "use_muon": use_muon})
    return result
