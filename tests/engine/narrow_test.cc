// SPDX-License-Identifier: Apache-2.0
//
// Master weights and optimizer states in 16 bits: the bits of plain loops that round after each
// step, wherever the weights are kept.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using core::UnitIndex;

constexpr char kSmallWindow[] =
    "\"stage3_param_persistence_threshold\": 2000, \"stage3_max_live_parameters\": 70000, "
    "\"stage3_prefetch_bucket_size\": 20000";
constexpr char kMasters[] = "\"bf16_master_weights_and_grads\": true";
constexpr char kBoth[] =
    "\"bf16_master_weights_and_grads\": true, \"bf16_optimizer_states\": true";
constexpr char kFp16Masters[] = "\"fp16_master_weights_and_grads\": true";

struct Case {
  std::string name;
  uint32_t stage;
  core::DType dtype;
  std::string keys;  // of the type's block
  uint32_t members;
  uint32_t local_world;
  bool node_sum;
  std::string zero_keys;
};

ClusterOptions OptionsOf(const Case& c) {
  ClusterOptions options;
  options.members = c.members;
  options.local_world = c.local_world;
  const std::string text = ConfigText(
      c.stage, c.dtype, c.zero_keys,
      absl::StrCat("\"gradient_plan\": \"", c.node_sum ? "node_sum" : "per_rank", "\""));
  options.config = absl::StrReplaceAll(
      text, {{"\"enabled\": true", absl::StrCat("\"enabled\": true, ", c.keys)}});
  options.model = SmallModel(c.dtype, 4, 130);
  return options;
}

class Narrow : public ::testing::TestWithParam<Case> {};

TEST_P(Narrow, TrainsAsRoundingLoopsDo) {
  const Case& c = GetParam();
  Cluster cluster(OptionsOf(c));
  const core::JobPlan& plan = cluster.runner(0).plan();
  ASSERT_FALSE(plan.form.masters);
  ASSERT_EQ(plan.form.state_bytes, c.keys == kBoth ? 2u : 4u);
  EXPECT_EQ(plan.memory.parameters, 0u);
  Workload workload = DefaultWorkload();
  workload.micro_steps = 2;
  workload.hyper.max_norm = 0.5;
  constexpr uint64_t kSteps = 4;
  Reference reference(&cluster.layout(), c.members, c.local_world, c.node_sum, plan.form);
  std::vector<double> expected_norms;
  for (uint64_t i = 0; i < kSteps; ++i) {
    reference.Step(workload);
    expected_norms.push_back(reference.grad_norm());
  }
  const JobState expected = StateOf(cluster.layout(), reference);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    std::vector<double> norms;
    Train(cluster.layout(), rank, client, workload, kSteps, /*fresh=*/true, &norms);
    EXPECT_EQ(norms, expected_norms);
    EXPECT_TRUE(ReadState(cluster.layout(), client) == expected) << "rank " << rank;
    for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
      EXPECT_EQ(client.Values(u), reference.Seen(u)) << "rank " << rank << " unit " << u;
      client.Release(u);
    }
    EXPECT_TRUE(client.Barrier().ok());
    EXPECT_TRUE(client.Detach().ok());
  });
  for (uint32_t m = 0; m < c.members; ++m) EXPECT_TRUE(cluster.WaitForEnd(m).ok());
}

constexpr core::DType kBf16 = core::DType::kBFloat16;
constexpr core::DType kFp16 = core::DType::kFloat16;

std::string CaseName(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(
    Forms, Narrow,
    ::testing::Values(Case{"Stage0", 0, kBf16, kBoth, 1, 1, false, ""},
                      Case{"Stage3Resident", 3, kBf16, kBoth, 1, 2, false, ""},
                      Case{"Stage3SmallWindow", 3, kBf16, kBoth, 1, 2, true, kSmallWindow},
                      Case{"Masters", 2, kBf16, kMasters, 1, 2, false, ""},
                      Case{"Fp16Masters", 3, kFp16, kFp16Masters, 1, 2, false, kSmallWindow},
                      Case{"TwoStage0", 0, kBf16, kBoth, 2, 1, false, ""},
                      Case{"TwoStage1", 1, kBf16, kBoth, 2, 1, false, ""},
                      Case{"TwoStage2", 2, kFp16, kFp16Masters, 2, 2, true, ""},
                      Case{"TwoStage3", 3, kBf16, kBoth, 2, 1, false, ""},
                      Case{"TwoStage3SmallWindow", 3, kBf16, kBoth, 2, 2, true, kSmallWindow}),
    CaseName);

TEST(NarrowPlan, TakesSixBytesPerParameterWhereItTookFourteen) {
  const Case c{"", 2, kBf16, kBoth, 1, 1, false, ""};
  Cluster cluster(OptionsOf(c));
  const core::MemoryPlan& memory = cluster.runner(0).plan().memory;
  EXPECT_EQ(memory.parameters, 0u);
  EXPECT_LE(memory.moments, 4 * cluster.layout().trainable_elements() + 2 * 4096);
  EXPECT_GE(memory.moments, 4 * cluster.layout().trainable_elements());
}

}  // namespace
}  // namespace zerod::engine::testing
