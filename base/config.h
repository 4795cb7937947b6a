// SPDX-License-Identifier: Apache-2.0
//
// The job's configuration: DeepSpeed's JSON as typed, validated values. One parser for the daemon,
// the tools and (through the extension module) Python. A key that nothing serves yet is an error
// that names the key, and for a misspelt one the nearest served key.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace zerod {

enum class GradientPlanChoice { kAuto, kPerRank, kNodeSum };

struct Config {
  // The batch triangle; after Parse all three are positive and
  // train_batch_size == micro_batch_size * gradient_accumulation_steps * world.
  uint64_t train_batch_size = 0;
  uint64_t micro_batch_size = 0;  // train_micro_batch_size_per_gpu
  uint64_t gradient_accumulation_steps = 0;

  // Maximum L2 norm; 0: none (Parse makes 0 of a negative one). DeepSpeed 0.19's default is 1.0.
  double gradient_clipping = 1.0;
  bool bf16 = false;               // bf16.enabled

  struct ZeroOptimization {
    uint32_t stage = 0;                              // 0..3
    uint64_t max_live_parameters = 1000000000;       // stage3_max_live_parameters, elements
    uint64_t param_persistence_threshold = 100000;   // stage3_param_persistence_threshold, elements
    uint64_t prefetch_bucket_size = 50000000;        // stage3_prefetch_bucket_size, elements
    friend bool operator==(const ZeroOptimization&, const ZeroOptimization&) = default;
  } zero;

  struct Optimizer {
    std::string type;  // "AdamW", or empty: the caller passes an optimizer
    double lr = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double eps = 1e-8;
    double weight_decay = 0.01;
    friend bool operator==(const Optimizer&, const Optimizer&) = default;
  } optimizer;

  struct Scheduler {
    std::string type;  // "WarmupLR" or empty: constant
    double warmup_min_lr = 0.0;
    double warmup_max_lr = 0.001;  // where the key is left out: optimizer.params.lr
    uint64_t warmup_num_steps = 1000;
    std::string warmup_type = "log";  // "log" or "linear"
    friend bool operator==(const Scheduler&, const Scheduler&) = default;
  } scheduler;

  // The block "zerod": what DeepSpeed has no word for.
  struct Zerod {
    std::map<std::string, std::string> units;  // module path -> unit name ("zerod.units": a list of
                                               // module paths, or an object path -> unit name)
    GradientPlanChoice gradient_plan = GradientPlanChoice::kAuto;  // "auto", "per_rank", "node_sum"
    bool guard_pages = true;                   // released units fault loudly
    bool master_remainder = false;             // bf16: fp32 master as window + 16-bit remainder
    double step_timeout_seconds = 0;           // 0: none
    double attach_timeout_seconds = 600;       // how long a forming job waits for its ranks
    double linger_seconds = 600;               // how long state waits for trainers that died
    uint64_t window_bytes_max = 0;  // the window never grows beyond; 0: the whole layout's size
    uint64_t client_state_bytes_max = 8 << 20;  // bound on each client's state blob, 1..2^30
    uint64_t staging_bytes = 0;                 // node_sum, per client; 0: two of the largest unit
    std::string job;  // job id, [A-Za-z0-9._-]{1,128}; empty: ZEROD_JOB and so on
    std::string unused_parameters = "torch";   // "torch": not updated; "zero": DeepSpeed's

    friend bool operator==(const Zerod&, const Zerod&) = default;
  } zerod;

  friend bool operator==(const Config&, const Config&) = default;

  // Parses and validates `json` (strict JSON, comments allowed, at most 1 MiB) for a job of `world`
  // ranks. null is the same as leaving a served key out. INVALID_ARGUMENT lists every problem
  // found (beyond 64 their number), one per line: path, value, what is allowed.
  static absl::StatusOr<Config> Parse(absl::string_view json, uint32_t world);

  // Every served key with its value, as JSON text with sorted keys: equal configurations give
  // equal texts, and Parse of it for the same world gives this configuration back. "optimizer" and
  // "scheduler" are null where their type is empty.
  std::string ToJson() const;
};

// The element of `known` with the smallest edit distance to `word` (the first of equals), or empty
// where none is near enough (distance > 1/2 of the word's length) to be what the user meant.
std::string NearestWord(absl::string_view word, const std::vector<std::string>& known);

}  // namespace zerod
