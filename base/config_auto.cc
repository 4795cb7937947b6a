// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iterator>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/config_state.h"

namespace zerod {
namespace {

constexpr uint64_t kHiddenSizeMax = 1 << 26;  // its square is below 2^53

constexpr char kTrainBatch[] = "train_batch_size";
constexpr char kMicroBatch[] = "train_micro_batch_size_per_gpu";
constexpr char kAccumulation[] = "gradient_accumulation_steps";

struct HiddenRule {
  const char* path;
  const char* text;
  // In the order of operations of the integrations, to the last bit.
  double (*value)(double h);
};

constexpr HiddenRule kHiddenRules[] = {
    {"zero_optimization.reduce_bucket_size", "hidden_size * hidden_size",
     [](double h) { return h * h; }},
    {"zero_optimization.stage3_prefetch_bucket_size", "0.9 * hidden_size * hidden_size",
     [](double h) { return 0.9 * h * h; }},
    {"zero_optimization.stage3_param_persistence_threshold", "10 * hidden_size",
     [](double h) { return 10 * h; }},
};

struct FixedRule {
  const char* path;
  const char* value;  // JSON text
};

constexpr FixedRule kFixedRules[] = {
    {"gradient_clipping", "1.0"},
    {"zero_optimization.stage3_gather_16bit_weights_on_model_save", "false"},
    {"scheduler.params.warmup_min_lr", "0"},
};

class Resolver {
 public:
  explicit Resolver(ParseState* state) : state_(*state) {}

  void Run() {
    ResolveGivenValues();
    if (values() != nullptr && NeedsHiddenSize()) CheckHiddenSizes();
    for (const std::string& path : AutoPaths()) {
      if (values() == nullptr || !ByRule(path)) unresolved_.push_back(path);
    }
    Report();
  }

 private:
  const AutoValues* values() const {
    return state_.options.auto_values.has_value() ? &*state_.options.auto_values : nullptr;
  }

  bool IsAuto(absl::string_view path) const { return ValueAt(state_.document, path) == "auto"; }

  // Keys and whole blocks whose value is "auto", in the table's order.
  Words AutoPaths() const {
    Words paths;
    std::set<std::string> blocks;
    for (const ConfigKey& key : ConfigKeys()) {
      const std::string path = key.path;
      for (size_t dot = path.find('.'); dot != std::string::npos; dot = path.find('.', dot + 1)) {
        const std::string block = path.substr(0, dot);
        if (blocks.insert(block).second && IsAuto(block)) paths.push_back(block);
      }
      const bool can_choose = Contains(key.choices, "auto");
      if (key.slot != nullptr && !can_choose && IsAuto(path)) paths.push_back(path);
    }
    AddTorchParams(&paths);
    return paths;
  }

  // Parameters of PyTorch's schedulers are not in the table.
  void AddTorchParams(Words* paths) const {
    const Json& params = ValueAt(state_.document, "scheduler.params");
    if (!params.is_object()) return;
    for (const auto& [name, value] : params.items()) {
      const std::string path = absl::StrCat("scheduler.params.", name);
      if (value != "auto" || !IsIdentifier(name) || Contains(*paths, path)) continue;
      if (FindConfigKey(path) == nullptr) paths->push_back(path);
    }
  }

  bool NeedsHiddenSize() const {
    return std::any_of(std::begin(kHiddenRules), std::end(kHiddenRules),
                       [this](const HiddenRule& rule) { return IsAuto(rule.path); });
  }

  void Resolve(const std::string& path, Json value, absl::string_view rule) {
    state_.document[Pointer(path)] = std::move(value);
    state_.SetSource(path, ValueSource::kAuto, std::string(rule));
  }

  // The value is as if left out, so that it follows from others.
  void Derive(const std::string& path, absl::string_view rule) {
    Resolve(path, nullptr, rule);
  }

  void CheckHiddenSizes() {
    for (const uint64_t size : values()->hidden_sizes) {
      if (size == 0 || size > kHiddenSizeMax) {
        state_.problems.Add("hidden_size", absl::StrCat(size, " is not allowed; it must be 1 to ",
                                                        kHiddenSizeMax));
        return;
      }
      hidden_size_ = std::max(hidden_size_, size);
    }
  }

  void ResolveGivenValues() {
    for (const std::string& path : AutoPaths()) {
      state_.parsed.auto_keys.push_back(path);
      if (values() == nullptr) continue;
      const auto found = values()->values.find(path);
      if (found == values()->values.end()) continue;
      Json value = Json::parse(found->second, nullptr, /*allow_exceptions=*/false);
      if (value.is_discarded()) {
        state_.problems.Add(path, absl::StrCat("\"auto\" was given the value ",
                                               Abbreviated(Json(found->second)),
                                               ", which is not JSON"));
        value = nullptr;
      }
      if (value != "auto") Resolve(path, std::move(value), "given by the caller");
    }
  }

  bool ByRule(const std::string& path) {
    for (const HiddenRule& rule : kHiddenRules) {
      if (path != rule.path) continue;
      if (hidden_size_ == 0) {
        needs_hidden_size_ = true;
        return false;
      }
      const double value = rule.value(static_cast<double>(hidden_size_));
      Resolve(path, static_cast<uint64_t>(value),
              absl::StrCat(rule.text, ", hidden_size ", hidden_size_));
      return true;
    }
    for (const FixedRule& rule : kFixedRules) {
      if (path != rule.path) continue;
      Resolve(path, Json::parse(rule.value), "its own rule");
      return true;
    }
    if (path == "scheduler.params.warmup_max_lr") return OfOptimizer(path);
    if (path == kTrainBatch || path == kMicroBatch || path == kAccumulation) {
      const bool known = ValueAt(state_.document, kTrainBatch).is_number() ||
                         ValueAt(state_.document, kMicroBatch).is_number();
      if (known) Derive(path, "micro batch x accumulation steps x ranks");
      return known;
    }
    return false;
  }

  // The optimizer's rate: the configuration's, or of a WarmupLR what it takes by itself.
  bool OfOptimizer(const std::string& path) {
    const Json& rate = ValueAt(state_.document, "optimizer.params.lr");
    if (rate.is_number()) {
      Resolve(path, rate, "optimizer.params.lr");
    } else if (rate.is_null() && ValueAt(state_.document, "scheduler.type") == "WarmupLR") {
      Derive(path, "each group's own rate");
    } else {
      return false;
    }
    return true;
  }

  void Report() {
    if (unresolved_.empty()) return;
    std::string what = absl::StrCat("\"auto\" cannot be resolved for ",
                                    absl::StrJoin(unresolved_, ", "), "; ");
    if (values() == nullptr) {
      absl::StrAppend(&what, "it is for the integrations (Accelerate, Transformers), which come "
                             "later: write ");
    } else {
      absl::StrAppend(&what, needs_hidden_size_ ? "the model's hidden size is not known: " : "",
                      "write ");
    }
    absl::StrAppend(&what, unresolved_.size() == 1 ? "the value" : "the values");
    state_.problems.AddFor(unresolved_, what);
    for (const std::string& path : unresolved_) state_.document[Pointer(path)] = nullptr;
  }

  ParseState& state_;
  uint64_t hidden_size_ = 0;
  bool needs_hidden_size_ = false;
  Words unresolved_;
};

}  // namespace

void ResolveAuto(ParseState* state) { Resolver(state).Run(); }

}  // namespace zerod
