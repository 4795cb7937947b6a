# SPDX-License-Identifier: Apache-2.0
"""The native half of the client: libzerod_client for Python, without PyTorch linked in.

Calls that wait release the GIL, let Ctrl-C through as KeyboardInterrupt, and end with the answer,
the job's failure or the daemon's death; nothing waits for ever. After a fork the child's Client
raises FailedPrecondition for everything and its destructor does nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

__version__: str

# --- Errors ----------------------------------------------------------------------------------
# `code` is the canonical name ("INVALID_ARGUMENT"); str() is the daemon's sentence. Codes without
# a class of their own are raised as ZerodError.

class ZerodError(RuntimeError):
    code: str

class InvalidArgument(ZerodError): ...
class AlreadyExists(ZerodError): ...
class FailedPrecondition(ZerodError): ...
class ResourceExhausted(ZerodError): ...
class Unavailable(ZerodError): ...
class Aborted(ZerodError): ...
class DeadlineExceeded(ZerodError): ...
class Internal(ZerodError): ...
class PermissionDenied(ZerodError): ...

# --- Without a job ---------------------------------------------------------------------------

def version() -> str: ...
def trim_heap() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it."""

def parse_config(
    json: str,
    world: int,
    *,
    deepspeed_file: bool = False,
    hidden_sizes: Sequence[int] | None = None,
    values: Mapping[str, str] | None = None,
) -> str:
    """A JSON object: "config" (every key that has a value, no "auto"), "sources" (where each is
    from, by dotted path), "warnings" (lines), "auto" (the keys that were). ValueError lists every
    problem.

    `deepspeed_file`: unknown keys at the top are warnings. `hidden_sizes` of the model, and
    `values` (dotted path -> JSON text), are what "auto" may become; with neither it is refused."""

def embedded_address(job: str, node_rank: int) -> str: ...

class DaemonInfo:
    @property
    def address(self) -> str: ...
    @property
    def peer_address(self) -> str: ...
    @property
    def boot_id(self) -> str: ...

def ensure_daemon(
    *,
    address: str = "",
    embedded: bool = True,
    job: str = "",
    node_rank: int = 0,
    local_rank: int = 0,
    attach_timeout_seconds: float = 60.0,
) -> DaemonInfo:
    """Waits until a daemon answers there; where `address` (and ZEROD_ADDRESS) is empty, local rank
    0 starts the embedded one and the others wait for it."""

# --- A job -----------------------------------------------------------------------------------

class ModuleInfo:
    path: str
    type: str
    is_container: bool
    leaf: bool
    def __init__(
        self, path: str, type: str, is_container: bool = False, leaf: bool = False
    ) -> None: ...

class ParameterInfo:
    name: str
    shape: list[int]
    trainable: bool
    group: int
    modules: list[str]
    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        trainable: bool = True,
        group: int = 0,
        modules: Sequence[str] = (),
    ) -> None: ...

class Group:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float
    dampening: float
    lr_decay: float
    initial_accumulator_value: float
    decoupled: bool
    bias_correction: bool
    nesterov: bool
    min_coeff: float
    max_coeff: float
    eps_inside_sqrt: bool
    standard_newton_schulz: bool
    centered: bool
    alpha: float
    rho: float
    momentum_decay: float
    eta_minus: float
    eta_plus: float
    step_min: float
    step_max: float
    lambd: float
    t0: float
    lr_before: float
    def __init__(
        self,
        lr: float,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        decoupled: bool = True,
        bias_correction: bool = True,
        nesterov: bool = False,
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
        eps_inside_sqrt: bool = False,
        standard_newton_schulz: bool = False,
        centered: bool = False,
        alpha: float = 0.99,
        rho: float = 0.9,
        momentum_decay: float = 0.004,
        eta_minus: float = 0.5,
        eta_plus: float = 1.2,
        step_min: float = 1e-6,
        step_max: float = 50.0,
        lambd: float = 1e-4,
        t0: float = 1e6,
        lr_before: float = 0.0,
    ) -> None: ...

class UnitView:
    @property
    def name(self) -> str: ...
    @property
    def elements(self) -> int: ...
    @property
    def trainable_elements(self) -> int: ...
    @property
    def resident(self) -> bool: ...

class ParameterView:
    @property
    def unit(self) -> int: ...
    @property
    def offset(self) -> int:
        """Elements from the unit's start."""
    @property
    def elements(self) -> int: ...
    @property
    def address(self) -> int:
        """For life; readable while the unit is held."""

class StepResult:
    @property
    def skipped(self) -> bool: ...
    @property
    def grad_norm(self) -> float:
        """NaN where it was not computed."""
    @property
    def loss_scale(self) -> float:
        """Of the next step."""


class Counters:
    @property
    def gathers(self) -> int: ...
    @property
    def gather_hits(self) -> int: ...
    @property
    def gather_waits(self) -> int: ...
    @property
    def gather_wait_seconds(self) -> float: ...
    @property
    def remaps(self) -> int: ...
    @property
    def scatter_bytes(self) -> int: ...
    @property
    def scatter_wait_seconds(self) -> float: ...
    @property
    def step_wait_seconds(self) -> float: ...

_OptimizerKind = Literal[
    "adam", "lion", "adagrad", "sgd", "sgd_momentum", "lamb", "muon", "rmsprop", "rmsprop_momentum",
    "rmsprop_centered", "rmsprop_centered_momentum", "adadelta", "adamax", "nadam", "radam", "asgd",
    "rprop",
]

class Client:
    """One training process, attached to its job. Thread-safe."""

    @staticmethod
    def attach(
        *,
        modules: Sequence[ModuleInfo],
        parameters: Sequence[ParameterInfo],
        groups: Sequence[_OptimizerKind] = (),
        config: str = "{}",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        address: str = "",
        embedded: bool = True,
        job: str = "",
        attempt: int = 0,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        local_world: int = 1,
        node_rank: int = 0,
        peers: Sequence[str] = (),
        job_token: str = "",
        attach_timeout_seconds: float = 60.0,
        takeover_seconds: float = 10.0,
    ) -> Client: ...

    # Constant after attach. Lists are made once.
    @property
    def units(self) -> list[UnitView]: ...
    @property
    def parameters(self) -> list[ParameterView]:
        """In the order given to attach()."""
    @property
    def generation(self) -> int: ...
    @property
    def resumed_step(self) -> int: ...
    @property
    def resumed_skipped(self) -> bool:
        """That step was a skipped one."""
    @property
    def loss_scale(self) -> float:
        """What the next step's loss is to be multiplied by: 1 but in fp16."""
    @property
    def initialized(self) -> bool:
        """The weights are there already; else rank 0 must put() the initial ones."""
    @property
    def members(self) -> int: ...
    @property
    def stage(self) -> int: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]: ...
    @property
    def resolved_config(self) -> str:
        """JSON."""
    @property
    def plan_text(self) -> str: ...
    @property
    def guard_pages(self) -> bool: ...
    @property
    def base(self) -> int:
        """Start of the address range of all units, and its length."""
    @property
    def reserved_bytes(self) -> int: ...

    @property
    def step_number(self) -> int:
        """The step being computed: committed + 1."""
    @property
    def closed(self) -> bool: ...

    def parameter_tensor(self, parameter: int) -> torch.Tensor:
        """A tensor at the parameter's address for life, with the shape given to attach(). It must
        not be written (the memory is read-only: a write ends the process with a fault that names
        the parameter) and may be read while its unit is held. Keeps the address range, not the
        attachment, alive."""

    def gather(self, unit: int) -> None: ...
    def release(self, unit: int) -> None: ...
    def release_all(self) -> None: ...
    def held(self, unit: int) -> bool: ...
    def land(
        self,
        parameter: int,
        data_ptr: int,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        """Adds the contiguous gradient at `data_ptr` (all of the parameter's elements, in CPU
        memory). FailedPrecondition after the unit's last scatter: reclaim() first."""
    def scattered(self, unit: int) -> bool: ...
    def scatter(self, unit: int, last: bool) -> None: ...
    def hand_over(self, unit: int) -> int:
        """scatter(unit, last=True) even where nothing was landed. The rounds of the unit that this
        rank is through with in this step. Once all ranks are through with as many (one that is
        behind calls reclaim() and this again), and after a barrier, the unit's gradient may be
        read."""
    def end_micro_step(self) -> None:
        """A backward pass is over: under the gradient plan node_sum no other rank waits for more
        of it, and gradients are added pass by pass."""
    def reclaim(self, unit: int) -> None: ...
    def step(
        self,
        groups: Sequence[Group],
        *,
        max_norm: float = 0.0,
        loss_scale: float = 1.0,
        want_norm: bool = False,
        blob: bytes = b"",
    ) -> StepResult: ...
    def put(
        self,
        unit: int,
        begin: int,
        data_ptr: int,
        count: int,
        kind: Literal["master", "exp_avg", "exp_avg_sq", "third"] = "master",
    ) -> None:
        """Writes `count` float32 values at `data_ptr` into elements [begin, begin + count), on all
        nodes: of the master copy (nobody may hold the unit), or of the first or second tensor of
        the optimizer's state, which trainable elements have. Order it by barriers.
        InvalidArgument where the job has no such state."""
    def read(
        self,
        unit: int,
        begin: int,
        data_ptr: int,
        count: int,
        kind: Literal["master", "exp_avg", "exp_avg_sq", "third", "gradient"] = "master",
    ) -> None:
        """Fills `count` float32 values at `data_ptr`. "gradient": the sum over all ranks of what
        was handed over in the step under way, times the loss scale; see hand_over()."""
    def optimizer_steps(self) -> list[int]:
        """Per parameter, in the order given to attach(): the applied steps that the optimizer
        counts (Adam's t). Needs no other rank."""
    def loss_scaler(self) -> dict[str, Any] | None:
        """The state of the loss scaler: cur_scale, cur_iter, last_overflow_iter, cur_hysteresis, as
        DeepSpeed's DynamicLossScaler has them. None but in fp16. Needs no other rank."""
    def restore(self, steps: Sequence[int], loss_scaler: dict[str, Any] | None = None) -> None:
        """Sets what optimizer_steps() and loss_scaler() tell, on all nodes at once. Collective:
        every rank calls it between steps, with equal arguments; where they differ all get
        InvalidArgument. Without a `loss_scaler` that of the job stays as it is."""
    def all_reduce(
        self, values: Sequence[float], op: Literal["sum", "mean", "min", "max"] = "sum"
    ) -> list[float]: ...
    def barrier(self) -> None: ...
    def client_state(self) -> bytes:
        """This rank's blob of the last committed step, as of attach(); b"" before the first."""
    def detach(self) -> None:
        """Leaves for good; the job ends once all ranks have. The client is closed then."""
    def close(self) -> None:
        """Lets go of the attachment as a death would: the daemon keeps the job's state. Tensors
        stay where they are. Idempotent. Calls after it raise FailedPrecondition."""
    def counters(self) -> Counters: ...
    def __enter__(self) -> Client: ...
    def __exit__(self, *exc: Any) -> None:
        """close()."""
