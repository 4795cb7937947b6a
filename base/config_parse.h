// SPDX-License-Identifier: Apache-2.0
//
// Reading a configuration, with where each value came from, what is deprecated, and "auto".
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/config.h"

namespace zerod {

// What "auto" may become. The keys' own rules: reduce_bucket_size is h*h of the hidden size h,
// stage3_prefetch_bucket_size 0.9*h*h, stage3_param_persistence_threshold 10*h; gradient_clipping
// 1.0, stage3_gather_16bit_weights_on_model_save false, warmup_min_lr 0, warmup_max_lr the
// optimizer's lr; a batch key what the other two and the world give.
struct AutoValues {
  std::vector<uint64_t> hidden_sizes;         // of the model; the largest counts
  std::map<std::string, std::string> values;  // dotted path -> JSON text; before any rule
};

struct ParseOptions {
  uint32_t world = 1;
  // The file was written for DeepSpeed, where unknown keys at the top are ignored: they are
  // warnings, not errors. `zerod.strict` in the configuration decides before this.
  bool unknown_top_keys_are_warnings = false;
  // Nothing: every "auto" is an error.
  std::optional<AutoValues> auto_values;
};

// Where a value is from.
struct ValueSource {
  enum Kind { kDefault, kFile, kDeprecated, kAuto, kDerived };
  Kind kind = kDefault;
  std::string detail;  // the deprecated key, the rule; may be empty
};

struct ParsedConfig {
  Config config;
  std::vector<std::string> warnings;           // printable lines, the path in front
  std::map<std::string, ValueSource> sources;  // by dotted path; every key of ToJson
  std::vector<std::string> auto_keys;          // whose value was "auto", in the table's order
};

// Parses and validates `text` (Hjson, see base/hjson.h). null is the same as leaving a key out.
// INVALID_ARGUMENT lists every problem found (beyond 64 their number), one per line: path, value,
// what is allowed, the nearest key for an unknown one. Looks whether paths exist, and reads nothing
// else of the machine.
absl::StatusOr<ParsedConfig> ParseConfig(absl::string_view text, const ParseOptions& options);

// Every key with its value, its source and where it has no effect the reason, for a person.
std::string DescribeConfig(const ParsedConfig& parsed);
// The same as a JSON object: "config", "sources", "warnings", "auto".
std::string DescribeConfigAsJson(const ParsedConfig& parsed);

// The table of docs/config.md.
std::string ConfigKeysAsMarkdown();

}  // namespace zerod
