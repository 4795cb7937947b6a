// SPDX-License-Identifier: Apache-2.0
//
// "auto": what the caller knows, the rules of the hidden size and of the batch, and one problem for
// all keys that are left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/config_parse.h"

namespace zerod {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<ParsedConfig> Parse(const std::string& text, std::optional<AutoValues> values,
                                   uint32_t world = 1) {
  ParseOptions options;
  options.world = world;
  options.auto_values = std::move(values);
  return ParseConfig(text, options);
}

std::vector<std::string> Problems(const absl::StatusOr<ParsedConfig>& parsed) {
  if (parsed.ok()) return {};
  return absl::StrSplit(std::string(parsed.status().message()), '\n');
}

std::string With(absl::string_view members) {
  return absl::StrCat("{\"train_micro_batch_size_per_gpu\": 1, ", members, "}");
}

TEST(ConfigAutoTest, WithoutValuesEveryAutoIsRefused) {
  const struct {
    const char* members;
    const char* path;
  } cases[] = {
      {R"("gradient_clipping": "auto")", "gradient_clipping"},
      {R"("bf16": {"enabled": "auto"})", "bf16.enabled"},
      {R"("bf16": "auto")", "bf16"},
      {R"("fp16": {"enabled": "auto"})", "fp16.enabled"},
      {R"("zero_optimization": {"stage3_prefetch_bucket_size": "auto"})",
       "zero_optimization.stage3_prefetch_bucket_size"},
      {R"("zero_optimization": {"prefetch_bucket_size": "auto"})",
       "zero_optimization.stage3_prefetch_bucket_size"},
      {R"("zero_optimization": {"offload_param": {"device": "auto"}})",
       "zero_optimization.offload_param.device"},
      {R"("optimizer": {"type": "auto"})", "optimizer.type"},
      {R"("optimizer": {"type": "AdamW", "params": {"betas": "auto"}})", "optimizer.params.betas"},
      {R"("optimizer": {"type": "AdamW", "params": "auto"})", "optimizer.params"},
      {R"("zerod": {"job": "auto"})", "zerod.job"},
  };
  for (const auto& c : cases) {
    EXPECT_THAT(Problems(Parse(With(c.members), std::nullopt)),
                ElementsAre(absl::StrCat("\"auto\" cannot be resolved for ", c.path,
                                         "; it is for the integrations (Accelerate, Transformers), "
                                         "which come later: write the value")))
        << c.members;
  }
  EXPECT_THAT(
      Problems(Parse(R"({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
                         "gradient_clipping": "auto"})", std::nullopt)),
      ElementsAre(HasSubstr("for train_batch_size, train_micro_batch_size_per_gpu, "
                            "gradient_clipping; ")));
}

TEST(ConfigAutoTest, HiddenSize) {
  const char kText[] = R"({"train_batch_size": 1, "zero_optimization": {"stage": 3,
      "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}})";
  const struct {
    std::vector<uint64_t> sizes;
    uint64_t prefetch, persistence;
  } cases[] = {
      {{1024}, 943718, 10240},
      {{768}, 530841, 7680},
      {{64, 1600, 320}, 2304000, 16000},
      {{1}, 0, 10},
  };
  for (const auto& c : cases) {
    const auto parsed = Parse(kText, AutoValues{c.sizes, {}});
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->config.zero.prefetch_bucket_size, c.prefetch);
    EXPECT_EQ(parsed->config.zero.param_persistence_threshold, c.persistence);
    EXPECT_THAT(parsed->auto_keys,
                ElementsAre("zero_optimization.stage3_param_persistence_threshold",
                            "zero_optimization.stage3_prefetch_bucket_size"));
    const auto& source = parsed->sources.at("zero_optimization.stage3_prefetch_bucket_size");
    EXPECT_EQ(source.kind, ValueSource::kAuto);
    EXPECT_THAT(source.detail, HasSubstr("0.9 * hidden_size * hidden_size, hidden_size "));
  }
  EXPECT_THAT(Problems(Parse(kText, AutoValues{})),
              ElementsAre("\"auto\" cannot be resolved for "
                          "zero_optimization.stage3_param_persistence_threshold, "
                          "zero_optimization.stage3_prefetch_bucket_size; the model's hidden size "
                          "is not known: write the values"));
  EXPECT_THAT(Problems(Parse(kText, AutoValues{{0}, {}})),
              testing::Contains(HasSubstr("hidden_size: 0 is not allowed")));
  EXPECT_THAT(Problems(Parse(kText, AutoValues{{uint64_t{1} << 27}, {}})),
              testing::Contains(HasSubstr("hidden_size: 134217728 is not allowed")));
  const absl::StatusOr<ParsedConfig> bucket = Parse(
      With(R"("zero_optimization": {"reduce_bucket_size": "auto"})"), AutoValues{{1024}, {}});
  ASSERT_TRUE(bucket.ok()) << bucket.status();
  EXPECT_EQ(bucket->config.zero.reduce_bucket_size, 1048576u);
}

TEST(ConfigAutoTest, GivenValues) {
  AutoValues values;
  values.values = {{"train_micro_batch_size_per_gpu", "3"},
                   {"gradient_accumulation_steps", "2"},
                   {"gradient_clipping", "0.25"},
                   {"bf16.enabled", "true"},
                   {"zero_optimization.stage", "3"},
                   {"zero_optimization.offload_param.device", "\"cpu\""},
                   {"optimizer.params.lr", "0.5"},
                   {"optimizer.params.weight_decay", "0"},
                   {"optimizer.params.betas", "[0.5, 0.25]"},
                   {"scheduler.params.warmup_num_steps", "17"},
                   {"scheduler.params.total_num_steps", "100"}};
  const char kText[] = R"({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
      "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
      "bf16": {"enabled": "auto"},
      "zero_optimization": {"stage": "auto", "offload_param": {"device": "auto"},
        "stage3_gather_16bit_weights_on_model_save": "auto"},
      "optimizer": {"type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto"}},
      "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto",
        "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}})";
  const auto parsed = Parse(kText, values, 4);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Config& config = parsed->config;
  EXPECT_EQ(config.train_batch_size, 24u);
  EXPECT_EQ(config.micro_batch_size, 3u);
  EXPECT_EQ(config.gradient_accumulation_steps, 2u);
  EXPECT_EQ(config.gradient_clipping, 0.25);
  EXPECT_TRUE(config.bf16);
  EXPECT_EQ(config.zero.stage, 3u);
  EXPECT_EQ(config.zero.offload_param.device, "cpu");
  EXPECT_EQ(config.optimizer.lr, 0.5);
  EXPECT_EQ(config.optimizer.weight_decay, 0);
  EXPECT_EQ(config.optimizer.beta2, 0.25);
  EXPECT_EQ(config.scheduler.warmup_min_lr, Rates(0));
  EXPECT_EQ(config.scheduler.warmup_max_lr, Rates(0.5));
  EXPECT_EQ(config.scheduler.warmup_num_steps, 17u);
  EXPECT_EQ(parsed->auto_keys.size(), 14u) << testing::PrintToString(parsed->auto_keys);
  EXPECT_EQ(parsed->sources.at("optimizer.params.lr").kind, ValueSource::kAuto);
  EXPECT_EQ(parsed->sources.at("scheduler.params.warmup_max_lr").detail, "optimizer.params.lr");
  // What came of it needs no values any more.
  EXPECT_EQ(*Config::Parse(config.ToJson(), 4), config);
}

TEST(ConfigAutoTest, BatchKeysFollowFromEachOther) {
  const struct {
    const char* text;
    uint64_t train, micro, accumulation;  // 0: refused
  } cases[] = {
      {R"({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3})", 6, 3, 1},
      {R"({"train_batch_size": 12, "train_micro_batch_size_per_gpu": "auto"})", 12, 6, 1},
      {R"({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2,
           "gradient_accumulation_steps": "auto"})", 12, 2, 3},
      {R"({"train_batch_size": 12, "train_micro_batch_size_per_gpu": "auto",
           "gradient_accumulation_steps": 2})", 12, 3, 2},
      {R"({"train_batch_size": "auto"})", 0, 0, 0},
      {R"({"train_batch_size": "auto", "gradient_accumulation_steps": 2})", 0, 0, 0},
      {R"({"gradient_accumulation_steps": "auto"})", 0, 0, 0},
  };
  for (const auto& c : cases) {
    const auto parsed = Parse(c.text, AutoValues{}, 2);
    if (c.train == 0) {
      EXPECT_THAT(Problems(parsed), ElementsAre(HasSubstr("\"auto\" cannot be resolved for ")))
          << c.text;
      continue;
    }
    ASSERT_TRUE(parsed.ok()) << c.text << parsed.status();
    EXPECT_EQ(parsed->config.train_batch_size, c.train) << c.text;
    EXPECT_EQ(parsed->config.micro_batch_size, c.micro) << c.text;
    EXPECT_EQ(parsed->config.gradient_accumulation_steps, c.accumulation) << c.text;
  }
}

TEST(ConfigAutoTest, WhatIsLeftIsOneProblem) {
  const auto parsed = Parse(With(R"("bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW",
      "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR",
      "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}})"), AutoValues{});
  EXPECT_THAT(Problems(parsed),
              ElementsAre("\"auto\" cannot be resolved for bf16.enabled, optimizer.params.lr, "
                          "scheduler.params.warmup_max_lr, scheduler.params.warmup_num_steps; "
                          "write the values"));
}

TEST(ConfigAutoTest, BadValuesOfTheCaller) {
  const struct {
    const char* value;
    const char* says;
  } cases[] = {
      {"{", "gradient_clipping: \"auto\" was given the value \"{\", which is not JSON"},
      {"\"x\"", "gradient_clipping: \"x\" is not allowed; it must be a number"},
      {"[1]", "gradient_clipping: [1] is not allowed"},
  };
  for (const auto& c : cases) {
    const auto parsed = Parse(With(R"("gradient_clipping": "auto")"),
                              AutoValues{{}, {{"gradient_clipping", c.value}}});
    EXPECT_THAT(Problems(parsed), ElementsAre(HasSubstr(c.says)));
  }
  // "auto" again is no value, and the rule is used.
  EXPECT_TRUE(Parse(With(R"("gradient_clipping": "auto")"),
                    AutoValues{{}, {{"gradient_clipping", "\"auto\""}}}).ok());
}

}  // namespace
}  // namespace zerod
