// SPDX-License-Identifier: Apache-2.0
//
// The block "scheduler": DeepSpeed's five with their parameters, rates by parameter group, and
// PyTorch's classes with whatever their constructors take.
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

absl::StatusOr<ParsedConfig> Parse(absl::string_view scheduler,
                                   std::optional<AutoValues> values = std::nullopt) {
  ParseOptions options;
  options.auto_values = std::move(values);
  return ParseConfig(
      absl::StrCat("{\"train_micro_batch_size_per_gpu\": 1, \"scheduler\": ", scheduler, "}"),
      options);
}

std::vector<std::string> Problems(const absl::StatusOr<ParsedConfig>& parsed) {
  if (parsed.ok()) return {};
  return absl::StrSplit(std::string(parsed.status().message()), '\n');
}

// Accepted, with the block "scheduler" in the resolved text containing this.
const struct {
  const char* scheduler;
  const char* canonical;
} kAccepted[] = {
    {"null", R"("scheduler":null)"},
    {R"({"type": "WarmupLR"})",
     R"("params":{"last_batch_iteration":-1,"warmup_max_lr":null,"warmup_min_lr":0.0,)"
     R"("warmup_num_steps":1000,"warmup_type":"log"},"type":"WarmupLR")"},
    {R"({"type": "WarmupLR", "params": null})", R"("warmup_num_steps":1000)"},
    {R"({"type": "WarmupLR", "params": {"warmup_max_lr": 1, "warmup_num_steps": 0}})",
     R"("warmup_max_lr":1.0,"warmup_min_lr":0.0,"warmup_num_steps":0)"},
    {R"({"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0.5], "warmup_max_lr": [1, 0.5]}})",
     R"("warmup_max_lr":[1.0,0.5],"warmup_min_lr":[0.0,0.5])"},
    {R"({"type": "WarmupLR", "params": {"warmup_min_lr": 0.25, "warmup_max_lr": [1]}})",
     R"("warmup_max_lr":[1.0],"warmup_min_lr":0.25)"},
    {R"({"type": "WarmupLR", "params": {"last_batch_iteration": 7}})",
     R"("last_batch_iteration":7)"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 9}})",
     R"("last_batch_iteration":-1,"total_num_steps":9,"warmup_max_lr":0.001,)"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 9e3, "warmup_max_lr": null}})",
     R"("total_num_steps":9000,"warmup_max_lr":0.001,)"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": [1, 2]}})",
     R"("warmup_max_lr":[1.0,2.0])"},
    {R"({"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_type": "linear"}})",
     R"("params":{"cos_min_ratio":0.0001,"last_batch_iteration":-1,"total_num_steps":9,)"
     R"("warmup_min_ratio":0.0,"warmup_num_steps":1000,"warmup_type":"linear"})"},
    {R"({"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_min_ratio": 1}})",
     R"("warmup_min_ratio":1.0)"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1}})",
     R"("params":{"cycle_first_stair_count":0,"cycle_first_step_size":2000,"cycle_max_lr":1.0,)"
     R"("cycle_max_mom":0.9,"cycle_min_lr":0.1,"cycle_min_mom":0.8,"cycle_momentum":true,)"
     R"("cycle_second_stair_count":null,"cycle_second_step_size":null,"decay_lr_rate":0.0,)"
     R"("decay_mom_rate":0.0,"decay_step_size":0,"last_batch_iteration":-1},"type":"OneCycle")"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": [0, 1], "cycle_max_lr": 1,
         "cycle_second_step_size": 0, "cycle_max_mom": [0, 0.5]}})",
     R"("cycle_max_mom":[0.0,0.5],"cycle_min_lr":[0.0,1.0])"},
    {R"({"type": "LRRangeTest"})",
     R"("params":{"last_batch_iteration":-1,"lr_range_test_min_lr":0.001,)"
     R"("lr_range_test_staircase":false,"lr_range_test_step_rate":1.0,)"
     R"("lr_range_test_step_size":2000},"type":"LRRangeTest")"},
    {R"({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [1, 2]}})",
     R"("lr_range_test_min_lr":[1.0,2.0])"},
    // PyTorch's, with any parameters.
    {R"({"type": "StepLR"})", R"({"params":{},"type":"StepLR"})"},
    {R"({"type": "StepLR", "params": {}})", R"({"params":{},"type":"StepLR"})"},
    {R"({"type": "StepLR", "params": {"step_size": 3, "gamma": 0.5, "last_epoch": null}})",
     R"({"params":{"gamma":0.5,"step_size":3},"type":"StepLR"})"},
    {R"({"type": "MultiStepLR", "params": {"milestones": [1, 2], "x": {"y": [true, null]}}})",
     R"({"params":{"milestones":[1,2],"x":{"y":[true,null]}},"type":"MultiStepLR"})"},
    {R"({"type": "CyclicLR", "params": {"base_lr": 1e-3, "max_lr": [0.1, 0.2], "mode": "é"}})",
     R"({"params":{"base_lr":0.001,"max_lr":[0.1,0.2],"mode":"é"},"type":"CyclicLR"})"},
    // The table's names mean nothing to them: the constructor will say so.
    {R"({"type": "CosineAnnealingLR", "params": {"T_max": 1000, "warmup_num_steps": -1}})",
     R"({"params":{"T_max":1000,"warmup_num_steps":-1},"type":"CosineAnnealingLR"})"},
};

TEST(ConfigSchedulerTest, Accepted) {
  for (const auto& c : kAccepted) {
    const absl::StatusOr<ParsedConfig> parsed = Parse(c.scheduler);
    ASSERT_TRUE(parsed.ok()) << c.scheduler << "\n" << parsed.status();
    const std::string text = parsed->config.ToJson();
    EXPECT_THAT(text, HasSubstr(c.canonical)) << c.scheduler;
    const absl::StatusOr<Config> again = Config::Parse(text, 1);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, parsed->config) << c.scheduler;
    EXPECT_EQ(again->ToJson(), text);
    EXPECT_FALSE(DescribeConfig(*parsed).empty());
  }
}

// Each has this one problem.
const struct {
  const char* scheduler;
  const char* says;
} kRefused[] = {
    {R"("WarmupLR")", R"(scheduler: "WarmupLR" is not allowed; it must be an object)"},
    {R"({"params": {"warmup_num_steps": 3}})", "scheduler.type: is missing; name one of"},
    {R"({"type": "WarmUpLR"})", R"(did you mean "WarmupLR"?)"},
    {R"({"type": "warmuplr", "params": {"warmup_max_lr": 1}})",
     R"(scheduler.type: "warmuplr" is not allowed; it must be "WarmupLR" or "WarmupDecayLR")"},
    {R"({"type": "CosineAnealingLR", "params": {"T_max": 3}})",
     R"(did you mean "CosineAnnealingLR"?)"},
    {R"({"type": 3, "params": {}})", "scheduler.type: 3 is not allowed"},
    // What a file cannot hold.
    {R"({"type": "LambdaLR", "params": {"lr_lambda": "x"}})",
     "scheduler.type: \"LambdaLR\" is not served: it takes a function, which no file can hold; "
     "pass the scheduler itself as lr_scheduler="},
    {R"({"type": "MultiplicativeLR"})", "it takes a function"},
    {R"({"type": "ReduceLROnPlateau", "params": {"patience": 3}})", "its step() takes a metric"},
    {R"({"type": "SequentialLR"})", "it takes other schedulers"},
    {R"({"type": "ChainedScheduler"})", "it takes other schedulers"},
    // What is missing.
    {R"({"type": "WarmupDecayLR"})",
     "scheduler.params.total_num_steps: is missing; WarmupDecayLR needs it"},
    {R"({"type": "WarmupCosineLR", "params": {}})", "total_num_steps: is missing; WarmupCosineLR"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 1}})", "cycle_max_lr: is missing; OneCyc"},
    {R"({"type": "OneCycle", "params": {"cycle_max_lr": 1}})", "cycle_min_lr: is missing"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": null}})", "is missing"},
    // Values.
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 0}})", "steps: 0 is not allowed"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": Infinity}})", "Infinity is not"},
    {R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_min_lr": 0.1}})",
     "warmup_min_lr: 0.1 is not allowed; it must be at most warmup_max_lr, which is 0.001"},
    {R"({"type": "WarmupLR", "params": {"warmup_num_steps": -1}})", "steps: -1 is not allowed"},
    {R"({"type": "WarmupLR", "params": {"warmup_num_steps": 2.5}})", "steps: 2.5 is not allowed"},
    {R"({"type": "WarmupLR", "params": {"warmup_num_steps": true}})", "true is not allowed"},
    {R"({"type": "WarmupLR", "params": {"warmup_max_lr": "1"}})",
     R"(warmup_max_lr: "1" is not allowed; it must be a number of at least 0.0, or a list of )"
     "such, one for each parameter group"},
    {R"({"type": "WarmupLR", "params": {"warmup_max_lr": []}})", "warmup_max_lr: [] is not"},
    {R"({"type": "WarmupLR", "params": {"warmup_max_lr": [1, -1]}})", "[1,-1] is not allowed"},
    {R"({"type": "WarmupLR", "params": {"warmup_max_lr": [1, [2]]}})", "[1,[2]] is not allowed"},
    {R"({"type": "WarmupLR", "params": {"warmup_min_lr": [0, 2], "warmup_max_lr": 1}})",
     "warmup_min_lr: 2.0 is not allowed; it must be at most warmup_max_lr, which is 1.0"},
    {R"({"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0], "warmup_max_lr": [1, 1, 1]}})",
     "warmup_min_lr: has 2 values and warmup_max_lr has 3; each parameter group needs one"},
    {R"({"type": "WarmupLR", "params": {"last_batch_iteration": -2}})", "-2 is not allowed"},
    {R"({"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "cos_min_ratio": 2}})",
     "cos_min_ratio: 2 is not allowed; it must be a number from 0.0 to 1.0"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1,
         "cycle_first_step_size": 0}})", "cycle_first_step_size: 0 is not allowed"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1,
         "cycle_second_step_size": -1}})", "cycle_second_step_size: -1 is not allowed"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1,
         "cycle_second_step_size": Infinity}})", "cycle_second_step_size: Infinity is not"},
    {R"({"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1,
         "cycle_max_mom": 1}})",
     "cycle_max_mom: 1 is not allowed; it must be a number from 0.0 to less than 1.0, or a list"},
    {R"({"type": "LRRangeTest", "params": {"lr_range_test_step_size": 0}})", "size: 0 is not"},
    {R"({"type": "LRRangeTest", "params": {"lr_range_test_staircase": "on"}})", R"("on" is not)"},
    // Another type's, and nobody's.
    {R"({"type": "LRRangeTest", "params": {"warmup_num_steps": 9}})",
     "is not a parameter of LRRangeTest; it is one of \"WarmupLR\" or \"WarmupDecayLR\" or "
     "\"WarmupCosineLR\""},
    {R"({"type": "WarmupLR", "params": {"cycle_min_lr": 1}})", "it is one of \"OneCycle\""},
    {R"({"type": "WarmupLR", "params": {"warmup_num_step": 9}})", R"(mean "warmup_num_steps"?)"},
    // Of PyTorch's.
    {R"({"type": "StepLR", "params": [1]})", "scheduler.params: [1] is not allowed; it must be an"},
    {R"({"type": "StepLR", "params": {"step size": 1}})",
     R"(scheduler.params."step size": is not a name that an argument can have)"},
    {R"({"type": "StepLR", "params": {"9": 1}})", "scheduler.params.9: is not a name"},
    {R"({"type": "StepLR", "params": {"": 1}})", R"(scheduler.params."": is not a name)"},
    {R"({"type": "StepLR", "params": {"gamma": Infinity}})",
     "scheduler.params.gamma: Infinity is not allowed; numbers must be finite"},
    {R"({"type": "StepLR", "params": {"x": {"y": [1, NaN]}}})", "numbers must be finite"},
    {R"({"type": "StepLR", "params": {"gamma": 1, "gamma": 1}})", "gamma: is given more than once"},
    {R"({"type": "StepLR", "params": {"gamma": "auto"}})",
     "\"auto\" cannot be resolved for scheduler.params.gamma; "},
};

TEST(ConfigSchedulerTest, Refused) {
  for (const auto& c : kRefused) {
    const std::vector<std::string> problems = Problems(Parse(c.scheduler));
    ASSERT_EQ(problems.size(), 1u) << c.scheduler << "\n" << testing::PrintToString(problems);
    EXPECT_THAT(problems[0], HasSubstr(c.says)) << c.scheduler;
  }
  std::string many = "1";
  for (int i = 0; i < 64; ++i) many += ",1";
  EXPECT_THAT(Problems(Parse(absl::StrCat(
                  R"({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [)", many, "]}}"))),
              ElementsAre(HasSubstr("or a list of such, one for each parameter group")));
}

TEST(ConfigSchedulerTest, AWarmUpThatDoesNotEndIsAWarning) {
  const auto parsed = Parse(
      R"({"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 10}})");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->warnings, ElementsAre(HasSubstr("9 is less than warmup_num_steps 10")));
}

TEST(ConfigSchedulerTest, SourcesOfPyTorchsParameters) {
  const auto parsed = Parse(
      R"({"type": "OneCycleLR", "params": {"max_lr": 1, "total_steps": "auto", "epochs": "auto"}})",
      AutoValues{{},
                 {{"scheduler.params.total_steps", "90"}, {"scheduler.params.epochs", "null"}}});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->config.ToJson(), HasSubstr(R"("params":{"max_lr":1,"total_steps":90})"));
  EXPECT_THAT(parsed->auto_keys,
              ElementsAre("scheduler.params.epochs", "scheduler.params.total_steps"));
  EXPECT_EQ(parsed->sources.at("scheduler.params.total_steps").kind, ValueSource::kAuto);
  EXPECT_EQ(parsed->sources.at("scheduler.params.max_lr").kind, ValueSource::kFile);
  EXPECT_EQ(parsed->sources.count("scheduler.params.warmup_type"), 0u);
  const std::string text = DescribeConfig(*parsed);
  EXPECT_THAT(text, HasSubstr(" = 90  (auto: given by the caller)\n"));
  EXPECT_THAT(text, HasSubstr(" = 1  (file)\n"));
}

TEST(ConfigSchedulerTest, AutoOfTheWarmUpsEnd) {
  const auto warmup = [](const char* type, const char* optimizer) {
    ParseOptions options;
    options.auto_values = AutoValues{};
    return ParseConfig(absl::StrCat(R"({"train_batch_size": 1, "optimizer": )", optimizer,
                                    R"(, "scheduler": {"type": ")", type, R"(", "params": {)",
                                    R"("warmup_max_lr": "auto", "warmup_min_lr": "auto", )",
                                    absl::string_view(type) == "WarmupLR"
                                        ? ""
                                        : R"("total_num_steps": 9)",
                                    "}}}"),
                       options);
  };
  const char kOptimizer[] = R"({"type": "AdamW", "params": {"lr": 0.5}})";
  for (const char* type : {"WarmupLR", "WarmupDecayLR"}) {
    const auto parsed = warmup(type, kOptimizer);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->config.scheduler.warmup_max_lr, Rates(0.5));
    EXPECT_EQ(parsed->config.scheduler.warmup_min_lr, Rates(0));
    EXPECT_EQ(parsed->sources.at("scheduler.params.warmup_max_lr").detail, "optimizer.params.lr");
  }
  const auto own = warmup("WarmupLR", "null");
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_EQ(own->config.scheduler.warmup_max_lr, std::nullopt);
  EXPECT_EQ(own->sources.at("scheduler.params.warmup_max_lr").kind, ValueSource::kAuto);
  EXPECT_THAT(Problems(warmup("WarmupDecayLR", "null")),
              ElementsAre(HasSubstr("cannot be resolved for scheduler.params.warmup_max_lr; ")));
}

// A model that says nothing useful of its size is no problem where nobody asked.
TEST(ConfigSchedulerTest, HiddenSizesThatNobodyNeedsAreNotChecked) {
  EXPECT_TRUE(Parse("null", AutoValues{{uint64_t{1} << 30}, {}}).ok());
}

}  // namespace
}  // namespace zerod
