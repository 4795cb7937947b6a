// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/config_state.h"

namespace zerod {
namespace {

constexpr char kTrainBatch[] = "train_batch_size";
constexpr char kMicroBatch[] = "train_micro_batch_size_per_gpu";
constexpr char kAccumulation[] = "gradient_accumulation_steps";

// Fills in what is missing of the batch triangle, where 0 stands for missing.
void DeriveBatch(ParseState* state) {
  ConfigProblems& problems = state->problems;
  const uint64_t world = state->options.world;
  if (world == 0) return problems.Add("world", "0 is not allowed; a job has at least one rank");
  for (const char* key : {kTrainBatch, kMicroBatch, kAccumulation}) {
    if (problems.Concerns(key)) return;  // nothing follows from a wrong value
    if (!state->Given(key) && state->parsed.sources[key].kind == ValueSource::kDefault) {
      state->SetSource(key, ValueSource::kDerived, "micro batch x accumulation steps x ranks");
    }
  }
  uint64_t& train = state->parsed.config.train_batch_size;
  uint64_t& micro = state->parsed.config.micro_batch_size;
  uint64_t& accumulation = state->parsed.config.gradient_accumulation_steps;
  if (train == 0 && micro == 0) {
    return problems.Add(kTrainBatch, absl::StrCat("is missing; give it or ", kMicroBatch));
  }
  if (train != 0 && micro != 0) {
    if (accumulation == 0) accumulation = train / micro / world;
  } else {
    if (accumulation == 0) accumulation = 1;
    if (train != 0) micro = train / world / accumulation;
  }
  using Wide = unsigned __int128;  // 2^40 x 2^40 x 2^32 at most
  const Wide product = static_cast<Wide>(micro) * accumulation * world;
  const Wide train_max = static_cast<Wide>(FindConfigKey(kTrainBatch)->max);
  if (product > train_max) {
    return problems.Add(
        kTrainBatch, absl::StrCat("is ", kMicroBatch, " ", micro, " x ", kAccumulation, " ",
                                  accumulation, " x ", world, " ranks, which is more than ",
                                  static_cast<uint64_t>(train_max), "; make one of them smaller"));
  }
  if (train == 0) train = static_cast<uint64_t>(product);
  if (product != train) {
    problems.Add(kTrainBatch,
                 absl::StrCat(train, " is not ", kMicroBatch, " ", micro, " x ", kAccumulation,
                              " ", accumulation, " x ", world, " ranks = ",
                              static_cast<uint64_t>(product), "; change one of them"));
  }
}

void CheckPrecision(ParseState* state) {
  const Config& config = state->parsed.config;
  if (config.bf16 && config.fp16.enabled) {
    state->problems.Add("fp16.enabled", "true is not allowed beside bf16.enabled; keep one");
  }
  const std::string enabled = config.fp16.enabled ? "fp16" : config.bf16 ? "bf16" : "fp32";
  const std::string asked = config.data_types.param_dtype.value_or(enabled);
  const std::pair<const char*, const char*> names[] = {
      {"float32", "fp32"}, {"float", "fp32"}, {"float16", "fp16"}, {"half", "fp16"},
      {"bfloat16", "bf16"}};
  const auto name = std::find_if(std::begin(names), std::end(names),
                                 [&asked](const auto& n) { return asked == n.first; });
  if ((name == std::end(names) ? asked : std::string(name->second)) != enabled) {
    state->problems.Add("data_types.param_dtype",
                        absl::StrCat(Quoted(asked), " is not what bf16.enabled and fp16.enabled "
                                     "say, which is ", enabled));
  }
  if (config.zerod.master_remainder && !config.bf16 && !state->problems.Concerns("bf16")) {
    state->problems.Add(
        "zerod.master_remainder",
        "true is not allowed without bf16.enabled: an fp32 window is the master already");
  }
}

void CheckForms(ParseState* state) {
  const Config& config = state->parsed.config;
  if (config.bf16 && config.bf16_options.optimizer_states &&
      !config.bf16_options.master_weights_and_grads) {
    state->problems.Add("bf16.bf16_optimizer_states",
                        "true needs bf16.bf16_master_weights_and_grads true");
  }
}

void CheckNvmePath(absl::string_view block, const std::string& device,
                   const std::optional<std::string>& nvme_path, ParseState* state) {
  const std::string path = absl::StrCat(block, ".nvme_path");
  if (device != "nvme" || state->problems.Concerns(path)) return;
  if (!nvme_path.has_value() || nvme_path->empty()) {
    return state->problems.Add(path, "is missing; device nvme needs the folder that it is to use");
  }
  std::error_code error;
  if (!std::filesystem::is_directory(*nvme_path, error)) {
    state->problems.Add(path, absl::StrCat(Abbreviated(Json(*nvme_path)),
                                           " is not there on this node, or is not a folder"));
  }
}

void CheckOffload(ParseState* state) {
  const Config::ZeroOptimization& zero = state->parsed.config.zero;
  ConfigProblems& problems = state->problems;
  CheckNvmePath("zero_optimization.offload_param", zero.offload_param.device,
                zero.offload_param.nvme_path, state);
  CheckNvmePath("zero_optimization.offload_optimizer", zero.offload_optimizer.device,
                zero.offload_optimizer.nvme_path, state);
  if (problems.Concerns("zero_optimization.stage")) return;
  // Of a part of the state that DeepSpeed leaves on the device below `stages`. Here it is in this
  // node's memory at every stage: what was wanted is so.
  const auto needs = [&zero, &problems, state](absl::string_view key, const std::string& device,
                                        absl::string_view stages) {
    if (device == "cpu") {
      return state->Warn(absl::StrCat("zero_optimization.", key),
                         absl::StrCat("\"cpu\" is so at every stage; DeepSpeed does it at stage ",
                                      stages, " only, and this is ", zero.stage));
    }
    problems.Add(absl::StrCat("zero_optimization.", key),
                 absl::StrCat(Quoted(device), " needs zero_optimization.stage ", stages,
                              ", and it is ", zero.stage, "; DeepSpeed would not do it either, "
                              "without a word"));
  };
  if (zero.offload_param.device != "none" && zero.stage != 3) {
    needs("offload_param.device", zero.offload_param.device, "3");
  }
  if (zero.offload_optimizer.device == "nvme" && zero.stage != 3) {
    needs("offload_optimizer.device", "nvme", "3");
  } else if (zero.offload_optimizer.device != "none" && zero.stage == 0) {
    needs("offload_optimizer.device", zero.offload_optimizer.device, "1, 2 or 3");
  }
  if (zero.offload_optimizer.ratio < 1 && zero.stage != 3) {
    problems.Add("zero_optimization.offload_optimizer.ratio",
                 absl::StrCat(Json(zero.offload_optimizer.ratio).dump(),
                              " needs zero_optimization.stage 3, and it is ", zero.stage));
  }
}

void CheckZeroPlusPlus(ParseState* state) {
  const Config::ZeroOptimization& zero = state->parsed.config.zero;
  ConfigProblems& problems = state->problems;
  if (problems.Concerns("zero_optimization.stage")) return;
  const uint64_t hpz = zero.hpz_partition_size;
  if (hpz > 1 && state->options.world % hpz != 0) {
    problems.Add("zero_optimization.zero_hpz_partition_size",
                 absl::StrCat(hpz, " does not divide the ", state->options.world, " ranks"));
  }
  const std::pair<const char*, bool> keys[] = {
      {"zero_hpz_partition_size", hpz > 1},
      {"zero_quantized_weights", zero.quantized_weights},
      {"zero_quantized_nontrainable_weights", zero.quantized_nontrainable_weights},
      {"zero_quantized_gradients", zero.quantized_gradients},
  };
  for (const auto& [name, on] : keys) {
    if (!on || zero.stage == 3) continue;
    problems.Add(absl::StrCat("zero_optimization.", name),
                 absl::StrCat("needs zero_optimization.stage 3, and it is ", zero.stage));
  }
}

// Whether `block` is there, with a type that nothing is wrong with. Adds a problem where there is
// none.
bool HasType(const char* block, absl::string_view advice, ParseState* state) {
  if (!ValueAt(state->document, block).is_object()) return false;
  const std::string path = absl::StrCat(block, ".type");
  if (state->Given(path) || state->problems.Concerns(path)) return true;
  state->problems.Add(path, absl::StrCat("is missing; ", advice));
  return false;
}

void SetByType(ParseState* state, const char* path, double* value, double of_type) {
  if (!state->Given(path) && !state->problems.Concerns(path)) *value = of_type;
}

// torch.optim's own defaults, of the classes that DeepSpeed takes from there by name, and what the
// constructor of such a class would refuse.
void ResolveTorchOptimizer(ParseState* state) {
  Config::Optimizer& optimizer = state->parsed.config.optimizer;
  constexpr std::pair<absl::string_view, double> kRates[] = {
      {"Adagrad", 1e-2}, {"RMSprop", 1e-2}, {"Adadelta", 1.0}, {"Adamax", 2e-3},
      {"NAdam", 2e-3},   {"ASGD", 1e-2},    {"Rprop", 1e-2},
  };
  for (const auto& [type, lr] : kRates) {
    if (optimizer.type == type) SetByType(state, "optimizer.params.lr", &optimizer.lr, lr);
  }
  if (optimizer.type == "Adadelta") {
    SetByType(state, "optimizer.params.eps", &optimizer.eps, 1e-6);
  }
  if (optimizer.type == "ASGD") {
    SetByType(state, "optimizer.params.alpha", &optimizer.alpha, 0.75);
  }
  if (!(0 < optimizer.eta_minus && optimizer.eta_minus < 1 && 1 < optimizer.eta_plus)) {
    state->problems.Add("optimizer.params.etas",
                        "must be one above 0 and below 1, and one above 1");
  }
}

void ResolveOptimizer(ParseState* state) {
  if (!HasType("optimizer",
               "it may be \"AdamW\"; or leave out \"optimizer\" and pass one", state)) {
    return;
  }
  Config::Optimizer& optimizer = state->parsed.config.optimizer;
  const auto by_type = [state](const char* path, double* value, double of_type) {
    SetByType(state, path, value, of_type);
  };
  if (optimizer.type == "AdamW" && optimizer.torch_adam) {
    by_type("optimizer.params.weight_decay", &optimizer.weight_decay, 0.01);
  }
  if (optimizer.type == "Adagrad") {
    by_type("optimizer.params.eps", &optimizer.eps, 1e-10);
  }
  ResolveTorchOptimizer(state);
  if (optimizer.type == "SGD" && optimizer.nesterov &&
      (optimizer.momentum == 0 || optimizer.dampening != 0)) {
    state->problems.Add("optimizer.params.nesterov",
                        "true needs a momentum, and no dampening");
  }
  if (optimizer.type == "Lamb" && optimizer.min_coeff > optimizer.max_coeff) {
    state->problems.Add("optimizer.params.min_coeff", "is above max_coeff");
  }
  if (optimizer.type == "Muon") {
    by_type("optimizer.params.momentum", &optimizer.momentum, 0.95);
    if (optimizer.momentum >= 1) {
      state->problems.Add("optimizer.params.momentum", "must be below 1 for Muon");
    }
    by_type("optimizer.params.betas", &optimizer.beta2, 0.95);
    by_type("optimizer.params.eps", &optimizer.eps, 1e-10);
    const bool has_rate = state->Given("optimizer.params.lr");
    if (!optimizer.muon_lr.has_value()) optimizer.muon_lr = has_rate ? optimizer.lr : 0.02;
    if (!optimizer.adam_lr.has_value()) optimizer.adam_lr = has_rate ? optimizer.lr : 3e-4;
  }
}

// The first pair of rates of which the lower is above the upper, or nothing.
std::optional<std::pair<double, double>> FirstInverted(const Rates& low, const Rates& high) {
  const size_t groups = std::max(low.values.size(), high.values.size());
  for (size_t i = 0; i < groups; ++i) {
    const double lower = low.values[low.per_group ? i : 0];
    const double upper = high.values[high.per_group ? i : 0];
    if (lower > upper) return std::pair(lower, upper);
  }
  return std::nullopt;
}

// The rate that a warm-up ends at: WarmupLR's is each group's own where none is given.
void ResolveWarmup(ParseState* state) {
  constexpr char kMin[] = "scheduler.params.warmup_min_lr";
  constexpr char kMax[] = "scheduler.params.warmup_max_lr";
  constexpr double kMaxOfDecay = 0.001;
  Config::Scheduler& scheduler = state->parsed.config.scheduler;
  if (!state->Given(kMax) && !state->problems.Concerns(kMax)) {
    if (scheduler.type != "WarmupLR") {
      scheduler.warmup_max_lr = kMaxOfDecay;
    } else if (state->parsed.sources[kMax].kind == ValueSource::kDefault) {
      state->SetSource(kMax, ValueSource::kDerived, "each group's own rate");
    }
  }
  if (!scheduler.warmup_max_lr.has_value() || state->problems.Concerns(kMin)) return;
  const Rates& low = scheduler.warmup_min_lr;
  const Rates& high = *scheduler.warmup_max_lr;
  if (low.per_group && high.per_group && low.values.size() != high.values.size()) {
    return state->problems.Add(kMin, absl::StrCat("has ", low.values.size(),
                                                  " values and warmup_max_lr has ",
                                                  high.values.size(),
                                                  "; each parameter group needs one"));
  }
  if (const auto inverted = FirstInverted(low, high); inverted.has_value()) {
    state->problems.Add(kMin, absl::StrCat(Json(inverted->first).dump(),
                                           " is not allowed; it must be at most warmup_max_lr, "
                                           "which is ", Json(inverted->second).dump()));
  }
}

void CheckScheduler(ParseState* state) {
  if (!HasType("scheduler",
               "name one of DeepSpeed's or PyTorch's, or leave out \"scheduler\" for a constant "
               "learning rate", state)) {
    return;
  }
  const Config::Scheduler& scheduler = state->parsed.config.scheduler;
  const auto require = [state](const char* path, bool has) {
    if (has || state->problems.Concerns(path)) return;
    state->problems.Add(path, absl::StrCat("is missing; ", state->parsed.config.scheduler.type,
                                           " needs it"));
  };
  if (scheduler.type == "WarmupLR" || scheduler.type == "WarmupDecayLR") ResolveWarmup(state);
  if (scheduler.type == "WarmupDecayLR" || scheduler.type == "WarmupCosineLR") {
    require("scheduler.params.total_num_steps", scheduler.total_num_steps.has_value());
    if (scheduler.total_num_steps.value_or(kCountMax) < scheduler.warmup_num_steps) {
      state->Warn("scheduler.params.total_num_steps",
                  absl::StrCat(*scheduler.total_num_steps, " is less than warmup_num_steps ",
                               scheduler.warmup_num_steps, ": the warm-up does not end in time"));
    }
  } else if (scheduler.type == "OneCycle") {
    require("scheduler.params.cycle_min_lr", scheduler.cycle_min_lr.has_value());
    require("scheduler.params.cycle_max_lr", scheduler.cycle_max_lr.has_value());
  }
}

// Whether the key that this one depends on is refused: one problem is enough.
bool RefusedWithAnother(const ConfigKey& key, const ParseState& state) {
  if (absl::StartsWith(key.path, "optimizer.params.")) {
    return state.problems.Concerns("optimizer.type");
  }
  if (absl::StartsWith(key.path, "scheduler.params.")) {
    return state.problems.Concerns("scheduler.type");
  }
  return key.gate != nullptr &&
         std::any_of(key.gate->switches.begin(), key.gate->switches.end(),
                     [&state](const std::string& path) { return state.problems.Concerns(path); });
}

// Of a given value of `key`: whether it is one that the configuration's type does not have.
bool RefusedByType(const ConfigKey& key, ParseState* state) {
  const Config& config = state->parsed.config;
  if (key.types.empty() || IsOfType(key, config)) return false;
  const bool scheduler = absl::StartsWith(key.path, "scheduler.");
  const std::string& type = scheduler ? config.scheduler.type : config.optimizer.type;
  if (type.empty()) return true;  // which is a problem of its own
  state->problems.Add(key.path, absl::StrCat("is not a parameter of ", type, "; it is one of ",
                                             AnyOf(key.types)));
  return true;
}

}  // namespace

void CheckRules(ParseState* state) {
  DeriveBatch(state);
  Config& config = state->parsed.config;
  if (config.gradient_clipping < 0) config.gradient_clipping = 0;
  CheckPrecision(state);
  CheckForms(state);
  CheckOffload(state);
  CheckZeroPlusPlus(state);
  ResolveOptimizer(state);
  CheckScheduler(state);
}

void CheckServed(ParseState* state) {
  Config& config = state->parsed.config;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.slot == nullptr || !state->Given(key.path)) continue;
    if (state->problems.Concerns(key.path) || RefusedWithAnother(key, *state)) continue;
    if (RefusedByType(key, state)) continue;
    if (key.served != Served::kNotYet && key.served != Served::kNever) continue;
    const Json value = WriteKey(key, config);
    if (value == DefaultOf(key) || IsGatedOff(key, config)) continue;
    if (key.also != nullptr && value == Json::parse(key.also)) continue;
    const bool later = key.served == Served::kNotYet;
    state->problems.Add(key.path,
                        absl::StrCat(Abbreviated(value), later ? " is not served yet: "
                                                               : " is not served: ",
                                     key.note, "; leave it out, which means ",
                                     Abbreviated(DefaultOf(key))));
  }
}

}  // namespace zerod
