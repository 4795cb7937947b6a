// SPDX-License-Identifier: Apache-2.0
//
// Random damage to a full configuration, from one fixed seed. Whatever comes in, Parse either
// refuses it with printable lines or gives a configuration that survives ToJson and back.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "base/config_parse.h"

namespace zerod {
namespace {

constexpr uint32_t kSeed = 20260801;
constexpr int kRounds = 20000;

// In the strict form of JSON, and in the lenient one with much that is not served.
const char kWhole[] = R"({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": 3, "gradient_clipping": 0.5, "bf16": {"enabled": true},
  "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 2e8,
    "stage3_param_persistence_threshold": 1e4, "stage3_prefetch_bucket_size": 0},
  "optimizer": {"type": "AdamW",
    "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 2e-4,
    "warmup_num_steps": 10, "warmup_type": "linear"}},
  "zerod": {"units": {"h.0": "first"}, "gradient_plan": "node_sum", "guard_pages": false,
    "step_timeout_seconds": 1.5, "window_bytes_max": 1048576, "job": "run-7"}})";

const char kLenient[] = R"(# every block
train_batch_size: "auto"  // follows
train_micro_batch_size_per_gpu: 4
'gradient_clipping': "auto", steps_per_print: Infinity,
bfloat16: {enabled: true, check_overflow: false}
fp16: {enabled: false, loss_scale: 0, hysteresis: 2, initial_scale_power: 16,}
zero_optimization: {
  stage: 3
  cpu_offload: true, cpu_offload_param: true
  max_live_parameters: 2e8
  reduce_bucket_size: 500000000, stage3_prefetch_bucket_size: "auto"
  leaf_module: {names: []}
  zero_hpz_partition_size: 1 /* off */
}
optimizer: {type: "AdamW", params: {lr: "auto", betas: [0.9, 0.95,], torch_adam: true}}
scheduler: {type: "WarmupLR", params: {warmup_max_lr: "auto", warmup_min_lr: [0, 0],
                                        warmup_type: 'log'}}
aio: {thread_count: 2}, checkpoint: {writer: null}
amp: {enabled: false}
zerod: {units: ["h"], job: '''run''', strict: false}
unknown: 1
)";

// A scheduler of PyTorch's, whose parameters the table does not have.
const char kTorch[] = R"({"train_batch_size": 4, "steps_per_print": 10,
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
  "scheduler": {"type": "MultiStepLR", "params": {"milestones": [10, 2e1], "gamma": 0.5,
    "last_epoch": -1, "note": "auto", "deep": {"a": [null, "b", -0.0]}}}})";

// Pieces that are more likely to reach beyond the parser than random bytes.
const std::vector<std::string> kPieces = {
    "null", "true", "\"auto\"", "-1",  "0",  "1e400", "-0.0", "1e18", "18446744073709551615",
    "{}",   "[]",   "[[",       "{\"", "\"", ",",     ":",    "//",   "/*",
    "\\u0000", "\\ud800", "\xc3", "\xff", "stage", "type", "params", "units", "9e-324",
    "'''",  "#",    "*/",  "\n",     "Infinity", "NaN", "enabled", "nvme", "nvme_path: /"};

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  std::string Next() {
    const size_t which = Below(5);
    std::string text = which < 2 ? kWhole : which < 4 ? kLenient : kTorch;
    const size_t edits = 1 + Below(4);
    for (size_t i = 0; i < edits && !text.empty(); ++i) Edit(&text);
    return text;
  }

 private:
  size_t Below(size_t n) { return random_() % n; }

  void Edit(std::string* text) {
    const size_t at = Below(text->size());
    const size_t length = 1 + Below(12);
    switch (Below(6)) {
      case 0: (*text)[at] = static_cast<char>(Below(256)); break;
      case 1: text->erase(at, length); break;
      case 2: text->insert(at, kPieces[Below(kPieces.size())]); break;
      case 3: text->insert(at, text->substr(Below(text->size()), length)); break;
      case 4: ReplaceValue(text, at); break;
      default: text->resize(Below(20) == 0 ? at : text->size()); break;
    }
  }

  // Puts a piece in place of what lies between a colon and the next comma.
  void ReplaceValue(std::string* text, size_t at) {
    const size_t colon = text->find(':', at);
    if (colon == std::string::npos) return;
    const size_t end = text->find_first_of(",}", colon);
    if (end == std::string::npos) return;
    text->replace(colon + 1, end - colon - 1, kPieces[Below(kPieces.size())]);
  }

  std::mt19937 random_;
};

void ExpectPrintable(absl::string_view text) {
  for (const char c : text) ASSERT_TRUE(c == '\n' || (c >= ' ' && c <= '~')) << text;
}

TEST(ConfigFuzzTest, DamagedTextsNeverCrash) {
  Mutator mutator(kSeed);
  ParseOptions options;
  options.world = 4;
  options.auto_values = AutoValues{{1024}, {{"optimizer.params.lr", "0.01"},
                                       {"scheduler.params.note", "[1, 2]"}}};
  int accepted = 0;
  int refused_after_parsing = 0;
  for (int round = 0; round < kRounds; ++round) {
    const std::string text = mutator.Next();
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", round " << round << ":\n" << text);
    const absl::StatusOr<ParsedConfig> parsed = ParseConfig(text, options);
    if (parsed.ok()) {
      ++accepted;
      const absl::StatusOr<Config> again = Config::Parse(parsed->config.ToJson(), 4);
      ASSERT_TRUE(again.ok()) << again.status();
      ASSERT_EQ(*again, parsed->config);
      ASSERT_FALSE(DescribeConfig(*parsed).empty());
      for (const std::string& warning : parsed->warnings) ExpectPrintable(warning);
    } else {
      const absl::string_view message = parsed.status().message();
      ASSERT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
      ASSERT_FALSE(message.empty());
      if (!absl::StrContains(message, "cannot be read")) ++refused_after_parsing;
      ExpectPrintable(message);
    }
    ASSERT_FALSE(HasFailure());
  }
  // Damage of every depth: some is harmless, some is found by the parser, some by the table.
  EXPECT_GT(accepted, kRounds / 50);
  EXPECT_GT(refused_after_parsing, kRounds / 20);
  EXPECT_GT(kRounds - accepted - refused_after_parsing, kRounds / 20);
}

}  // namespace
}  // namespace zerod
