# SPDX-License-Identifier: Apache-2.0
"""zerod.zero.Init: a model whose parameters are born in the daemon."""

import functools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from zerod import buffers, config as configuration, pretrained
from zerod.constructors import Constructors
from zerod.gathered import GatheredParameters
from zerod.launch import Launch
from zerod.nursery import PENDING_BYTES_MAX, nursery
from zerod.parameter_status import disown

_SERVED = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = (None, "none", "cpu")
_ATTACH_TIMEOUT_SECONDS = 600.0
# Sections that say something about a parameter's birth, and whether they are right.
_SECTIONS = ("bf16", "bfloat16", "fp16", "data_types", "zero_optimization", "zerod")

_outermost: "Init | None" = None  # whose settings are in force
_depth = 0
# Modules that have born parameters, with the handle of their load_state_dict pre-hook.
_hooked: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_converting = 0


class Init:
    """`with Init(config_dict_or_path=config): model = Model()`

    Each module's own parameters go to the daemon when its __init__ has ended, some 64 MB at a
    time: no rank ever holds the whole model. Rank 0's values are everybody's. What torch.zeros and
    its like make inside is of the parameters' type from the start (constructors.py). After that a
    parameter has its shape and dtype, and may be read and written inside GatheredParameters only;
    the parent's __init__ uses that too, or Module.apply, which does it by itself.

    Collective: every rank builds the same modules in the same order. Of nested ones the outermost
    counts. After an exception inside, what was born is freed with the model, and torch's classes
    are as they were.

    The arguments are DeepSpeed's. `module` is an existing one to convert, now. `dtype` is what
    floating-point parameters become; else what the configuration's bf16 or fp16 says; else they
    stay as they are. In the configuration only what concerns births is looked at, and "auto"
    stands for the default. `remote_device` "cpu" or None: parameters are in the memory of the
    daemons. `pin_memory` and `mem_efficient_linear` have no effect here: there is no device to
    copy to, and a parameter's one address is not saved again by autograd. The data-parallel group
    must be the world. `address` is the daemon's, as in `initialize`; `pending_bytes_max` what a
    rank keeps before it is handed over.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: configuration.Source | None = None,
        config: configuration.Source | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        *,
        address: str = "",
        pending_bytes_max: int = PENDING_BYTES_MAX,
    ) -> None:
        self.enabled = enabled
        self._patches: _Patches | None = None
        self._constructors: Constructors | None = None
        if not enabled:
            return
        if config is not None and config_dict_or_path is not None:
            raise ValueError("give the configuration as config_dict_or_path or as config, not both")
        if remote_device not in _DEVICES:
            raise ValueError(
                f"remote_device is {remote_device!r}; parameters are born in the memory of the "
                'daemons: leave it out, or "cpu"'
            )
        if dtype is not None and dtype not in _SERVED:
            raise ValueError(f"dtype is {dtype}; float32, bfloat16 and float16 are served")
        if pending_bytes_max < 0:
            raise ValueError(f"pending_bytes_max is {pending_bytes_max}; it is a number of bytes")
        _refuse(
            zero_param_parallel_group=zero_param_parallel_group,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            param_swapper=param_swapper,
        )
        launch = Launch.from_environment()
        for group in (data_parallel_group, sequence_data_parallel_group):
            _check_group(group, launch.world)
        if mpu is not None and mpu.get_data_parallel_world_size() != launch.world:
            raise NotImplementedError(
                f"mpu splits the {launch.world} ranks into groups of "
                f"{mpu.get_data_parallel_world_size()}: there is no model parallelism here"
            )
        settings = _read(config_dict_or_path or config, launch.world)
        self.dtype = dtype or settings["dtype"]
        self._keep_in_fp32 = settings["keep_in_fp32"]
        self._job = settings["job"]
        self._attach_timeout_seconds = settings["attach_timeout_seconds"]
        self._address = address
        self._pending_bytes_max = pending_bytes_max
        # Modules whose parameters were on no device yet when their __init__ ended.
        self._later: list[weakref.ref[nn.Module]] = []
        if module is not None:
            self._begin()
            try:
                for part in module.modules():
                    self.collect(part)
                nursery.flush()
                self.keep_in_fp32(module)
            except BaseException:
                nursery.abandon_pending()
                raise

    def __enter__(self) -> None:
        global _outermost, _depth
        if not self.enabled:
            return
        if _depth == 0:
            self._begin()
            _outermost = self
            self._patches = _Patches()
            if self.dtype is not None:
                self._constructors = Constructors(self.dtype)
        _depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _outermost, _depth
        if not self.enabled:
            return
        _depth -= 1
        if _depth > 0:
            return
        ended, _outermost = _outermost, None
        assert ended is not None
        assert ended._patches is not None
        ended._patches.undo()
        ended._patches = None
        if ended._constructors is not None:
            ended._constructors.undo()
            ended._constructors = None
        later, ended._later = ended._later, []
        if kind is not None:
            nursery.abandon_pending()
            return
        for reference in later:
            module = reference()
            if module is not None:
                ended.collect(module)
        nursery.flush()

    def _begin(self) -> None:
        pretrained.adapt()
        nursery.locate(self._job, self._address, self._attach_timeout_seconds)
        nursery.pending_bytes_max = self._pending_bytes_max

    def collect(self, module: nn.Module) -> None:
        """The module's own parameters that are not born yet. Collective."""
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            self._later.append(weakref.ref(module))
        _collect(module, self.dtype)

    def keep_in_fp32(self, module: nn.Module) -> None:
        """Of its buffers those that are to be fp32 in a job of 16 bits."""
        if self.dtype is not None:
            buffers.keep_in_fp32(module, self._keep_in_fp32, self.dtype)


def _collect(module: nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in module._parameters.values():
        if (
            parameter is None
            or nursery.find(parameter) is not None
            or isinstance(parameter, nn.parameter.UninitializedTensorMixin)
            or parameter.device.type != "cpu"
            or not parameter.is_floating_point()
        ):
            continue
        if dtype is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        if parameter.dtype not in _SERVED:
            continue  # initialize() says what it thinks of it
        if module not in _hooked:
            _hooked[module] = module.register_load_state_dict_pre_hook(_before_load)
            module.__dict__["_apply"] = _Apply(module)
        nursery.add(parameter)


def unhook(model: nn.Module) -> None:
    """Its parameters are an engine's now."""
    for module in model.modules():
        handle = _hooked.pop(module, None)
        if handle is not None:
            handle.remove()
            module.__dict__.pop("_apply", None)


def _before_load(module: nn.Module, state: Any, prefix: str, metadata: Any, *_: Any) -> None:
    if metadata.get("assign_to_params_buffers", False):
        return  # they are replaced, not written
    for name, parameter in module._parameters.items():
        if prefix + name not in state:
            continue  # part of a checkpoint: this one is loaded another time
        born = nursery.find(parameter) if parameter is not None else None
        if born is not None and born.arena is not None and not born.gathered:
            raise RuntimeError(
                f"the parameter {prefix + name!r} was born under zerod.zero.Init: load into it "
                "inside `with zerod.GatheredParameters(parameters, modifier_rank=0):`, on all "
                "ranks, module by module to keep memory small; or call engine.load_state_dict() "
                "after initialize()"
            )


class _Apply:
    """In the place of one module's _apply, which .to(), .half(), .bfloat16() and their like are
    made of: parameters that are in an arena come back to be converted, and are born again.
    Collective, unless nothing is to be converted."""

    def __init__(self, module: nn.Module) -> None:
        # Weak: a module that is replaced must not wait for the garbage collector.
        self._module = weakref.ref(module)

    def __call__(
        self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        module = self._module()
        assert module is not None
        return _convert(module, function, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Apply":
        """Of the copy; its parameters are plain, so it finds nothing to do."""
        return _Apply(memo[id(self._module())])

    def __reduce__(self) -> Any:
        return (_Apply, (self._module(),))


def _convert(
    module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool
) -> nn.Module:
    global _converting
    original = type(module)._apply
    own = [p for p in module._parameters.values() if p is not None]
    born = [p for p in own if nursery.find(p) is not None]
    if not born or all(_leaves_alone(function, p) for p in born):
        return original(module, function, recurse)
    nursery.take_back(born)
    _converting += 1
    try:
        original(module, function, recurse)
        _collect(module, None)
    finally:
        _converting -= 1
        for parameter in born:
            if nursery.find(parameter) is None:  # on another device, of another type
                disown(parameter)
    if _converting == 0 and _depth == 0:
        nursery.flush()
    return module


def _leaves_alone(function: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> bool:
    probe = torch.empty((0,) * max(like.dim(), 1), dtype=like.dtype)
    with torch.no_grad():
        return function(probe) is probe


class _Patches:
    """What is done to torch while modules are built: every __init__ of a class of modules, also
    of those that are defined meanwhile, tells when the outermost one of an object has ended; and
    Module.apply gathers what it visits."""

    def __init__(self) -> None:
        self._initializers: list[tuple[type, Any, Any]] = []  # (class, original, ours)
        self._building: set[int] = set()  # ids of modules whose __init__ is under way
        for cls in _subclasses(nn.Module):
            self._wrap(cls)
        self._own_init_subclass = nn.Module.__dict__.get("__init_subclass__")
        original = nn.Module.__init_subclass__
        patches = self

        def init_subclass(cls: type, **options: Any) -> None:
            # What was bound to Module is called for the new class.
            getattr(original, "__func__", _nothing)(cls, **options)
            patches._wrap(cls)

        nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
        self._apply = nn.Module.__dict__["apply"]
        nn.Module.apply = _gathering_apply(self._apply)  # type: ignore[method-assign]

    def undo(self) -> None:
        for cls, original, ours in self._initializers:
            # Where somebody has put another one on top, ours stays below and does nothing.
            if cls.__dict__.get("__init__") is ours:
                cls.__init__ = original  # type: ignore[misc]
        if self._own_init_subclass is None:
            del nn.Module.__init_subclass__
        else:
            nn.Module.__init_subclass__ = self._own_init_subclass
        nn.Module.apply = self._apply  # type: ignore[method-assign]

    def _wrap(self, cls: type) -> None:
        original = cls.__dict__.get("__init__")
        if original is None:
            return
        building = self._building
        patches = self

        @functools.wraps(original)
        def initialize(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            context = _outermost
            if context is None or context._patches is not patches or id(module) in building:
                return original(module, *args, **kwargs)
            building.add(id(module))
            try:
                original(module, *args, **kwargs)
            finally:
                building.discard(id(module))
            if "_parameters" in module.__dict__:
                context.collect(module)
                context.keep_in_fp32(module)

        cls.__init__ = initialize  # type: ignore[misc]
        self._initializers.append((cls, original, initialize))


def _nothing(cls: type, **options: Any) -> None:
    super(nn.Module, cls).__init_subclass__(**options)


def _subclasses(root: type) -> Iterator[type]:
    seen = {root}
    waiting = [root]
    while waiting:
        cls = waiting.pop()
        yield cls
        for child in type.__subclasses__(cls):
            if child not in seen:
                seen.add(child)
                waiting.append(child)


def _gathering_apply(original: Any) -> Any:
    """Module.apply that lets its function write what it visits: the module's own parameters, and
    its children's, which some initialisers reach for."""

    @functools.wraps(original)
    def apply(module: nn.Module, function: Callable[[nn.Module], None]) -> nn.Module:
        if getattr(function, "_zerod_gathers", False):
            return original(module, function)

        @functools.wraps(function)
        def gathering(visited: nn.Module) -> None:
            reached = [visited, *visited.children()]
            parameters = [p for m in reached for p in m.parameters(recurse=False)]
            born = [p for p in parameters if _in_arena(p)]
            with GatheredParameters(born, modifier_rank=0):
                function(visited)

        gathering._zerod_gathers = True  # type: ignore[attr-defined]
        return original(module, gathering)

    return apply


def _in_arena(parameter: nn.Parameter) -> bool:
    born = nursery.find(parameter)
    return born is not None and born.arena is not None and not born.gathered


def _refuse(**unserved: Any) -> None:
    for name, value in unserved.items():
        if value:
            raise NotImplementedError(f"zero.Init does not serve {name}: leave it out")


def _check_group(group: Any, world: int) -> None:
    if group is None:
        return
    import torch.distributed as dist

    size = dist.get_world_size(group)
    if size != world:
        raise NotImplementedError(
            f"the data-parallel group has {size} of the {world} ranks: parameters are shared by "
            "all ranks of the job"
        )


def _read(source: configuration.Source | None, world: int) -> dict[str, Any]:
    """dtype (or None), keep_in_fp32, job, attach_timeout_seconds. ValueError for what is wrong
    with them."""
    if source is None:
        return {
            "dtype": None, "keep_in_fp32": "auto", "job": "",
            "attach_timeout_seconds": _ATTACH_TIMEOUT_SECONDS,
        }
    text = configuration.read_source(source)
    try:
        document = json.loads(text)
    except ValueError:
        document = None  # DeepSpeed's loader takes more than JSON; so does ours
    if isinstance(document, Mapping):
        # What else there is may be filled in before initialize(), which looks at all of it.
        kept = {key: _without_auto(document[key]) for key in _SECTIONS if key in document}
        text = json.dumps({**kept, "train_micro_batch_size_per_gpu": 1})
    resolved = configuration.resolve(text, world, hidden_sizes=[1], values={}).config
    dtype = configuration.dtype(resolved)
    return {
        "dtype": None if dtype == torch.float32 else dtype,
        "keep_in_fp32": resolved["data_types"]["keep_in_fp32_modules"],
        "job": resolved["zerod"]["job"],
        "attach_timeout_seconds": resolved["zerod"]["attach_timeout_seconds"],
    }


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value
