// SPDX-License-Identifier: Apache-2.0
//
// Every served key with good and bad values, every kind of refusal, and the batch triangle, as
// tables. A bad case states the whole line that the user reads where it is short, else its core.
#include "base/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace zerod {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// A configuration of `members` beside a batch size, so that nothing else is wrong with it.
std::string With(absl::string_view members) {
  return absl::StrCat("{\"train_micro_batch_size_per_gpu\": 1, ", members, "}");
}

std::vector<std::string> Problems(const std::string& json, uint32_t world = 1) {
  const absl::StatusOr<Config> config = Config::Parse(json, world);
  if (config.ok()) return {};
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  return absl::StrSplit(std::string(config.status().message()), '\n');
}

Config Good(const std::string& json, uint32_t world = 1) {
  const absl::StatusOr<Config> config = Config::Parse(json, world);
  EXPECT_TRUE(config.ok()) << json << "\n" << config.status();
  return config.ok() ? *config : Config();
}

TEST(ConfigTest, DefaultsAreDeepSpeeds) {
  const Config config = Good("{\"train_batch_size\": 4}", 2);
  Config expected;
  expected.train_batch_size = 4;
  expected.micro_batch_size = 2;
  expected.gradient_accumulation_steps = 1;
  EXPECT_EQ(config, expected);
  EXPECT_EQ(config.gradient_clipping, 1.0);
  EXPECT_EQ(config.zero.stage, 0u);
}

TEST(ConfigTest, ReadsEveryKeyThatWorks) {
  const Config c = Good(R"({
    // both kinds of comment are fine
    "train_batch_size": 48, "train_micro_batch_size_per_gpu": 4, /* per rank */
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5, "bf16": {"enabled": true},
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 2e8,
      "stage3_param_persistence_threshold": 1e4, "stage3_prefetch_bucket_size": 0},
    "optimizer": {"type": "AdamW",
      "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 2e-4,
      "warmup_num_steps": 10, "warmup_type": "linear"}},
    "zerod": {"units": {"h.0": "first", "h.1": "first"}, "gradient_plan": "node_sum",
      "guard_pages": false, "step_timeout_seconds": 1.5,
      "attach_timeout_seconds": 20, "linger_seconds": 0, "window_bytes_max": 1048576,
      "client_state_bytes_max": 4096, "staging_bytes": 65536, "job": "run-7.a_b",
      "unused_parameters": "zero", "strict": true}})", 4);
  Config e;
  e.train_batch_size = 48;
  e.micro_batch_size = 4;
  e.gradient_accumulation_steps = 3;
  e.gradient_clipping = 0.5;
  e.bf16 = true;
  e.zero.stage = 3;
  e.zero.max_live_parameters = 200000000;
  e.zero.param_persistence_threshold = 10000;
  e.zero.prefetch_bucket_size = 0;
  e.optimizer.type = "AdamW";
  e.optimizer.lr = 3e-4;
  e.optimizer.beta1 = 0.8;
  e.optimizer.beta2 = 0.95;
  e.optimizer.eps = 1e-6;
  e.optimizer.weight_decay = 0.1;
  e.scheduler.type = "WarmupLR";
  e.scheduler.warmup_min_lr = 1e-5;
  e.scheduler.warmup_max_lr = 2e-4;
  e.scheduler.warmup_num_steps = 10;
  e.scheduler.warmup_type = "linear";
  e.zerod.units = {{"h.0", "first"}, {"h.1", "first"}};
  e.zerod.gradient_plan = GradientPlanChoice::kNodeSum;
  e.zerod.guard_pages = false;
  e.zerod.step_timeout_seconds = 1.5;
  e.zerod.attach_timeout_seconds = 20;
  e.zerod.linger_seconds = 0;
  e.zerod.window_bytes_max = 1048576;
  e.zerod.client_state_bytes_max = 4096;
  e.zerod.staging_bytes = 65536;
  e.zerod.job = "run-7.a_b";
  e.zerod.unused_parameters = "zero";
  e.zerod.strict = true;
  EXPECT_EQ(c, e) << c.ToJson();
  EXPECT_EQ(*Config::Parse(c.ToJson(), 4), c);
}

// What else is accepted: the value as ToJson writes it.
TEST(ConfigTest, AcceptedValues) {
  const struct {
    const char* members;
    const char* canonical;
  } cases[] = {
      {R"("gradient_clipping": 0)", R"("gradient_clipping":0.0)"},
      {R"("gradient_clipping": -1)", R"("gradient_clipping":0.0)"},
      {R"("gradient_clipping": -0.0)", R"("gradient_clipping":0.0)"},
      {R"("gradient_clipping": null)", R"("gradient_clipping":1.0)"},
      {R"("bf16": {})", R"("enabled":false,"immediate_grad_update")"},
      {R"("bf16": null)", R"("enabled":false,"immediate_grad_update")"},
      {R"("bf16": {"enabled": 1})", R"("enabled":true,"immediate_grad_update")"},
      {R"("bf16": {"enabled": 0})", R"("enabled":false,"immediate_grad_update")"},
      {R"("zero_optimization": {"stage": 2.0})", R"("stage":2,)"},
      {R"("zero_optimization": {"stage": null})", R"("stage":0,)"},
      {R"("zero_optimization": {"stage3_max_live_parameters": 9007199254740992})",
       R"("stage3_max_live_parameters":9007199254740992)"},
      {R"("zero_optimization": {"stage3_param_persistence_threshold": 0})",
       R"("stage3_param_persistence_threshold":0)"},
      {R"("optimizer": null)", R"("optimizer":null)"},
      {R"("optimizer": {"type": "adamw"})", R"("type":"AdamW")"},
      {R"("optimizer": {"type": "AdamW", "params": {"betas": [0, 0.5]}})",
       R"("betas":[0.0,0.5])"},
      {R"("optimizer": {"type": "AdamW", "params": {"lr": 0}})", R"("lr":0.0)"},
      {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}})",
       R"("warmup_max_lr":0.5)"},
      {R"("optimizer": {"type": "AdamW", "params": {"lr": 0.25}},
          "scheduler": {"type": "WarmupLR"})",
       R"("warmup_max_lr":null)"},
      {R"("zerod": {"units": ["a", "b.c"]})", R"("units":{"a":"a","b.c":"b.c"})"},
      {R"("zerod": {"units": []})", R"("units":{})"},
      {R"("zerod": {"units": {"é": "x"}})", R"("units":{"é":"x"})"},
      {R"("zerod": {"gradient_plan": "auto"})", R"("gradient_plan":"auto")"},
      {R"("zerod": {"gradient_plan": "per_rank"})", R"("gradient_plan":"per_rank")"},
      {R"("zerod": {"job": ""})", R"("job":"")"},
  };
  for (const auto& c : cases) {
    const Config config = Good(With(c.members));
    EXPECT_THAT(config.ToJson(), HasSubstr(c.canonical)) << c.members;
    const absl::StatusOr<Config> again = Config::Parse(config.ToJson(), 1);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, config) << c.members;
    EXPECT_EQ(again->ToJson(), config.ToJson());
  }
}

// One bad member each; exactly one problem must be reported, and it must contain `says`.
const struct {
  const char* members;
  const char* says;
} kRefusedValues[] = {
    {R"("gradient_clipping": "1")",
     R"(gradient_clipping: "1" is not allowed; it must be a number)"},
    {R"("gradient_clipping": true)", "gradient_clipping: true is not allowed"},
    {R"("gradient_clipping": [1])", "gradient_clipping: [1] is not allowed"},
    {R"("bf16": true)", "bf16: true is not allowed; it must be an object"},
    {R"("bf16": {"enabled": "true"})",
     R"(bf16.enabled: "true" is not allowed; it must be true or false)"},
    {R"("bf16": {"enabled": 2})", "bf16.enabled: 2 is not allowed"},
    {R"("zero_optimization": 2)", "zero_optimization: 2 is not allowed; it must be an object"},
    {R"("zero_optimization": {"stage": 4})",
     "zero_optimization.stage: 4 is not allowed; it must be a whole number from 0 to 3"},
    {R"("zero_optimization": {"stage": -1})", "zero_optimization.stage: -1 is not allowed"},
    {R"("zero_optimization": {"stage": 2.5})", "zero_optimization.stage: 2.5 is not allowed"},
    {R"("zero_optimization": {"stage": "2"})", R"(zero_optimization.stage: "2" is not)"},
    {R"("zero_optimization": {"stage": true})", "zero_optimization.stage: true is not"},
    {R"("zero_optimization": {"stage": 4294967298})", "zero_optimization.stage: 4294967298 is"},
    {R"("zero_optimization": {"stage3_max_live_parameters": 0})",
     "stage3_max_live_parameters: 0 is not allowed; it must be a whole number from 1 to "
     "9007199254740992"},
    {R"("zero_optimization": {"stage3_max_live_parameters": -5})", "parameters: -5 is not"},
    {R"("zero_optimization": {"stage3_max_live_parameters": 1e30})", "parameters: 1e+30 is not"},
    {R"("zero_optimization": {"stage3_max_live_parameters": 9007199254740994})", "is not"},
    {R"("zero_optimization": {"stage3_max_live_parameters": 18446744073709551616})", "is not"},
    {R"("zero_optimization": {"stage3_param_persistence_threshold": 1.5})", "1.5 is not"},
    {R"("zero_optimization": {"stage3_prefetch_bucket_size": -1})", "-1 is not"},
    {R"("optimizer": {"type": "musgd"})", R"(optimizer.type: "MuSGD" is not served yet)"},
    {R"("optimizer": {"type": "AdamV"})",
     R"(optimizer.type: "AdamV" is not allowed; it must be "AdamW" or "Adam" or "Lion" )"
     R"(or "Adagrad" or "SGD" or "Lamb" or "Muon" or "RMSprop" or "Adadelta" or "Adamax" )"
     R"(or "NAdam" or "RAdam" or "ASGD" or "Rprop"; did you mean "AdamW"?)"},
    {R"("optimizer": {"type": "SparseAdam"})", R"(optimizer.type: "SparseAdam" is not allowed)"},
    {R"("optimizer": {"type": "Rprop", "params": {"etas": [1.2, 0.5]}})",
     "optimizer.params.etas: must be one above 0 and below 1, and one above 1"},
    {R"("optimizer": {"type": "Rprop", "params": {"weight_decay": 0.1}})",
     "optimizer.params.weight_decay"},
    {R"("optimizer": {"type": "RMSprop", "params": {"maximize": true}})",
     "optimizer.params.maximize"},
    {R"("optimizer": {"type": ""})", R"(optimizer.type: "" is not allowed)"},
    {R"("optimizer": {"type": 3})", "optimizer.type: 3 is not allowed"},
    {R"("optimizer": {"params": {"lr": 1}})", "optimizer.type: is missing"},
    {R"("optimizer": {})", "optimizer.type: is missing"},
    {R"("optimizer": ["type"])", R"(optimizer: ["type"] is not allowed)"},
    {R"("optimizer": {"type": "AdamW", "params": 3})", "optimizer.params: 3 is not allowed"},
    {R"("optimizer": {"type": "AdamW", "params": {"lr": -1e-3}})",
     "optimizer.params.lr: -0.001 is not allowed; it must be a number of at least 0.0"},
    {R"("optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}})", "optimizer.params.lr"},
    {R"("optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1]}})",
     "optimizer.params.betas: [0.9,1] is not allowed; it must be two numbers of at least 0 and "
     "less than 1"},
    {R"("optimizer": {"type": "AdamW", "params": {"betas": [-0.1, 0.9]}})", "betas: [-0.1,0.9]"},
    {R"("optimizer": {"type": "AdamW", "params": {"betas": [0.9]}})", "betas: [0.9]"},
    {R"("optimizer": {"type": "AdamW", "params": {"betas": 0.9}})", "betas: 0.9"},
    {R"("optimizer": {"type": "AdamW", "params": {"betas": [0.9, "x"]}})", "betas: [0.9,\"x\"]"},
    {R"("optimizer": {"type": "AdamW", "params": {"eps": -1}})", "params.eps: -1"},
    {R"("optimizer": {"type": "AdamW", "params": {"weight_decay": -1}})", "weight_decay: -1"},
    {R"("scheduler": {"type": "warmuplr"})", R"(scheduler.type: "warmuplr" is not allowed)"},
    {R"("scheduler": {"params": {}})", "scheduler.type: is missing"},
    {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1,
                                                    "warmup_num_steps": -1}})",
     "scheduler.params.warmup_num_steps: -1 is not allowed; it must be a whole number from 0 to"},
    {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": -1}})",
     "warmup_max_lr: -1"},
    {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1, "warmup_type": "cos"}})",
     R"(warmup_type: "cos" is not allowed; it must be "log" or "linear")"},
    {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_min_lr": 1}})",
     "warmup_min_lr: 1.0 is not allowed; it must be at most warmup_max_lr, which is 0.1"},
    {R"("zerod": [])", "zerod: [] is not allowed; it must be an object"},
    {R"("zerod": {"units": "h"})", R"(zerod.units: "h" is not allowed)"},
    {R"("zerod": {"units": ["a", "a"]})", R"(zerod.units: "a" is listed twice)"},
    {R"("zerod": {"units": ["a", 1]})", "zerod.units: 1 is not allowed"},
    {R"("zerod": {"units": [""]})", R"(zerod.units: "" is not allowed)"},
    {R"("zerod": {"units": {"a": null}})", "zerod.units: null is not allowed"},
    {R"("zerod": {"units": {"": "a"}})", R"(zerod.units: "" is not allowed)"},
    {R"("zerod": {"units": ["a\u0000b"]})", R"(zerod.units: "a\u0000b" is not allowed)"},
    {R"("zerod": {"gradient_plan": "rank"})",
     R"("rank" is not allowed; it must be "auto" or "per_rank" or "node_sum")"},
    {R"("zerod": {"guard_pages": "on"})", R"(zerod.guard_pages: "on" is not allowed)"},
    {R"("zerod": {"master_remainder": true})",
     "zerod.master_remainder: true is not allowed without bf16.enabled"},
    {R"("zerod": {"step_timeout_seconds": -1})",
     "zerod.step_timeout_seconds: -1 is not allowed; it must be a number from 0.0 to "},
    {R"("zerod": {"step_timeout_seconds": 1e300})", "step_timeout_seconds: 1e+300 is not"},
    {R"("zerod": {"attach_timeout_seconds": 0})", "zerod.attach_timeout_seconds: 0 is not"},
    {R"("zerod": {"linger_seconds": "10"})", R"(zerod.linger_seconds: "10" is not)"},
    {R"("zerod": {"window_bytes_max": -1})", "zerod.window_bytes_max: -1 is not"},
    {R"("zerod": {"client_state_bytes_max": 0})", "zerod.client_state_bytes_max: 0 is not"},
    {R"("zerod": {"client_state_bytes_max": 2e9})", "a whole number from 1 to 1073741824"},
    {R"("zerod": {"staging_bytes": 0.5})", "zerod.staging_bytes: 0.5 is not"},
    {R"("zerod": {"job": "a b"})", R"(zerod.job: "a b" is not allowed)"},
    {R"("zerod": {"job": 7})", "zerod.job: 7 is not allowed"},
    {R"("zerod": {"unused_parameters": "skip"})", R"(it must be "torch" or "zero")"},
};

TEST(ConfigTest, RefusedValues) {
  for (const auto& c : kRefusedValues) {
    const std::vector<std::string> problems = Problems(With(c.members));
    ASSERT_EQ(problems.size(), 1u) << c.members << "\n" << testing::PrintToString(problems);
    EXPECT_THAT(problems[0], HasSubstr(c.says)) << c.members;
  }
}

TEST(ConfigTest, RefusedKeys) {
  const struct {
    const char* members;
    const char* line;
  } cases[] = {
      {R"("zero_optimisation": {})",
       R"(zero_optimisation: is not a known key; did you mean "zero_optimization"?)"},
      {R"("zero_optimization": {"stge": 1})",
       R"(zero_optimization.stge: is not a known key; did you mean "stage"?)"},
      {R"("zero_optimization": {"stage3_max_liv_params": 1})",
       R"(zero_optimization.stage3_max_liv_params: is not a known key; )"
       R"(did you mean "stage3_max_live_parameters"?)"},
      {R"("wall_clock_brakdown": true)",
       R"(wall_clock_brakdown: is not a known key; did you mean "wall_clock_breakdown"?)"},
      {R"("flop_profiler": {})",
       R"(flop_profiler: is not a known key; the nearest is "flops_profiler", which is not )"
       "served"},
      {R"("stage": 3)", "stage: is not a key here; did you mean zero_optimization.stage?"},
      {R"("optimizer": {"type": "AdamW", "lr": 1})",
       "optimizer.lr: is not a key here; did you mean optimizer.params.lr?"},
      {R"("pin_memory": true)",
       "pin_memory: is not a key here; did you mean zero_optimization.offload_param.pin_memory "
       "or zero_optimization.offload_optimizer.pin_memory?"},
      // In many old examples.
      {R"("zero_optimization": {"stage": 2, "offload_optimizer":
           {"device": "cpu", "buffer_size": 4e8}})",
       "zero_optimization.offload_optimizer.buffer_size: is not a key here; did you mean "
       "zero_optimization.offload_param.buffer_size?"},
      {R"("fp16": {"enabled": false, "loss_scale_windw": 1})",
       R"(fp16.loss_scale_windw: is not a known key; did you mean "loss_scale_window"?)"},
      {R"("aio": {"blok_size": 1})",
       R"(aio.blok_size: is not a known key; the nearest is "block_size", which is not served)"},
      {R"("bf16": {"qqqqqqqq": 1})",
       "bf16.qqqqqqqq: is not a known key; the keys here are enabled, check_grad_overflow, "
       "bf16_master_weights_and_grads, bf16_optimizer_states"},
      {R"("optimizer.type": "AdamW")",
       R"("optimizer.type": is not a known key, for a dot does not nest; did you mean )"
       R"({"optimizer": {"type": ...}}?)"},
      {R"("zero_optimization.stge": 3)",
       R"("zero_optimization.stge": is not a known key, for a dot does not nest; did you mean )"
       R"({"zero_optimization": {"stage": ...}}?)"},
      {R"("optimizer": {"type": "AdamW", "params.lr": 1})",
       R"(optimizer."params.lr": is not a known key, for a dot does not nest; did you mean )"
       R"({"params": {"lr": ...}}?)"},
      {R"("gradient_clipping": 1, "gradient_clipping": 1)",
       "gradient_clipping: is given more than once; keep one"},
      {R"("zerod": {"units": {"a": "x", "a": "y"}})",
       "zerod.units.a: is given more than once; keep one"},
  };
  for (const auto& c : cases) {
    const std::vector<std::string> problems = Problems(With(c.members));
    ASSERT_EQ(problems.size(), 1u) << c.members << "\n" << testing::PrintToString(problems);
    EXPECT_EQ(problems[0], c.line);
  }
  const std::vector<std::string> problems = Problems(With(R"("": 1)"));
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_THAT(problems[0], HasSubstr(R"("": is not a known key; the keys here are train_batch_)"));
  EXPECT_THAT(problems[0], Not(HasSubstr("pipeline"))) << "only what works is offered";
}

TEST(ConfigTest, BatchTriangle) {
  const struct {
    const char* json;
    uint32_t world;
    uint64_t train, micro, accumulation;
  } cases[] = {
      {R"({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3,
           "gradient_accumulation_steps": 4})", 2, 24, 3, 4},
      {R"({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3})", 2, 24, 3, 4},
      {R"({"train_batch_size": 24, "gradient_accumulation_steps": 4})", 2, 24, 3, 4},
      {R"({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4})", 2, 24, 3, 4},
      {R"({"train_batch_size": 24})", 2, 24, 12, 1},
      {R"({"train_micro_batch_size_per_gpu": 3})", 2, 6, 3, 1},
      {R"({"train_batch_size": 8.0})", 1, 8, 8, 1},
      {R"({"train_batch_size": 8, "train_micro_batch_size_per_gpu": null})", 1, 8, 8, 1},
      {R"({"train_batch_size": null, "train_micro_batch_size_per_gpu": 5})", 1, 5, 5, 1},
  };
  for (const auto& c : cases) {
    const Config config = Good(c.json, c.world);
    EXPECT_EQ(config.train_batch_size, c.train) << c.json;
    EXPECT_EQ(config.micro_batch_size, c.micro) << c.json;
    EXPECT_EQ(config.gradient_accumulation_steps, c.accumulation) << c.json;
    EXPECT_EQ(*Config::Parse(config.ToJson(), c.world), config);
  }
}

TEST(ConfigTest, BatchTriangleRefusals) {
  const struct {
    const char* json;
    uint32_t world;
    const char* says;
  } cases[] = {
      {"{}", 1, "train_batch_size: is missing; give it or train_micro_batch_size_per_gpu"},
      {R"({"gradient_accumulation_steps": 2})", 1, "train_batch_size: is missing"},
      {R"({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3,
           "gradient_accumulation_steps": 2})", 1,
       "train_batch_size: 8 is not train_micro_batch_size_per_gpu 3 x "
       "gradient_accumulation_steps 2 x 1 ranks = 6; change one of them"},
      {R"({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3})", 1, "3 x gradient_acc"},
      {R"({"train_batch_size": 2, "train_micro_batch_size_per_gpu": 4})", 1, "ranks = 0"},
      {R"({"train_batch_size": 2})", 4, "2 is not train_micro_batch_size_per_gpu 0"},
      {R"({"train_batch_size": 9})", 4, "9 is not train_micro_batch_size_per_gpu 2"},
      {R"({"train_batch_size": 9, "gradient_accumulation_steps": 2})", 1, "4 x gradient"},
      {R"({"train_batch_size": 0})", 1, "train_batch_size: 0 is not allowed"},
      {R"({"train_batch_size": -8})", 1, "train_batch_size: -8 is not allowed"},
      {R"({"train_batch_size": "8"})", 1, R"(train_batch_size: "8" is not allowed)"},
      {R"({"train_batch_size": 8.5})", 1, "train_batch_size: 8.5 is not allowed"},
      {R"({"train_batch_size": 8, "gradient_accumulation_steps": 0})", 1,
       "gradient_accumulation_steps: 0 is not allowed"},
      {R"({"train_micro_batch_size_per_gpu": 1099511627776,
           "gradient_accumulation_steps": 1099511627776})", 4294967295u,
       "which is more than 1099511627776"},
      {R"({"train_batch_size": 8})", 0, "world: 0 is not allowed"},
  };
  for (const auto& c : cases) {
    const std::vector<std::string> problems = Problems(c.json, c.world);
    ASSERT_EQ(problems.size(), 1u) << c.json << "\n" << testing::PrintToString(problems);
    EXPECT_THAT(problems[0], HasSubstr(c.says)) << c.json;
  }
}

TEST(ConfigTest, AllProblemsAreReportedAtOnce) {
  const std::vector<std::string> problems = Problems(R"({
    "gradient_clipping": "x", "fp16": {"hysteresis": 0}, "bf16": {"enabeld": 1},
    "zero_optimization": {"stage": 4, "stage": 4, "stage3_max_live_parameters": 0},
    "optimizer": {"type": "MuAdam", "params": {"lr": -1, "betas": []}},
    "zerod": {"job": "?"}})");
  EXPECT_EQ(problems.size(), 11u) << testing::PrintToString(problems);
}

TEST(ConfigTest, TheListOfProblemsIsBounded) {
  std::string members = "\"gradient_clipping\": 1";
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&members, ", \"fp16", i, "\": 1");
  const std::vector<std::string> problems = Problems(With(members));
  ASSERT_EQ(problems.size(), 65u);
  EXPECT_EQ(problems.back(), "and 936 more; mend these first");
}

TEST(ConfigTest, LongValuesAndStrangeKeysAreShownShortAndPrintable) {
  const std::string json = With(absl::StrCat("\"zerod\": {\"job\": \"", std::string(5000, 'a'),
                                             "\", \"", std::string(5000, 'b'),
                                             "\": 1, \"\\u001b[31m\\n\": 1}"));
  const std::vector<std::string> problems = Problems(json);
  ASSERT_EQ(problems.size(), 3u) << testing::PrintToString(problems);
  for (const std::string& problem : problems) {
    EXPECT_LT(problem.size(), 400u);
    for (const char c : problem) EXPECT_TRUE(c >= ' ' && c <= '~') << problem;
  }
}

TEST(ConfigTest, EqualConfigurationsHaveEqualTexts) {
  const Config a = Good(R"({"train_batch_size": 8, "bf16": {"enabled": false},
                            "zerod": {"linger_seconds": 600, "units": ["b", "a"]}})", 2);
  const Config b = Good(R"({"zerod": {"units": {"a": "a", "b": "b"}, "linger_seconds": 6e2},
                            "train_micro_batch_size_per_gpu": 4.0})", 2);
  EXPECT_EQ(a, b);
  EXPECT_EQ(a.ToJson(), b.ToJson());
  const Config c = Good(R"({"train_batch_size": 8})", 2);
  EXPECT_NE(a, c);
  EXPECT_NE(a.ToJson(), c.ToJson());
}

}  // namespace
}  // namespace zerod
