// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/traffic.h"

#include <gtest/gtest.h>

#include "tests/core/models.h"

namespace zerod::core {
namespace {

constexpr uint64_t kPlenty = uint64_t{1} << 50;

Config Stage(uint32_t stage) {
  Config config;
  config.gradient_accumulation_steps = 1;
  config.zero.stage = stage;
  config.zero.param_persistence_threshold = 0;
  return config;
}

TrafficPlan Of(const Config& config, const Layout& layout, uint32_t members, MemberIndex self,
               uint32_t local_world = 1) {
  const JobPlan plan = *PlanJob(config, layout, members, self, local_world, kPlenty);
  return PlanTraffic(config, layout, plan, members, self, local_world);
}

struct Case {
  uint32_t stage;
  uint32_t members;
  DType dtype;
  double sent_per_element;  // of each member
};
class TrafficStages : public ::testing::TestWithParam<Case> {};

// What each of N members sends per parameter: (N-1)/N of a gradient, in the parameters' type, to
// its owner, and of an updated parameter to those who want it, or at stage 0 of the reduced
// gradient, in fp32, to all.
TEST_P(TrafficStages, BytesOnTheWire) {
  const Case& c = GetParam();
  ModelDescription model = Gpt(8, 128);
  model.dtype = c.dtype;
  const Layout layout = *Layout::Build(model, {});
  uint64_t sent = 0;
  uint64_t received = 0;
  for (MemberIndex self = 0; self < c.members; ++self) {
    const TrafficPlan t = Of(Stage(c.stage), layout, c.members, self, 2);
    EXPECT_EQ(t.gathered, layout.elements() * DTypeBytes(c.dtype));
    EXPECT_EQ(t.scattered, 2 * 4 * layout.parameter_elements());
    EXPECT_NEAR(static_cast<double>(t.sent),
                c.sent_per_element * static_cast<double>(layout.elements()),
                0.05 * c.sent_per_element * static_cast<double>(layout.elements()));
    sent += t.sent;
    received += t.received;
  }
  EXPECT_EQ(sent, received);
}

INSTANTIATE_TEST_SUITE_P(Stages, TrafficStages,
                         ::testing::Values(Case{0, 2, DType::kFloat32, 4.0},
                                           Case{1, 2, DType::kFloat32, 4.0},
                                           Case{2, 2, DType::kBFloat16, 2.0},
                                           Case{3, 2, DType::kFloat32, 4.0},
                                           Case{3, 2, DType::kBFloat16, 2.0},
                                           Case{0, 4, DType::kFloat32, 6.0},
                                           Case{2, 4, DType::kFloat32, 6.0},
                                           Case{3, 4, DType::kBFloat16, 3.0}));

TEST(TrafficTest, OneMemberSendsNothing) {
  const Layout layout = *Layout::Build(Gpt(4), {});
  for (uint32_t stage : {0u, 1u, 2u, 3u}) {
    const TrafficPlan t = Of(Stage(stage), layout, 1, 0);
    EXPECT_EQ(t.sent, 0u);
    EXPECT_EQ(t.received, 0u);
    EXPECT_EQ(t.gathered, 4 * layout.elements());
  }
}

// Three units of equal size in a window for two of them: in each turn from a pass to the next, two
// are still there.
TEST(TrafficTest, WhatTakesTurnsInTheWindowIsGatheredAgain) {
  const Layout layout = Units({32768, 32768, 32768});
  Config config = Stage(3);
  config.zero.max_live_parameters = 2 * 32768;
  const uint64_t unit = 4 * 32768;
  EXPECT_EQ(Of(config, layout, 2, 0).gathered, 4 * unit);
  config.gradient_accumulation_steps = 2;
  EXPECT_EQ(Of(config, layout, 2, 0).gathered, 6 * unit);
  EXPECT_EQ(Of(config, layout, 2, 0).scattered, 4u * 3 * 32768);
  config.zerod.gradient_plan = GradientPlanChoice::kNodeSum;
  EXPECT_EQ(Of(config, layout, 2, 0).scattered, 2u * 4 * 3 * 32768);
  config.zero.param_persistence_threshold = 40000;
  EXPECT_EQ(Of(config, layout, 2, 0).gathered, 3 * unit);
}

TEST(TrafficTest, FrozenUnitsStayWhereTheyAre) {
  ModelBuilder b;
  b.Module("", "Model").Module("a", "A").Module("b", "B");
  b.Parameter("a.w", {4096}, {"a"}, /*trainable=*/false).Parameter("b.w", {4096}, {"b"});
  const Layout layout = *Layout::Build(b.model, {});
  for (uint32_t stage : {0u, 2u, 3u}) {
    const TrafficPlan t = Of(Stage(stage), layout, 2, 0);
    EXPECT_EQ(t.gathered, 4u * 4096);
    EXPECT_EQ(t.scattered, 4u * 4096);
  }
}

}  // namespace
}  // namespace zerod::core
