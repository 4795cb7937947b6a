# SPDX-License-Identifier: Apache-2.0
"""A double of zerod._zerod for one process: the package's own logic is tested without a daemon.

Gathers are answered at once. A unit that is not held is full of NaN, so a missed gather shows in
the numbers where the real client would fault. The optimizer is torch's.
"""

import json
import types

import torch

ALIGN_ELEMENTS = 32
NAN = float("nan")


class ZerodError(RuntimeError):
    code = "UNKNOWN"


def _error(name, code):
    return type(name, (ZerodError,), {"code": code})


ERRORS = {
    name: _error(name, code)
    for name, code in {
        "InvalidArgument": "INVALID_ARGUMENT",
        "AlreadyExists": "ALREADY_EXISTS",
        "FailedPrecondition": "FAILED_PRECONDITION",
        "ResourceExhausted": "RESOURCE_EXHAUSTED",
        "Unavailable": "UNAVAILABLE",
        "Aborted": "ABORTED",
        "DeadlineExceeded": "DEADLINE_EXCEEDED",
        "Internal": "INTERNAL",
        "PermissionDenied": "PERMISSION_DENIED",
    }.items()
}


class ModuleInfo:
    def __init__(self, path, type, is_container=False, leaf=False):
        self.path, self.type, self.is_container, self.leaf = path, type, is_container, leaf


class ParameterInfo:
    def __init__(self, name, shape, trainable=True, group=0, modules=()):
        self.name, self.shape, self.trainable = name, list(shape), trainable
        self.group, self.modules = group, list(modules)


class Group(types.SimpleNamespace):
    def __init__(self, lr, **values):
        defaults = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(lr=lr, **(defaults | values))


MONITOR = {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"}
DEFAULTS = {
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "managed_gradient_accumulation": True,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False, "auto_cast": False, "loss_scale": 0},
    "torch_autocast": {"enabled": False},
    "data_types": {"buffer_dtype": None, "keep_in_fp32_modules": "auto"},
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": None,
        "compute_grad_norm": True, "log_trace_cache_warnings": False,
        "stage3_module_granularity_threshold": 0,
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
    },
    "optimizer": None,
    "scheduler": None,
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "log_level": None,
    "timers": {"throughput": {"enabled": True}},
    "csv_monitor": MONITOR,
    "tensorboard": MONITOR,
    "wandb": {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
    "dataloader_drop_last": False,
    "disable_python_gc": False,
    "zerod": {
        "job": "", "units": {}, "client_state_bytes_max": 8 << 20, "attach_timeout_seconds": 60,
    },
}


auto_values = {}  # that the last configuration was read with


def parse_config(text, world, *, deepspeed_file=False, hidden_sizes=None, values=None):
    auto_values.update(hidden_sizes=hidden_sizes, values=values)
    config = json.loads(json.dumps(DEFAULTS))
    given = json.loads(text)
    warnings = []
    if "bfloat16" in given:
        given["bf16"] = given.pop("bfloat16")
        warnings.append("bfloat16: is deprecated; its name is now bf16")
    for key, value in given.items():
        if isinstance(config.get(key), dict):
            config[key].update(value)
        else:
            config[key] = value
    micro = config["train_micro_batch_size_per_gpu"]
    config["train_batch_size"] = micro * world * config["gradient_accumulation_steps"]
    if config["optimizer"]:
        params = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
                  "adam_w_mode": True, "bias_correction": True}
        config["optimizer"]["params"] = params | config["optimizer"].get("params", {})
    if config["scheduler"]:
        config["scheduler"].setdefault("params", {})
    sources = {key: "default" for key in config}
    return json.dumps(
        {"config": config, "sources": sources, "warnings": warnings, "auto": []}
    )


def parent(path):
    return path.rpartition(".")[0]


def is_within(ancestor, path):
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def assign_units(modules, parameters):
    """The rule of daemon/core/units.cc, without overrides: the home path of each parameter."""
    used = set()
    for info in parameters:
        for path in info.modules:
            while path not in used:
                used.add(path)
                path = parent(path)
    boundaries = set()
    for container in (m for m in modules if m.is_container):
        kids = [m for m in modules if m.path and parent(m.path) == container.path
                and m.path in used]
        if len(kids) >= 2 and len({k.type for k in kids}) == 1:
            boundaries |= {k.path for k in kids}
    leaves = sorted((m.path for m in modules if m.leaf), key=len)  # the outermost first
    homes = []
    for info in parameters:
        home = info.modules[0]
        for path in info.modules:
            while not is_within(home, path):
                home = parent(home)
        leaf = next((path for path in leaves if is_within(path, home)), None)
        if leaf is not None:
            homes.append(leaf)
            continue
        around = home
        while around and around not in boundaries:
            around = parent(around)
        homes.append(around if around in boundaries else home)
    return homes


class Client:
    loss_scale = 1.0
    jobs = {}  # job -> (committed step, whether it was skipped, state), kept by close()

    @staticmethod
    def attach(**options):
        return Client(options)

    def __init__(self, options):
        self.options = options
        self.config = json.loads(options["config"])
        paths = [m.path for m in options["modules"]]
        assert paths[0] == "" and len(paths) == len(set(paths))
        for path in paths[1:]:
            assert parent(path) in paths[: paths.index(path)], path
        self.dtype = options["dtype"]
        self._torch_dtype = getattr(torch, self.dtype)
        homes = assign_units(options["modules"], options["parameters"])
        names = [p for p in paths if p in homes]
        self.stage = self.config["zero_optimization"]["stage"]
        self._place(options["parameters"], homes, names)
        self.closed = False
        self.initialized = False
        self.resumed_step, self.resumed_skipped, state = Client.jobs.get(
            options["job"], (0, False, None)
        )
        self.skip_next = False  # a test's wish: the next step finds a gradient that is not finite
        self.step_number = self.resumed_step + 1
        self._blob = b""
        if state is not None:
            self._master, self._m, self._v, self._steps, self._blob = state
        self.plan_text = "the double"
        self.members, self.generation, self.guard_pages = 1, 1, True
        self.resolved_config = json.dumps(self.config)
        self.log = []
        self._begin_step()
        self._refresh()

    def _place(self, infos, homes, names):
        self.units, self.parameters = [], [None] * len(infos)
        threshold = self.config["zero_optimization"]["stage3_param_persistence_threshold"]
        start = 0
        self._spans = []
        for unit, name in enumerate(names):
            members = [i for i, home in enumerate(homes) if home == name]
            offset = 0
            for i in sorted(members, key=lambda i: not infos[i].trainable):
                elements = 1
                for n in infos[i].shape:
                    elements *= n
                self.parameters[i] = types.SimpleNamespace(
                    unit=unit, offset=offset, elements=elements, start=start + offset
                )
                offset += -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
            resident = self.stage < 3 or offset <= threshold
            self.units.append(types.SimpleNamespace(name=name, elements=offset, resident=resident))
            self._spans.append((start, start + offset))
            start += offset
        self._memory = torch.full((start,), NAN, dtype=self._torch_dtype)
        size = self._memory.element_size()
        self.base = self._memory.data_ptr()
        self.reserved_bytes = start * size
        for view in self.parameters:
            view.address = self.base + view.start * size
        self._master = torch.zeros(start)
        self._m, self._v = torch.zeros(start), torch.zeros(start)
        self._steps = [0] * len(infos)

    def _refresh(self):
        for unit, view in enumerate(self.units):
            span = slice(*self._spans[unit])
            if view.resident or unit in self._held:
                self._memory[span] = self._master[span].to(self._torch_dtype)
            else:
                self._memory[span] = NAN

    def _begin_step(self):
        self._held, self._scattered = set(), set()
        self._gradient, self._touched = torch.zeros_like(self._master), set()

    def _check_open(self):
        if self.closed:
            raise ERRORS["FailedPrecondition"]("this client is closed (close() or detach())")

    def parameter_tensor(self, index):
        view = self.parameters[index]
        flat = self._memory[view.start : view.start + view.elements]
        # Like DLPack's: no version counter shared with others of the same memory.
        return torch.from_dlpack(flat.view(self.options["parameters"][index].shape))

    def gather(self, unit):
        self._check_open()
        self.log.append(("gather", unit))
        self._held.add(unit)
        span = slice(*self._spans[unit])
        self._memory[span] = self._master[span].to(self._torch_dtype)

    def release(self, unit):
        self._check_open()
        self.log.append(("release", unit))
        self._held.discard(unit)
        if not self.units[unit].resident:
            self._memory[slice(*self._spans[unit])] = NAN

    def held(self, unit):
        return unit in self._held

    def land(self, index, data_ptr, dtype="float32"):
        self._check_open()
        view = self.parameters[index]
        info = self.options["parameters"][index]
        if view.unit in self._scattered:
            raise ERRORS["FailedPrecondition"]("reclaim first")
        assert info.trainable
        self.log.append(("land", index))
        values = _at(data_ptr, view.elements, getattr(torch, dtype)).float()
        assert not values.isnan().any(), f"the gradient of {info.name} is NaN"
        self._gradient[view.start : view.start + view.elements] += values
        self._touched.add(index)

    def hand_over(self, unit):
        self.scatter(unit, True)
        return 1

    def scattered(self, unit):
        return unit in self._scattered

    def scatter(self, unit, last):
        self._check_open()
        self.log.append(("scatter", unit, last))
        if last:
            self._scattered.add(unit)

    def end_micro_step(self):
        self._check_open()
        self.log.append(("end_micro_step",))

    def reclaim(self, unit):
        self.log.append(("reclaim", unit))
        self._scattered.discard(unit)

    def step(self, groups, *, max_norm=0.0, loss_scale=1.0, want_norm=False, blob=b""):
        norm = NAN
        if max_norm > 0 or want_norm:
            norm = float(self._gradient.double().square().sum().sqrt())
        skipped, self.skip_next = self.skip_next, False
        if max_norm > 0:
            self._gradient *= min(1.0, max_norm / (norm + 1e-6))
        for index in () if skipped else self._touched:
            self._update(index, groups[self.options["parameters"][index].group])
        Client.jobs[self.options["job"]] = (
            self.step_number,
            skipped,
            [t.clone() for t in (self._master, self._m, self._v)] + [list(self._steps), blob],
        )
        self.step_number += 1
        self._begin_step()
        self._refresh()
        return types.SimpleNamespace(skipped=skipped, grad_norm=norm, loss_scale=1.0)

    def _update(self, index, group):
        view = self.parameters[index]
        span = slice(view.start, view.start + view.elements)
        parameter = torch.nn.Parameter(self._master[span].clone())
        parameter.grad = self._gradient[span].clone()
        optimizer = torch.optim.AdamW(
            [parameter], lr=group.lr, betas=(group.beta1, group.beta2), eps=group.eps,
            weight_decay=group.weight_decay, foreach=False,
        )
        if self._steps[index]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self._steps[index])),
                "exp_avg": self._m[span].clone(), "exp_avg_sq": self._v[span].clone(),
            }
        optimizer.step()
        state = optimizer.state[parameter]
        self._master[span] = parameter.data
        self._m[span], self._v[span] = state["exp_avg"], state["exp_avg_sq"]
        self._steps[index] += 1

    def put(self, unit, begin, data_ptr, count, kind="master"):
        self._check_open()
        assert unit not in self._held or kind != "master"
        target = {"master": self._master, "exp_avg": self._m, "exp_avg_sq": self._v,
                  "gradient": self._gradient}[kind]
        start = self._spans[unit][0] + begin
        target[start : start + count] = _at(data_ptr, count, torch.float32)
        if kind == "master":
            self._refresh()

    def optimizer_steps(self):
        return list(self._steps)

    def loss_scaler(self):
        return None

    def restore(self, steps, loss_scaler=None):
        assert len(steps) == len(self._steps) and loss_scaler is None
        self._steps = list(steps)

    def read(self, unit, begin, data_ptr, count, kind="master"):
        self._check_open()
        source = {"master": self._master, "exp_avg": self._m, "exp_avg_sq": self._v,
                  "gradient": self._gradient}[kind]
        start = self._spans[unit][0] + begin
        _at(data_ptr, count, torch.float32)[:] = source[start : start + count]

    def all_reduce(self, values, op="sum"):
        return list(values)

    def barrier(self):
        pass

    def client_state(self):
        return self._blob

    def detach(self):
        Client.jobs.pop(self.options["job"], None)
        self.closed = True

    def close(self):
        self.closed = True


def _at(address, count, dtype):
    import ctypes

    if count == 0:
        return torch.empty(0, dtype=dtype)
    size = torch.tensor([], dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * (count * size)).from_address(address), dtype=dtype)


def install():
    """Puts the double where the package looks for its extension. Before the first import."""
    import sys

    module = types.ModuleType("zerod._zerod")
    module.__dict__.update(
        ERRORS, ZerodError=ZerodError, ModuleInfo=ModuleInfo, ParameterInfo=ParameterInfo,
        Group=Group, Client=Client, parse_config=parse_config, __version__="0.0.0",
        trim_heap=lambda: None,
    )
    sys.modules["zerod._zerod"] = module
