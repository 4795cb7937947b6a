// SPDX-License-Identifier: Apache-2.0
#include "base/config_keys.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace zerod {
namespace {

// Whole numbers up to here are exact in JSON's doubles, and 16 bytes for each count in 64 bits.
constexpr double kCountMax = 9007199254740992.0;  // 2^53
// Small enough that the product of two and a world of 2^32 fits 128 bits.
constexpr double kBatchMax = 1099511627776.0;  // 2^40
constexpr double kSecondsMax = 1e9;            // as nanoseconds it fits 63 bits
constexpr double kRealMax = std::numeric_limits<double>::max();
constexpr size_t kNameBytesMax = 1024;
constexpr size_t kJobBytesMax = 128;

std::vector<ServedKey> MakeServedKeys() {
  using C = Config;
  return {
      {"train_batch_size", [](C& c) -> Slot { return &c.train_batch_size; }, 1, kBatchMax},
      {"train_micro_batch_size_per_gpu", [](C& c) -> Slot { return &c.micro_batch_size; }, 1,
       kBatchMax},
      {"gradient_accumulation_steps",
       [](C& c) -> Slot { return &c.gradient_accumulation_steps; }, 1, kBatchMax},
      {"gradient_clipping", [](C& c) -> Slot { return &c.gradient_clipping; }, -kRealMax,
       kRealMax},
      {"bf16.enabled", [](C& c) -> Slot { return &c.bf16; }},

      {"zero_optimization.stage", [](C& c) -> Slot { return &c.zero.stage; }, 0, 3},
      {"zero_optimization.stage3_max_live_parameters",
       [](C& c) -> Slot { return &c.zero.max_live_parameters; }, 1, kCountMax},
      {"zero_optimization.stage3_param_persistence_threshold",
       [](C& c) -> Slot { return &c.zero.param_persistence_threshold; }, 0, kCountMax},
      {"zero_optimization.stage3_prefetch_bucket_size",
       [](C& c) -> Slot { return &c.zero.prefetch_bucket_size; }, 0, kCountMax},

      {"optimizer.type", [](C& c) -> Slot { return &c.optimizer.type; }, 0, 0, false, {"AdamW"}},
      {"optimizer.params.lr", [](C& c) -> Slot { return &c.optimizer.lr; }, 0, kRealMax},
      {"optimizer.params.betas",
       [](C& c) -> Slot { return Betas(&c.optimizer.beta1, &c.optimizer.beta2); }, 0, 1, true},
      {"optimizer.params.eps", [](C& c) -> Slot { return &c.optimizer.eps; }, 0, kRealMax},
      {"optimizer.params.weight_decay", [](C& c) -> Slot { return &c.optimizer.weight_decay; }, 0,
       kRealMax},

      {"scheduler.type", [](C& c) -> Slot { return &c.scheduler.type; }, 0, 0, false,
       {"WarmupLR"}},
      {"scheduler.params.warmup_min_lr", [](C& c) -> Slot { return &c.scheduler.warmup_min_lr; },
       0, kRealMax},
      {"scheduler.params.warmup_max_lr", [](C& c) -> Slot { return &c.scheduler.warmup_max_lr; },
       0, kRealMax},
      {"scheduler.params.warmup_num_steps",
       [](C& c) -> Slot { return &c.scheduler.warmup_num_steps; }, 1, kCountMax},
      {"scheduler.params.warmup_type", [](C& c) -> Slot { return &c.scheduler.warmup_type; }, 0, 0,
       false, {"log", "linear"}},

      {"zerod.units", [](C& c) -> Slot { return &c.zerod.units; }},
      {"zerod.gradient_plan", [](C& c) -> Slot { return &c.zerod.gradient_plan; }, 0, 0, false,
       {"auto", "per_rank", "node_sum"}},
      {"zerod.guard_pages", [](C& c) -> Slot { return &c.zerod.guard_pages; }},
      {"zerod.master_remainder", [](C& c) -> Slot { return &c.zerod.master_remainder; }},
      {"zerod.step_timeout_seconds", [](C& c) -> Slot { return &c.zerod.step_timeout_seconds; }, 0,
       kSecondsMax},
      {"zerod.attach_timeout_seconds",
       [](C& c) -> Slot { return &c.zerod.attach_timeout_seconds; }, 0.001, kSecondsMax},
      {"zerod.linger_seconds", [](C& c) -> Slot { return &c.zerod.linger_seconds; }, 0,
       kSecondsMax},
      {"zerod.window_bytes_max", [](C& c) -> Slot { return &c.zerod.window_bytes_max; }, 0,
       kCountMax},
      {"zerod.client_state_bytes_max",
       [](C& c) -> Slot { return &c.zerod.client_state_bytes_max; }, 1, 1 << 30},
      {"zerod.staging_bytes", [](C& c) -> Slot { return &c.zerod.staging_bytes; }, 0, kCountMax},
      {"zerod.job", [](C& c) -> Slot { return &c.zerod.job; }},
      {"zerod.unused_parameters", [](C& c) -> Slot { return &c.zerod.unused_parameters; }, 0, 0,
       false, {"torch", "zero"}},
  };
}

using Words = std::vector<std::string>;

// DeepSpeed 0.19's keys by the block that they are in. One that becomes served moves to the table
// above.
const Words& UnservedKeys(absl::string_view block) {
  static const auto& words = *new std::map<std::string, Words>{  // tidy: allow (never destroyed)
      {"",
       {"activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "comet",
        "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
        "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
        "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
        "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine", "log_level",
        "managed_gradient_accumulation", "memory_breakdown", "monitor_config", "pipeline",
        "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print",
        "tensor_parallel", "tensorboard", "timers", "torch_autocast",
        "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb",
        "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}},
      {"bf16",
       {"bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow",
        "immediate_grad_update"}},
      {"zero_optimization",
       {"allgather_bucket_size", "allgather_partitions", "compute_grad_norm",
        "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",
        "elastic_checkpoint", "enable_sanity_checks", "ignore_unused_parameters", "leaf_module",
        "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
        "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm",
        "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint",
        "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
        "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
        "zero_quantized_weights"}},
      {"optimizer", {"legacy_fusion"}},
      {"optimizer.params",
       {"adam_w_mode", "amsgrad", "bias_correction", "capturable", "differentiable", "foreach",
        "fp32_optimizer_states", "fused", "max_grad_norm", "maximize", "set_grad_none",
        "torch_adam"}},
      {"scheduler.params", {"last_batch_iteration"}},
      {"optimizer.type",
       {"Adagrad", "Adam", "Lamb", "Lion", "MuAdam", "MuAdamW", "MuSGD", "Muon", "SGD"}},
      {"scheduler.type", {"LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR"}},
  };
  static const Words& none = *new Words;  // tidy: allow (never destroyed)
  const auto found = words.find(std::string(block));
  return found == words.end() ? none : found->second;
}

// What DeepSpeed 0.19 itself refuses.
const Words& RemovedKeys(absl::string_view block) {
  static const Words& top = *new Words{  // tidy: allow (never destroyed)
      "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity",
      "graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training",
      "sparse_attention", "sparse_gradients"};
  static const Words& zero = *new Words{  // tidy: allow (never destroyed)
      "mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param"};
  static const Words& none = *new Words;  // tidy: allow (never destroyed)
  return block.empty() ? top : block == "zero_optimization" ? zero : none;
}

bool Contains(const Words& words, absl::string_view word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string Quoted(const std::string& word) { return absl::StrCat("\"", word, "\""); }

std::string AnyOf(const Words& words) {
  return absl::StrJoin(words, " or ", [](std::string* out, const std::string& word) {
    absl::StrAppend(out, Quoted(word));
  });
}

// The names directly within `block`, blocks included, in the table's order.
Words ServedNames(absl::string_view block) {
  Words names;
  for (const ServedKey& key : ServedKeys()) {
    absl::string_view path = key.path;
    if (!block.empty()) {
      if (!absl::StartsWith(path, absl::StrCat(block, "."))) continue;
      path.remove_prefix(block.size() + 1);
    }
    std::string name(path.substr(0, path.find('.')));
    if (!Contains(names, name)) names.push_back(std::move(name));
  }
  return names;
}

// A served key of this name in another block, or null.
const char* ServedElsewhere(absl::string_view name) {
  for (const ServedKey& key : ServedKeys()) {
    const absl::string_view path = key.path;
    if (path == name || absl::EndsWith(path, absl::StrCat(".", name))) return key.path;
  }
  return nullptr;
}

// Reads one value into the slot of one key.
class Reader {
 public:
  Reader(const ServedKey& key, const Json& value, ConfigProblems* problems)
      : key_(key), value_(value), problems_(problems) {}

  void operator()(uint64_t* out) const { ReadWhole(out); }
  void operator()(uint32_t* out) const { ReadWhole(out); }

  void operator()(double* out) const {
    if (!ReadReal(value_, out)) RefuseNumber("a number");
  }

  void operator()(bool* out) const {
    if (value_.is_boolean()) {
      *out = value_.get<bool>();
    } else if (value_ == 0 || value_ == 1) {
      *out = value_ == 1;
    } else {
      Refuse("true or false");
    }
  }

  void operator()(std::string* out) const {
    if (key_.choices.empty()) {
      ReadJob(out);
      return;
    }
    const size_t choice = Choice();
    if (choice < key_.choices.size()) *out = key_.choices[choice];
  }

  void operator()(GradientPlanChoice* out) const {
    const size_t choice = Choice();
    if (choice < key_.choices.size()) *out = static_cast<GradientPlanChoice>(choice);
  }

  void operator()(Betas out) const {
    double beta1 = 0;
    double beta2 = 0;
    if (value_.is_array() && value_.size() == 2 && ReadReal(value_[0], &beta1) &&
        ReadReal(value_[1], &beta2)) {
      *out.first = beta1;
      *out.second = beta2;
    } else {
      Refuse("two numbers of at least 0 and less than 1, for example [0.9, 0.999]");
    }
  }

  void operator()(Units* out) const {
    Units units;
    if (value_.is_array()) {
      for (const Json& module : value_) {
        if (!IsName(module)) return RefuseUnits(module);
        const std::string path = module.get<std::string>();
        if (!units.emplace(path, path).second) {
          return problems_->Add(key_.path, Abbreviated(module) + " is listed twice; keep one");
        }
      }
    } else if (value_.is_object()) {
      for (const auto& [path, name] : value_.items()) {
        if (!IsName(Json(path))) return RefuseUnits(Json(path));
        if (!IsName(name)) return RefuseUnits(name);
        units.emplace(path, name.get<std::string>());
      }
    } else {
      return RefuseUnits(value_);
    }
    *out = std::move(units);
  }

 private:
  void Refuse(absl::string_view allowed) const {
    problems_->Add(key_.path, absl::StrCat(Abbreviated(value_), " is not allowed; it must be ",
                                           allowed));
  }

  void RefuseUnits(const Json& part) const {
    problems_->Add(key_.path,
                   absl::StrCat(Abbreviated(part),
                                " is not allowed; it must be a list of module paths, or an object "
                                "of module paths and unit names, each a string of 1 to ",
                                kNameBytesMax, " bytes without control characters"));
  }

  // `noun` is "a number" or "a whole number".
  void RefuseNumber(absl::string_view noun) const {
    const auto text = [](double v) { return Json(v).dump(); };
    const auto whole = [](double v) { return std::to_string(static_cast<uint64_t>(v)); };
    const bool is_whole = noun != "a number";
    const bool has_max = key_.max < kRealMax;
    if (key_.min == -kRealMax) return Refuse(noun);
    std::string allowed = absl::StrCat(noun, has_max ? " from " : " of at least ",
                                       is_whole ? whole(key_.min) : text(key_.min));
    if (has_max) absl::StrAppend(&allowed, " to ", is_whole ? whole(key_.max) : text(key_.max));
    Refuse(allowed);
  }

  bool InRange(double v) const {
    return std::isfinite(v) && v >= key_.min && (key_.max_excluded ? v < key_.max : v <= key_.max);
  }

  bool ReadReal(const Json& value, double* out) const {
    if (!value.is_number()) return false;
    const double v = value.get<double>();
    if (!InRange(v)) return false;
    *out = v + 0.0;  // makes 0 of -0: equal configurations have equal texts
    return true;
  }

  template <class T>
  void ReadWhole(T* out) const {
    // No limit is above 2^53, so a double decides exactly what is within.
    if (value_.is_number()) {
      const double v = value_.get<double>();
      if (InRange(v) && std::trunc(v) == v) {
        *out = value_.is_number_float() ? static_cast<T>(v) : value_.get<T>();
        return;
      }
    }
    RefuseNumber("a whole number");
  }

  // The index in key_.choices, or their number after a problem. The case of an optimizer's name
  // does not matter to DeepSpeed; that of a scheduler's does.
  size_t Choice() const {
    if (value_.is_string()) {
      const auto& word = value_.get_ref<const std::string&>();
      const bool any_case = absl::string_view(key_.path) == "optimizer.type";
      for (size_t i = 0; i < key_.choices.size(); ++i) {
        if (word == key_.choices[i]) return i;
        if (any_case && absl::EqualsIgnoreCase(word, key_.choices[i])) return i;
      }
      for (const std::string& unserved : UnservedKeys(key_.path)) {
        if (word != unserved && !(any_case && absl::EqualsIgnoreCase(word, unserved))) continue;
        problems_->Add(key_.path, absl::StrCat(Quoted(unserved), " is not served yet; it must be ",
                                               AnyOf(key_.choices)));
        return key_.choices.size();
      }
    }
    Refuse(AnyOf(key_.choices));
    return key_.choices.size();
  }

  void ReadJob(std::string* out) const {
    if (value_.is_string()) {
      const auto& job = value_.get_ref<const std::string&>();
      const bool plain = std::all_of(job.begin(), job.end(), [](char c) {
        return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
      });
      if (plain && job.size() <= kJobBytesMax) {
        *out = job;
        return;
      }
    }
    Refuse(absl::StrCat("a string of at most ", kJobBytesMax,
                        " letters, digits, dots, dashes and underscores"));
  }

  static bool IsName(const Json& value) {
    if (!value.is_string()) return false;
    const auto& name = value.get_ref<const std::string&>();
    return !name.empty() && name.size() <= kNameBytesMax &&
           std::none_of(name.begin(), name.end(), [](char c) { return absl::ascii_iscntrl(c); });
  }

  const ServedKey& key_;
  const Json& value_;
  ConfigProblems* problems_;
};

struct Writer {
  const ServedKey& key;
  Json operator()(GradientPlanChoice* plan) const {
    const size_t choice = static_cast<size_t>(*plan);
    CHECK_LT(choice, key.choices.size());
    return key.choices[choice];
  }
  Json operator()(Betas betas) const { return Json::array({*betas.first, *betas.second}); }
  template <class T>
  Json operator()(T* value) const {
    return Json(*value);
  }
};

}  // namespace

const std::vector<ServedKey>& ServedKeys() {
  static const auto& keys = *new std::vector<ServedKey>(  // tidy: allow (never destroyed)
      MakeServedKeys());
  return keys;
}

const ServedKey* FindServedKey(absl::string_view path) {
  for (const ServedKey& key : ServedKeys()) {
    if (path == key.path) return &key;
  }
  return nullptr;
}

bool IsServedBlock(absl::string_view path) {
  const std::string prefix = absl::StrCat(path, ".");
  return std::any_of(ServedKeys().begin(), ServedKeys().end(), [&prefix](const ServedKey& key) {
    return absl::StartsWith(key.path, prefix);
  });
}

void ReadKey(const ServedKey& key, const Json& value, Config* config, ConfigProblems* problems) {
  if (value == "auto" && !Contains(key.choices, "auto")) {
    problems->Add(key.path, kAutoIsLater);
    return;
  }
  std::visit(Reader(key, value, problems), key.slot(*config));
}

Json WriteKey(const ServedKey& key, Config& config) {
  return std::visit(Writer{key}, key.slot(config));
}

void RefuseKey(absl::string_view block, const std::string& key, ConfigProblems* problems) {
  const std::string path = JoinPath(block, key);
  const Words& unserved = UnservedKeys(block);
  if (Contains(unserved, key)) return problems->Add(path, "is not served yet; leave it out");
  if (Contains(RemovedKeys(block), key)) {
    return problems->Add(path, "was removed from DeepSpeed and is not served; leave it out");
  }
  if (const char* elsewhere = ServedElsewhere(key)) {
    return problems->Add(path, absl::StrCat("is not a key here; did you mean ", elsewhere, "?"));
  }
  Words known = ServedNames(block);
  const std::string served = absl::StrJoin(known, ", ");
  known.insert(known.end(), unserved.begin(), unserved.end());
  const std::string nearest = NearestWord(key, known);
  if (nearest.empty()) {
    problems->Add(path, absl::StrCat("is not a known key; the keys here are ", served));
  } else if (Contains(unserved, nearest)) {
    problems->Add(path, absl::StrCat("is not a known key; the nearest is ", Quoted(nearest),
                                     ", which is not served yet"));
  } else {
    problems->Add(path, absl::StrCat("is not a known key; did you mean ", Quoted(nearest), "?"));
  }
}

}  // namespace zerod
