// SPDX-License-Identifier: Apache-2.0
#include "client/python/src/py_client.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "client/cpp/include/zerod/client.h"
#include "client/python/src/errors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace zerod::python {
namespace {

using client::AttachOptions;
using client::Client;
using client::DType;

// Below this a gradient lands sooner than the GIL is let go and taken again.
constexpr uint64_t kKeepGilElements = 16 * 1024;

DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  Raise(absl::InvalidArgumentError("the data type is \"" + name +
                                   "\"; it must be \"float32\", \"bfloat16\" or \"float16\""));
}

client::OptimizerKind ParseOptimizer(const std::string& name) {
  using Kind = client::OptimizerKind;
  static constexpr std::pair<std::string_view, Kind> kKinds[] = {
      {"adam", Kind::kAdam},
      {"lion", Kind::kLion},
      {"adagrad", Kind::kAdagrad},
      {"sgd", Kind::kSgd},
      {"sgd_momentum", Kind::kSgdMomentum},
      {"lamb", Kind::kLamb},
      {"muon", Kind::kMuon},
      {"rmsprop", Kind::kRmsProp},
      {"rmsprop_momentum", Kind::kRmsPropMomentum},
      {"rmsprop_centered", Kind::kRmsPropCentered},
      {"rmsprop_centered_momentum", Kind::kRmsPropCenteredMomentum},
      {"adadelta", Kind::kAdadelta},
      {"adamax", Kind::kAdamax},
      {"nadam", Kind::kNAdam},
      {"radam", Kind::kRAdam},
      {"asgd", Kind::kAsgd},
      {"rprop", Kind::kRprop},
  };
  std::string known;
  for (const auto& [text, kind] : kKinds) {
    if (name == text) return kind;
    known += std::string(known.empty() ? "" : ", ") + "\"" + std::string(text) + "\"";
  }
  Raise(absl::InvalidArgumentError("the optimizer is \"" + name + "\"; it must be one of " +
                                   known));
}

client::StateKind ParseKind(const std::string& name) {
  if (name == "master") return client::StateKind::kMaster;
  if (name == "exp_avg") return client::StateKind::kExpAvg;
  if (name == "exp_avg_sq") return client::StateKind::kExpAvgSq;
  if (name == "third") return client::StateKind::kThird;
  if (name == "gradient") return client::StateKind::kGradient;
  Raise(absl::InvalidArgumentError("the kind of state is \"" + name +
                                   "\"; it must be \"master\", \"exp_avg\", \"exp_avg_sq\", "
                                   "\"third\" or \"gradient\""));
}

client::ScalarOp ParseOp(const std::string& name) {
  if (name == "sum") return client::ScalarOp::kSum;
  if (name == "mean") return client::ScalarOp::kMean;
  if (name == "min") return client::ScalarOp::kMin;
  if (name == "max") return client::ScalarOp::kMax;
  Raise(absl::InvalidArgumentError("the operation is \"" + name +
                                   "\"; it must be \"sum\", \"mean\", \"min\" or \"max\""));
}

template <typename T>
T LossScalerValue(const nb::dict& state, const char* key) {
  T value{};
  if (!state.contains(key) || !nb::try_cast<T>(state[key], value)) {
    Raise(absl::InvalidArgumentError(
        std::string("the loss scaler's state has no number \"") + key +
        "\": give what loss_scaler() returned"));
  }
  return value;
}

client::LossScalerState ParseLossScaler(const nb::dict& state) {
  client::LossScalerState result;
  result.scale = LossScalerValue<double>(state, "cur_scale");
  result.iterations = LossScalerValue<uint64_t>(state, "cur_iter");
  result.last_overflow = LossScalerValue<int64_t>(state, "last_overflow_iter");
  result.hysteresis = LossScalerValue<uint64_t>(state, "cur_hysteresis");
  return result;
}

// Runs `call` without the GIL. A signal handler that raised meanwhile is heard, whatever came of
// the call.
template <typename Call>
auto WithoutGil(const Call& call) {
  auto result = [&] {
    nb::gil_scoped_release release;
    return call();
  }();
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return result;
}

// Keeps the address range alive for a tensor.
struct Memory {
  std::shared_ptr<const void> range;
};

class PyClient {
 public:
  PyClient(std::unique_ptr<Client> client, std::vector<std::vector<size_t>> shapes)
      : client_(std::move(client)), shapes_(std::move(shapes)) {
    for (const client::UnitView& unit : client_->units()) units_.append(nb::cast(unit));
    for (const client::ParameterView& view : client_->parameters()) {
      parameters_.append(nb::cast(view));
    }
  }
  const nb::list& units() const { return units_; }
  const nb::list& parameters() const { return parameters_; }

  // Keeps the client for the duration of a call: close() may come from another thread.
  std::shared_ptr<Client> Get() const {
    if (client_ == nullptr) {
      Raise(absl::FailedPreconditionError("this client is closed (close() or detach())"));
    }
    return client_;
  }
  bool closed() const { return client_ == nullptr; }
  void Close() {
    std::shared_ptr<Client> client = std::move(client_);
    client_ = nullptr;
    nb::gil_scoped_release release;
    client.reset();
  }

  void Gather(uint32_t unit) const {
    const std::shared_ptr<Client> client = Get();
    if (client->TryGather(unit)) return;
    Check(WithoutGil([&] { return client->Gather(unit); }));
  }

  void Land(uint32_t parameter, uintptr_t data, const std::string& dtype) const {
    const std::shared_ptr<Client> client = Get();
    const DType type = ParseDType(dtype);
    const auto* gradient = reinterpret_cast<const void*>(data);
    const bool known = parameter < client->parameters().size();
    // A parameter without elements has a gradient without an address.
    if (gradient == nullptr && !(known && client->parameters()[parameter].elements == 0)) {
      Raise(absl::InvalidArgumentError("the gradient's address is null"));
    }
    const bool small = known && client->parameters()[parameter].elements <= kKeepGilElements;
    Check(small ? client->Land(parameter, gradient, type)
                : WithoutGil([&] { return client->Land(parameter, gradient, type); }));
  }

  client::StepResult Step(std::vector<client::Group> groups, double max_norm, double loss_scale,
                          bool want_norm, const nb::bytes& blob) const {
    const std::shared_ptr<Client> client = Get();
    client::StepRequest request;
    request.max_norm = max_norm;
    request.loss_scale = loss_scale;
    request.want_norm = want_norm;
    request.groups = std::move(groups);
    request.blob.assign(blob.c_str(), blob.size());
    return Take(WithoutGil([&] { return client->Step(request); }));
  }

  void Put(uint32_t unit, uint64_t begin, uintptr_t data, uint64_t count,
           const std::string& kind) const {
    const std::shared_ptr<Client> client = Get();
    const client::StateKind state = ParseKind(kind);
    Check(WithoutGil([&] {
      return client->Put(unit, begin, reinterpret_cast<const float*>(data), count, state);
    }));
  }

  void Read(uint32_t unit, uint64_t begin, uintptr_t data, uint64_t count,
            const std::string& kind) const {
    const std::shared_ptr<Client> client = Get();
    const client::StateKind state = ParseKind(kind);
    Check(WithoutGil([&] {
      return client->Read(unit, begin, reinterpret_cast<float*>(data), count, state);
    }));
  }

  std::vector<uint64_t> OptimizerSteps() const {
    const std::shared_ptr<Client> client = Get();
    return Take(WithoutGil([&] { return client->ReadProgress(); })).parameter_steps;
  }

  std::optional<nb::dict> LossScaler() const {
    const std::shared_ptr<Client> client = Get();
    const auto progress = Take(WithoutGil([&] { return client->ReadProgress(); }));
    if (!progress.loss_scaler.has_value()) return std::nullopt;
    nb::dict state;
    state["cur_scale"] = progress.loss_scaler->scale;
    state["cur_iter"] = progress.loss_scaler->iterations;
    state["last_overflow_iter"] = progress.loss_scaler->last_overflow;
    state["cur_hysteresis"] = progress.loss_scaler->hysteresis;
    return state;
  }

  void Restore(std::vector<uint64_t> steps, const std::optional<nb::dict>& loss_scaler) const {
    const std::shared_ptr<Client> client = Get();
    client::OptimizerProgress progress;
    progress.parameter_steps = std::move(steps);
    if (loss_scaler.has_value()) progress.loss_scaler = ParseLossScaler(*loss_scaler);
    Check(WithoutGil([&] { return client->Restore(progress); }));
  }

  std::vector<double> AllReduce(const std::vector<double>& values, const std::string& op) const {
    const std::shared_ptr<Client> client = Get();
    const client::ScalarOp scalar_op = ParseOp(op);
    return Take(WithoutGil([&] { return client->AllReduce(values, scalar_op); }));
  }

  void Detach() {
    const std::shared_ptr<Client> client = Get();
    Check(WithoutGil([&] { return client->Detach(); }));
    Close();
  }

  nb::ndarray<nb::pytorch> ParameterTensor(uint32_t parameter) const {
    const std::shared_ptr<Client> client = Get();
    if (parameter >= shapes_.size()) {
      Raise(absl::InvalidArgumentError("there is no parameter " + std::to_string(parameter)));
    }
    const client::ParameterView& view = client->parameters()[parameter];
    // The tensor keeps the address range, not the attachment.
    const nb::object owner = nb::cast(Memory{client->memory()});
    nb::dlpack::dtype dtype;
    dtype.code = static_cast<uint8_t>(client->dtype() == DType::kBFloat16
                                          ? nb::dlpack::dtype_code::Bfloat
                                          : nb::dlpack::dtype_code::Float);
    dtype.bits = client->dtype() == DType::kFloat32 ? 32 : 16;
    dtype.lanes = 1;
    // Not marked read-only: PyTorch has no such tensors and would only warn. The pages are.
    return nb::ndarray<nb::pytorch>(const_cast<void*>(view.data), shapes_[parameter].size(),
                                    shapes_[parameter].data(), owner, nullptr, dtype,
                                    nb::device::cpu::value, 0);
  }

 private:
  std::shared_ptr<Client> client_;
  std::vector<std::vector<size_t>> shapes_;
  nb::list units_;
  nb::list parameters_;
};

std::unique_ptr<PyClient> Attach(std::vector<client::ModuleInfo> modules,
                                 std::vector<client::ParameterInfo> parameters,
                                 const std::vector<std::string>& groups, std::string config,
                                 const std::string& dtype,
                                 std::string address, bool embedded, std::string job,
                                 uint32_t attempt, uint32_t rank, uint32_t world,
                                 uint32_t local_rank, uint32_t local_world, uint32_t node_rank,
                                 std::vector<std::string> peers, std::string job_token,
                                 double attach_timeout_seconds, double takeover_seconds) {
  AttachOptions options;
  options.modules = std::move(modules);
  options.parameters = std::move(parameters);
  for (const std::string& group : groups) options.groups.push_back(ParseOptimizer(group));
  options.config = std::move(config);
  options.dtype = ParseDType(dtype);
  options.address = std::move(address);
  options.embedded = embedded;
  options.job = std::move(job);
  options.attempt = attempt;
  options.rank = rank;
  options.world = world;
  options.local_rank = local_rank;
  options.local_world = local_world;
  options.node_rank = node_rank;
  options.peers = std::move(peers);
  options.job_token = std::move(job_token);
  options.attach_timeout_seconds = attach_timeout_seconds;
  options.takeover_seconds = takeover_seconds;
  options.interrupt = PendingSignal;
  options.on_wait = LogWarning;
  std::vector<std::vector<size_t>> shapes;
  for (const client::ParameterInfo& parameter : options.parameters) {
    shapes.emplace_back(parameter.shape.begin(), parameter.shape.end());
  }
  auto attached = WithoutGil([&] { return Client::Attach(std::move(options)); });
  return std::make_unique<PyClient>(Take(std::move(attached)), std::move(shapes));
}

constexpr std::pair<const char*, double client::Group::*> kNumbers[] = {
    {"lr", &client::Group::lr},
    {"beta1", &client::Group::beta1},
    {"beta2", &client::Group::beta2},
    {"eps", &client::Group::eps},
    {"weight_decay", &client::Group::weight_decay},
    {"momentum", &client::Group::momentum},
    {"dampening", &client::Group::dampening},
    {"lr_decay", &client::Group::lr_decay},
    {"initial_accumulator_value", &client::Group::initial_accumulator_value},
    {"min_coeff", &client::Group::min_coeff},
    {"max_coeff", &client::Group::max_coeff},
    {"alpha", &client::Group::alpha},
    {"rho", &client::Group::rho},
    {"momentum_decay", &client::Group::momentum_decay},
    {"eta_minus", &client::Group::eta_minus},
    {"eta_plus", &client::Group::eta_plus},
    {"step_min", &client::Group::step_min},
    {"step_max", &client::Group::step_max},
    {"lambd", &client::Group::lambd},
    {"t0", &client::Group::t0},
    {"lr_before", &client::Group::lr_before},
};
constexpr std::pair<const char*, bool client::Group::*> kFlags[] = {
    {"decoupled", &client::Group::decoupled},
    {"bias_correction", &client::Group::bias_correction},
    {"nesterov", &client::Group::nesterov},
    {"eps_inside_sqrt", &client::Group::eps_inside_sqrt},
    {"standard_newton_schulz", &client::Group::standard_newton_schulz},
    {"centered", &client::Group::centered},
};

// TypeError for a name that a group has not, and for a value of another type.
client::Group MakeGroup(double lr, const nb::kwargs& values) {
  client::Group group;
  group.lr = lr;
  const auto set = [](const auto& fields, const std::string& name, nb::handle value, auto* out) {
    for (const auto& [known, field] : fields) {
      if (name != known) continue;
      if (!nb::try_cast(value, out->*field)) {
        throw nb::type_error(("Group(): " + name + " has a value of the wrong type").c_str());
      }
      return true;
    }
    return false;
  };
  for (const auto& [key, value] : values) {
    const auto name = nb::cast<std::string>(key);
    if (!set(kNumbers, name, value, &group) && !set(kFlags, name, value, &group)) {
      throw nb::type_error(("Group() has no " + name).c_str());
    }
  }
  return group;
}

void DefineGroup(nb::module_& m) {
  nb::class_<client::Group> group(m, "Group");
  group.def(nb::new_(&MakeGroup), "lr"_a, "values"_a);
  for (const auto& [name, field] : kNumbers) group.def_rw(name, field);
  for (const auto& [name, field] : kFlags) group.def_rw(name, field);
}

void DefineValues(nb::module_& m) {
  nb::class_<Memory>(m, "_Memory");
  nb::class_<client::ModuleInfo>(m, "ModuleInfo")
      .def(nb::new_([](std::string path, std::string type, bool is_container, bool leaf) {
             return client::ModuleInfo{std::move(path), std::move(type), is_container, leaf};
           }),
           "path"_a, "type"_a, "is_container"_a = false, "leaf"_a = false)
      .def_rw("path", &client::ModuleInfo::path)
      .def_rw("type", &client::ModuleInfo::type)
      .def_rw("is_container", &client::ModuleInfo::is_container)
      .def_rw("leaf", &client::ModuleInfo::leaf);
  nb::class_<client::ParameterInfo>(m, "ParameterInfo")
      .def(nb::new_([](std::string name, std::vector<int64_t> shape, bool trainable,
                       uint32_t group, std::vector<std::string> modules) {
             return client::ParameterInfo{std::move(name), std::move(shape), trainable, group,
                                          std::move(modules)};
           }),
           "name"_a, "shape"_a, "trainable"_a = true, "group"_a = 0,
           "modules"_a = std::vector<std::string>())
      .def_rw("name", &client::ParameterInfo::name)
      .def_rw("shape", &client::ParameterInfo::shape)
      .def_rw("trainable", &client::ParameterInfo::trainable)
      .def_rw("group", &client::ParameterInfo::group)
      .def_rw("modules", &client::ParameterInfo::modules);
  nb::class_<client::UnitView>(m, "UnitView")
      .def_ro("name", &client::UnitView::name)
      .def_ro("elements", &client::UnitView::elements)
      .def_ro("trainable_elements", &client::UnitView::trainable_elements)
      .def_ro("resident", &client::UnitView::resident);
  nb::class_<client::ParameterView>(m, "ParameterView")
      .def_ro("unit", &client::ParameterView::unit)
      .def_ro("offset", &client::ParameterView::offset)
      .def_ro("elements", &client::ParameterView::elements)
      .def_prop_ro("address", [](const client::ParameterView& view) {
        return reinterpret_cast<uintptr_t>(view.data);
      });
  nb::class_<client::StepResult>(m, "StepResult")
      .def_ro("skipped", &client::StepResult::skipped)
      .def_ro("grad_norm", &client::StepResult::grad_norm)
      .def_ro("loss_scale", &client::StepResult::loss_scale);
  nb::class_<client::ClientCounters>(m, "Counters")
      .def_ro("gathers", &client::ClientCounters::gathers)
      .def_ro("gather_hits", &client::ClientCounters::gather_hits)
      .def_ro("gather_waits", &client::ClientCounters::gather_waits)
      .def_ro("gather_wait_seconds", &client::ClientCounters::gather_wait_seconds)
      .def_ro("remaps", &client::ClientCounters::remaps)
      .def_ro("scatter_bytes", &client::ClientCounters::scatter_bytes)
      .def_ro("scatter_wait_seconds", &client::ClientCounters::scatter_wait_seconds)
      .def_ro("step_wait_seconds", &client::ClientCounters::step_wait_seconds);
}

void DefineProperties(nb::class_<PyClient>& c) {
  c.def_prop_ro("units", &PyClient::units)
      .def_prop_ro("parameters", &PyClient::parameters)
      .def_prop_ro("generation", [](const PyClient& p) { return p.Get()->generation(); })
      .def_prop_ro("resumed_step", [](const PyClient& p) { return p.Get()->resumed_step(); })
      .def_prop_ro("resumed_skipped",
                   [](const PyClient& p) { return p.Get()->resumed_skipped(); })
      .def_prop_ro("loss_scale", [](const PyClient& p) { return p.Get()->loss_scale(); })
      .def_prop_ro("initialized", [](const PyClient& p) { return p.Get()->initialized(); })
      .def_prop_ro("members", [](const PyClient& p) { return p.Get()->members(); })
      .def_prop_ro("stage", [](const PyClient& p) { return p.Get()->stage(); })
      .def_prop_ro("dtype", [](const PyClient& p) -> std::string {
        const DType dtype = p.Get()->dtype();
        return dtype == DType::kFloat32    ? "float32"
               : dtype == DType::kBFloat16 ? "bfloat16"
                                           : "float16";
      })
      .def_prop_ro("resolved_config", [](const PyClient& p) { return p.Get()->resolved_config(); })
      .def_prop_ro("plan_text", [](const PyClient& p) { return p.Get()->plan_text(); })
      .def_prop_ro("guard_pages", [](const PyClient& p) { return p.Get()->guard_pages(); })
      .def_prop_ro("base",
                   [](const PyClient& p) { return reinterpret_cast<uintptr_t>(p.Get()->base()); })
      .def_prop_ro("reserved_bytes", [](const PyClient& p) { return p.Get()->reserved_bytes(); })
      .def_prop_ro("step_number", [](const PyClient& p) { return p.Get()->step(); })
      .def_prop_ro("closed", &PyClient::closed);
}

void DefineGradients(nb::class_<PyClient>& c) {
  c.def("land", &PyClient::Land, "parameter"_a, "data_ptr"_a, "dtype"_a = "float32")
      .def("scattered",
           [](const PyClient& p, uint32_t unit) {
             const auto client = p.Get();
             return WithoutGil([&] { return client->Scattered(unit); });
           },
           "unit"_a)
      .def("scatter",
           [](const PyClient& p, uint32_t unit, bool last) {
             const auto client = p.Get();
             Check(WithoutGil([&] { return client->Scatter(unit, last); }));
           },
           "unit"_a, "last"_a)
      .def("hand_over",
           [](const PyClient& p, uint32_t unit) {
             const auto client = p.Get();
             return Take(WithoutGil([&] { return client->HandOver(unit); }));
           },
           "unit"_a)
      .def("end_micro_step",
           [](const PyClient& p) {
             const auto client = p.Get();
             Check(WithoutGil([&] { return client->EndMicroStep(); }));
           })
      .def("reclaim",
           [](const PyClient& p, uint32_t unit) {
             const auto client = p.Get();
             Check(WithoutGil([&] { return client->Reclaim(unit); }));
           },
           "unit"_a);
}

}  // namespace

bool PendingSignal() {
  nb::gil_scoped_acquire gil;
  // Once raised it stays so, until the call returns to Python.
  return PyErr_Occurred() != nullptr || PyErr_CheckSignals() != 0;
}

void LogWarning(const std::string& text) {
  nb::gil_scoped_acquire gil;
  if (PyErr_Occurred() != nullptr) return;  // PendingSignal's
  try {
    nb::module_::import_("logging").attr("getLogger")("zerod").attr("warning")("%s", text);
  } catch (nb::python_error& error) {
    // Ctrl-C, or a signal handler's SystemExit, that came meanwhile is for PendingSignal to see.
    if (!error.matches(PyExc_Exception)) {
      error.restore();
    } else {
      error.discard_as_unraisable("the log of zerod");
    }
  }
}

void DefineClient(nb::module_& m) {
  DefineGroup(m);
  DefineValues(m);
  nb::class_<PyClient> c(m, "Client");
  DefineProperties(c);
  DefineGradients(c);
  c.def_static("attach", &Attach, nb::kw_only(), "modules"_a, "parameters"_a,
               "groups"_a = std::vector<std::string>(), "config"_a = "{}", "dtype"_a = "float32",
               "address"_a = "", "embedded"_a = true, "job"_a = "", "attempt"_a = 0,
               "rank"_a = 0, "world"_a = 1, "local_rank"_a = 0, "local_world"_a = 1,
               "node_rank"_a = 0, "peers"_a = std::vector<std::string>(),
               "job_token"_a = "", "attach_timeout_seconds"_a = 60.0,
               "takeover_seconds"_a = 10.0)
      .def("parameter_tensor", &PyClient::ParameterTensor, "parameter"_a)
      .def("gather", &PyClient::Gather, "unit"_a)
      .def("release", [](const PyClient& p, uint32_t unit) { p.Get()->Release(unit); }, "unit"_a)
      .def("release_all", [](const PyClient& p) { p.Get()->ReleaseAll(); })
      .def("held", [](const PyClient& p, uint32_t unit) { return p.Get()->Held(unit); }, "unit"_a)
      .def("step", &PyClient::Step, "groups"_a, nb::kw_only(), "max_norm"_a = 0.0,
           "loss_scale"_a = 1.0, "want_norm"_a = false, "blob"_a = nb::bytes("", 0))
      .def("put", &PyClient::Put, "unit"_a, "begin"_a, "data_ptr"_a, "count"_a,
           "kind"_a = "master")
      .def("read", &PyClient::Read, "unit"_a, "begin"_a, "data_ptr"_a, "count"_a,
           "kind"_a = "master")
      .def("optimizer_steps", &PyClient::OptimizerSteps)
      .def("loss_scaler", &PyClient::LossScaler)
      .def("restore", &PyClient::Restore, "steps"_a, "loss_scaler"_a.none() = nb::none())
      .def("all_reduce", &PyClient::AllReduce, "values"_a, "op"_a = "sum")
      .def("barrier", [](const PyClient& p) { p.AllReduce({}, "sum"); })
      .def("client_state",
           [](const PyClient& p) {
             const std::string blob = Take(p.Get()->ClientState());
             return nb::bytes(blob.data(), blob.size());
           })
      .def("detach", &PyClient::Detach)
      .def("close", &PyClient::Close)
      .def("counters",
           [](const PyClient& p) {
             const auto client = p.Get();
             return WithoutGil([&] { return client->counters(); });
           })
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__", [](PyClient& p, nb::args) { p.Close(); });
}

}  // namespace zerod::python
