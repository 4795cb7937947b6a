# SPDX-License-Identifier: Apache-2.0
"""The engine: the model as the training loop uses it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zerod import at_exit, collectives, constructors, garbage, gathered
from zerod.backward import BackwardPass
from zerod.client_state import ClientState
from zerod.copying import PlainCopies
from zerod.errors import FailedPrecondition
from zerod.further import Further
from zerod.hooks import Gathering, Trace
from zerod.launch import Launch
from zerod.loader import Loader
from zerod.model import ModelDescription, tensors_in
from zerod.optimizer import Optimizer
from zerod.parameter_offload import ParameterOffload
from zerod.precision import Precision
from zerod.progress import Progress, momenta, watched
from zerod.replay import Replay, Replaying
from zerod.saving import Saving
from zerod.settings import Settings
from zerod.versions import Versions
from zerod.weights import StateDictHooks, Weights, check_state, model_buffers


@dataclass
class EngineParts:
    """What `initialize` has put together."""

    model: nn.Module
    client: Any
    description: ModelDescription
    weights: Weights
    optimizer: Optimizer | None
    lr_scheduler: Any
    training_dataloader: Loader | None
    config: dict[str, Any]
    launch: Launch
    replays: bool = False  # a resumed job lets the script run up to where it stands
    written_for_deepspeed: bool = False


class Engine(Settings, Saving, Further, Replaying, nn.Module):
    """Wraps a model whose parameters live in the daemon.

        loss = engine(batch)
        engine.backward(loss)
        engine.step()

    What it does not know falls through to the model. `client_state` is a dict of the user's own;
    it is committed with every step and there again after a restart.
    """

    def __init__(self, parts: EngineParts) -> None:
        super().__init__()
        self.module = parts.model
        self.client = parts.client
        self.description = parts.description
        self.weights = parts.weights
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.training_dataloader
        self.config = parts.config
        self.device = torch.device("cpu")
        self.global_rank = parts.launch.rank
        self.local_rank = parts.launch.local_rank
        self.node_rank = parts.launch.node_rank
        self.nodes = parts.launch.nodes
        self.world_size = self.dp_world_size = parts.launch.world
        self.micro_steps = 0
        self.global_steps = 0
        self.skipped_steps = 0
        zero = self.config["zero_optimization"]
        self.want_grad_norm: bool = zero["compute_grad_norm"]
        self.client_state: dict[str, Any] = {}
        # As of the engine's named_parameters(), where DeepSpeed's users expect it.
        self._prefix = "module." if parts.written_for_deepspeed else ""
        self._forced_boundary: bool | None = None
        self._inside_no_sync = False
        self._grad_norm: float | None = None
        self._step_applied = False
        self._lr_kwargs: dict[str, Any] = {}  # of the step being made
        self._destroyed = False
        self._has_module = True
        self.backward_pass = BackwardPass(
            self.client, self.description.parameters, overlap=zero["overlap_comm"] is not False
        )
        self.backward_pass.is_last = self.is_gradient_accumulation_boundary
        self.backward_pass.steps = self.gradient_accumulation_steps
        self.backward_pass.needs_scale = self.fp16_enabled()
        self.precision = Precision(self.config)
        self.gathering = Gathering(self.module, self.description, self.client, self.backward_pass)
        if zero["log_trace_cache_warnings"]:
            self.gathering.trace = Trace([unit.name for unit in self.client.units])
        if self.optimizer is not None and self.zero_optimization_stage() == 3:
            self.optimizer.parameter_offload = ParameterOffload(self.module, self.gathering)
        if self.optimizer is not None:
            self.optimizer.discard_gradients = self.backward_pass.discard
        self.versions = Versions(self.description.parameters)
        self._state_dict_hooks = StateDictHooks(self.weights, self.module)
        limit = self.config["zerod"]["client_state_bytes_max"]
        self._state = ClientState(self.module, limit, may_omit=parts.written_for_deepspeed)
        self.progress = Progress(self.config, self.global_rank)
        self.access = gathered.EngineAccess(self)
        self._copies = PlainCopies(
            self, lambda: [*self.gathering.handles, *self._state_dict_hooks.handles]
        )
        self.resumed_step: int = self.client.resumed_step
        self._skipped_at: list[int] = []
        self._replay: Replay | None = None
        if self.resumed_step and parts.replays:
            self._replay = self._plan_replay()
        elif self.resumed_step:
            self._resume()
        if self.optimizer is not None:
            self.optimizer.serve(self)
        self._tell_optimizer(overflow=self.client.resumed_skipped)
        if self.config["disable_python_gc"]:
            garbage.pause()
        collectives.set_current(self)
        at_exit.leave_at_exit(self)

    # --- Training.

    @watched("forward")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.precision.inputs(args, kwargs)
        if not self._has_module:
            with self.precision.autocast():
                return self.module(*args, **kwargs)
        self.versions.check()
        self.backward_pass.abandon()
        differentiate = torch.is_grad_enabled() and not self.replaying
        with (
            torch.set_grad_enabled(differentiate),
            self.gathering.forward(),
            self.precision.autocast(),
        ):
            output = self.module(*args, **kwargs)
        if differentiate:
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    # The first hook of a backward pass tells which graph task is the outermost.
                    tensor.register_hook(self._enter_backward)
        return output

    def _enter_backward(self, _: torch.Tensor) -> None:
        self.backward_pass.enter()

    @watched("backward")
    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Back-propagates `loss` divided by the number of accumulation steps, which is returned.
        May be called several times between two calls of step()."""
        steps = self.gradient_accumulation_steps()
        divided = loss / steps if scale_wrt_gas and steps > 1 else loss
        if self.replaying:
            return divided
        try:
            with self.backward_pass.explicit():
                self.scale(divided).backward(retain_graph=retain_graph)
        except BaseException:
            self.gathering.reset()
            raise
        return divided

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What `.backward()` is to be called on where engine.backward() is not: in fp16 the loss
        times the loss scale, else the loss. Gradients are divided by the accumulation steps."""
        self.backward_pass.scaled = True
        return loss.float() * self.client.loss_scale if self.fp16_enabled() else loss

    @watched("step")
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """The end of a micro-step. At the accumulation boundary the optimizer runs, on all ranks:
        it returns when the new weights may be read."""
        boundary = self.is_gradient_accumulation_boundary()
        if self._inside_no_sync:
            raise AssertionError(
                "It is illegal to call Engine.step() inside no_sync context manager, or inside "
                "coalesce_grad_reduction"
            )
        if not boundary:
            self.micro_steps += 1
            self._step_applied = False
            return
        if self.optimizer is None:
            raise RuntimeError("there is no optimizer: pass one, or configure \"optimizer\"")
        if self._replay is not None:
            return self._replay_step(self._replay, lr_kwargs or {})
        self.versions.check()
        self.gathering.reset()
        self.backward_pass.flush()
        self.backward_pass.check_frozen()
        self.micro_steps += 1
        self._lr_kwargs = lr_kwargs or {}
        try:
            result = self.client.step(
                self.optimizer.groups(),
                max_norm=self.gradient_clipping(),
                loss_scale=self.client.loss_scale,
                want_norm=self.want_grad_norm,
                blob=self._state.capture(self._state_parts()),
            )
        except FailedPrecondition:
            self.backward_pass.committed()  # refused on every rank: its gradients are dropped
            raise
        self.backward_pass.committed()
        self.gathering.end_step()
        self.versions.bump()
        self.global_steps += 1
        self._step_applied = not result.skipped
        self._grad_norm = None if math.isnan(result.grad_norm) else result.grad_norm
        self._tell_optimizer(overflow=result.skipped)
        if result.skipped:
            self.skipped_steps += 1
            self._skipped_at.append(self.global_steps)
        else:
            self._count_applied(self._lr_kwargs)

    def _tell_optimizer(self, overflow: bool) -> None:
        if self.optimizer is not None:
            self.optimizer.mark_stepped()
            self.optimizer.overflow = overflow
            self.optimizer.loss_scale = self.client.loss_scale

    def _count_applied(self, lr_kwargs: dict[str, Any], lr_scheduler: bool = True) -> None:
        """What moves on with an applied step."""
        if self.optimizer is not None:
            self.optimizer.applied()
        if self.lr_scheduler is None or not lr_scheduler:
            return
        if self.optimizer is not None:
            self.optimizer.mark_stepped()
        self.lr_scheduler.step(**lr_kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes what waits in `.grad`: gradients that another engine's backward() has made, or the
        user. This engine's own are on their way after backward() and cannot be called back; step()
        uses them up."""
        if self.backward_pass.has_gradients:
            raise RuntimeError(
                "gradients of this step have been handed over and cannot be zeroed; call "
                "engine.step() first"
            )
        self.backward_pass.discard(set_to_none)

    def is_gradient_accumulation_boundary(self) -> bool:
        if self._forced_boundary is not None:
            return self._forced_boundary
        if not self.config["managed_gradient_accumulation"]:
            return True
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on the caller says which micro-step is the last, before its backward()."""
        self._forced_boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, no micro-step is the step's last. As in DeepSpeed: below stage 2, without
        step() inside. (Nothing crosses the network before the last micro-step in any case.)"""
        stage = self.zero_optimization_stage()
        assert stage < 2, (
            "no_sync context manager is incompatible with gradient partitioning logic of ZeRO "
            f"stage {stage}"
        )
        assert not self._inside_no_sync, "no_sync context manager reentry is unsupported"
        with self._without_boundary():
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Several calls of backward() inside are one step's: their sum crosses the network once,
        with step() after it. As in DeepSpeed, step() inside is an error."""
        assert not self._inside_no_sync, (
            "coalesce_grad_reduction cannot be nested inside another no_sync context"
        )
        with self._without_boundary():
            yield

    @contextmanager
    def _without_boundary(self) -> Iterator[None]:
        forced, self._forced_boundary = self._forced_boundary, False
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False
            self._forced_boundary = forced

    # --- State.

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False,
        master: bool = False,
    ) -> dict[str, Any]:
        """The model's own state_dict: complete, plain copies, from any rank alone. In a script
        written for DeepSpeed its names begin with "module.".

        In a bf16 job the values are bfloat16, in an fp16 job float16; with `master` the fp32
        master copy.
        """
        self._state_dict_hooks.master = master
        try:
            state: dict[str, Any] = self.module.state_dict(
                destination=destination, prefix=prefix + self._prefix, keep_vars=keep_vars
            )
            return state
        finally:
            self._state_dict_hooks.master = False

    def load_state_dict(  # type: ignore[override]
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        allowed_missing_keys: Iterable[str] = (),
    ) -> Any:
        """Rank 0's parameters become everybody's; each rank takes the buffers it is given.
        The optimizer's state stays. `allowed_missing_keys` may be missing although `strict`.
        Names as state_dict() gives them, or the model's own. Collective, outside of forward and
        backward."""
        prefix = self._prefix
        if prefix and state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix) :]: value for name, value in state_dict.items()}
        problem: Exception | None = None
        missing: list[str] = []
        unexpected: list[str] = []
        try:
            self.versions.check()
            missing, unexpected = check_state(
                self.module, self.description.parameters, state_dict
            )
            forbidden = set(missing).difference(allowed_missing_keys)
            if strict and (forbidden or unexpected):
                raise ValueError(
                    f"the state_dict does not fit: missing {missing}, unexpected {unexpected}"
                )
        except Exception as error:
            problem = error
        refused = collectives.all_reduce(float(problem is not None), "max", self)
        if problem is not None:
            raise problem
        if refused:
            raise RuntimeError("another rank's state_dict does not fit the model")
        self.begin_write()
        if self.global_rank == 0 and not self.passes_over("load_state_dict()"):
            self._put_state(state_dict)
        with torch.no_grad():
            for name, buffer in model_buffers(self.module, persistent_only=True).items():
                if name in state_dict:
                    buffer.copy_(state_dict[name])
        self.end_write()
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _put_state(self, state_dict: Mapping[str, Any]) -> None:
        of_parameter = {id(p.parameter): p for p in self.description.parameters}
        values = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if name in state_dict:
                values[id(parameter)] = state_dict[name]
        for identity, value in values.items():
            self.weights.put(of_parameter[identity], value)

    def begin_write(self) -> None:
        """Before parameters are written, on every rank; end_write() is after it."""
        if self.backward_pass.has_gradients:
            raise RuntimeError(
                "gradients of the current weights are on their way: write parameters after "
                "engine.step()"
            )
        self.versions.check()
        self.gathering.reset()
        self.client.barrier()  # nobody reads the old values any more

    def end_write(self) -> None:
        self.client.barrier()
        self.versions.bump(all_parameters=True)

    def rank_state(self) -> dict[str, Any]:
        """What this rank has beside the daemons' state, between steps: for a checkpoint."""
        if self.replaying:  # the script is not where the job stands
            return {"engine": self.client.client_state(), "skipped": self.client.resumed_skipped}
        return {"engine": self._state.capture(self._state_parts())}

    def restore_rank_state(
        self, state: dict[str, Any], same_world: bool, lr_scheduler: bool, groups: bool
    ) -> None:
        """What rank_state() gave. Without `same_world` it is of a job with another number of
        ranks: what is each rank's own then stays as it is."""
        blob = state["engine"]
        if same_world:
            parts = self._state.restore(blob)
        else:
            parts = self._state.peek(blob)
            parts["micro_steps"] = parts["global_steps"] * self.gradient_accumulation_steps()
            parts.pop("loader", None)
            parts["gradient_counts"] = None
        self._adopt(parts, lr_scheduler, groups)
        if "skipped" in state:
            self._count_step(parts if lr_scheduler else {}, state["skipped"])

    def _state_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "micro_steps": self.micro_steps,
            "global_steps": self.global_steps,
            "skipped_steps": self.skipped_steps,
            "skipped_at": self._skipped_at,
            "user": self.client_state,
            "gradient_counts": self.backward_pass.expectation.state(),
        }
        if self.optimizer is not None:
            parts["groups"] = [
                {key: value for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ]
        if self.lr_scheduler is not None:
            parts["lr_scheduler"] = self.lr_scheduler.state_dict()
            parts["lr_kwargs"] = self._lr_kwargs
        if self.training_dataloader is not None:
            parts["loader"] = self.training_dataloader.state_dict()
        return parts

    def _adopt(self, parts: dict[str, Any], lr_scheduler: bool = True, groups: bool = True) -> None:
        self.micro_steps = parts["micro_steps"]
        self.global_steps = parts["global_steps"]
        self.skipped_steps = parts["skipped_steps"]
        self._skipped_at = list(parts["skipped_at"])
        self.client_state = parts["user"]
        counts = parts["gradient_counts"]
        if counts is None or len(counts) == len(self.description.parameters):
            self.backward_pass.expectation.restore(counts)
        saved = parts.get("groups", [])
        if groups and self.optimizer is not None and len(saved) == len(self.optimizer.param_groups):
            for group, values in zip(self.optimizer.param_groups, saved):
                group.update(values)
        if self.training_dataloader is not None and "loader" in parts:
            self.training_dataloader.load_state_dict(parts["loader"])
        if lr_scheduler and self.lr_scheduler is not None and "lr_scheduler" in parts:
            self.lr_scheduler.load_state_dict(parts["lr_scheduler"])

    def _resume(self) -> None:
        """Everything is put back as it was when the committed step was made."""
        parts = self._state.restore(self.client.client_state())
        self._adopt(parts)
        self._count_step(parts, self.client.resumed_skipped)

    def _count_step(self, parts: dict[str, Any], skipped: bool) -> None:
        """What step() does behind STEP. The state went with STEP, before anybody knew whether the
        step would be skipped."""
        self.global_steps += 1
        self.skipped_steps += int(skipped)
        self._step_applied = not skipped
        if skipped:
            self._skipped_at.append(self.global_steps)
        else:
            self._count_applied(parts.get("lr_kwargs", {}), "lr_scheduler" in parts)

    def release_module(self) -> None:
        """The module gets parameters of its own, float32 and without values: this engine can no
        longer train it. Nobody may be within forward or backward."""
        self.gathering.reset()
        self._let_go()
        for managed in self.description.parameters:
            managed.parameter.data = constructors.empty(managed.shape, dtype=torch.float32)

    def _let_go(self) -> None:
        """Nothing of the engine is on the module any more. Idempotent."""
        self._has_module = False
        self._copies.remove()
        self.gathering.remove()
        self.backward_pass.remove()
        self._state_dict_hooks.remove()
        self.access.close()

    def destroy(self, keep_weights: bool = True) -> None:
        """Leaves the job: its state is freed once all ranks have left. Idempotent.

        The module is a plain one afterwards, and may be given to initialize() again: each rank has
        its weights in memory of its own, in the type that it computes with. Without `keep_weights`
        nothing is copied, and what is not gathered cannot be read any more.
        """
        if self._destroyed:
            return
        self._destroyed = True
        if keep_weights and self._has_module and not self.client.closed:
            self.weights.give_back()
        at_exit.forget(self)
        self.progress.close()
        if self.config["disable_python_gc"]:
            garbage.resume()
        if collectives._current and collectives._current[0] is self:
            collectives.set_current(None)
        self._let_go()
        if not self.client.closed:
            self.client.detach()

    def leave(self) -> None:
        """At the end of the script, which needs no weights any more."""
        self.destroy(keep_weights=False)

    # --- The last step.

    def get_global_grad_norm(self) -> float | None:
        """Of the last step's mean gradient, before clipping; infinite where the step was skipped.
        None where it was not computed: it is with clipping, where steps can be skipped, and while
        `engine.want_grad_norm` is set (at first: compute_grad_norm). NaN where a script that was
        started again has only been let run up to the job's step (replay.py)."""
        return self._grad_norm

    def computes_grad_norm(self) -> bool:
        return self.want_grad_norm or self.gradient_clipping() > 0 or self.fp16_enabled()

    def was_step_applied(self) -> bool:
        return self._step_applied

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def get_mom(self) -> list[Any]:
        return momenta(self.optimizer)

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)
