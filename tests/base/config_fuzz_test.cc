// SPDX-License-Identifier: Apache-2.0
//
// Random damage to a full configuration, from one fixed seed. Whatever comes in, Parse either
// refuses it with printable lines or gives a configuration that survives ToJson and back.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "base/config.h"

namespace zerod {
namespace {

constexpr uint32_t kSeed = 20260801;
constexpr int kRounds = 20000;

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

// Pieces that are more likely to reach beyond the parser than random bytes.
const std::vector<std::string> kPieces = {
    "null", "true", "\"auto\"", "-1",  "0",  "1e400", "-0.0", "1e18", "18446744073709551615",
    "{}",   "[]",   "[[",       "{\"", "\"", ",",     ":",    "//",   "/*",
    "\\u0000", "\\ud800", "\xc3", "\xff", "stage", "type", "params", "units", "9e-324"};

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  std::string Next() {
    std::string text = kWhole;
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

TEST(ConfigFuzzTest, DamagedTextsNeverCrash) {
  Mutator mutator(kSeed);
  int accepted = 0;
  int refused_after_parsing = 0;
  for (int round = 0; round < kRounds; ++round) {
    const std::string text = mutator.Next();
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << ", round " << round << ":\n" << text);
    const absl::StatusOr<Config> config = Config::Parse(text, 4);
    if (config.ok()) {
      ++accepted;
      const absl::StatusOr<Config> again = Config::Parse(config->ToJson(), 4);
      ASSERT_TRUE(again.ok()) << again.status();
      ASSERT_EQ(*again, *config);
    } else {
      const absl::string_view message = config.status().message();
      ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
      ASSERT_FALSE(message.empty());
      if (message.find("not valid JSON") == absl::string_view::npos) ++refused_after_parsing;
      for (const char c : message) ASSERT_TRUE(c == '\n' || (c >= ' ' && c <= '~')) << message;
    }
  }
  // Damage of every depth: some is harmless, some is found by the parser, some by the table.
  EXPECT_GT(accepted, kRounds / 50);
  EXPECT_GT(refused_after_parsing, kRounds / 20);
  EXPECT_GT(kRounds - accepted - refused_after_parsing, kRounds / 20);
}

}  // namespace
}  // namespace zerod
