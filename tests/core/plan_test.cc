// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/core/models.h"

namespace zerod::core {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kPlenty = uint64_t{1} << 50;

Config Stage(uint32_t stage) {
  Config config;
  config.zero.stage = stage;
  config.zero.param_persistence_threshold = 0;
  return config;
}

struct Case {
  uint32_t stage;
  uint32_t members;
};
class PlanStages : public ::testing::TestWithParam<Case> {};

// What a member holds per parameter in fp32, window apart: 16, 8 + 8/N, 4 + 12/N, 16/N bytes.
TEST_P(PlanStages, BytesPerParameterOfStagesInFp32) {
  const auto [stage, members] = GetParam();
  const Layout layout = *Layout::Build(Gpt(8, 128), {});
  const double n = members;
  const double formula[] = {16, 8 + 8 / n, 4 + 12 / n, 16 / n};
  for (MemberIndex self = 0; self < members; ++self) {
    const JobPlan plan = *PlanJob(Stage(stage), layout, members, self, 2, kPlenty);
    const MemoryPlan& m = plan.memory;
    const double bytes = static_cast<double>(m.parameters + m.gradients + m.moments + m.copies);
    // Chunks and blocks are whole.
    const double slack = static_cast<double>(layout.units().size()) * 64 * 1024 +
                         16.0 * static_cast<double>(2 * layout.block_elements());
    EXPECT_NEAR(bytes, formula[stage] * static_cast<double>(layout.elements()), slack)
        << "stage " << stage << ", member " << self << " of " << members;
    EXPECT_EQ(plan.master_in_window, stage < 3);
    EXPECT_EQ(m.window > 0, stage == 3);
    EXPECT_THAT(plan.text, HasSubstr("per_rank"));
  }
}

INSTANTIATE_TEST_SUITE_P(StagesAndMembers, PlanStages,
                         ::testing::Values(Case{0, 2}, Case{1, 2}, Case{2, 2}, Case{3, 2},
                                           Case{0, 4}, Case{1, 4}, Case{2, 4}, Case{3, 4},
                                           Case{1, 3}, Case{2, 7}, Case{3, 7}));

TEST(PlanTest, MomentsAreWhatTheOptimizerKeeps) {
  const auto moments = [](std::vector<OptimizerKind> groups) {
    ModelDescription model = Gpt(2);
    model.groups = std::move(groups);
    return PlanJob(Stage(0), *Layout::Build(model, {}), 1, 0, 1, kPlenty)->memory.moments;
  };
  const uint64_t two = moments({OptimizerKind::kAdam});
  EXPECT_EQ(moments({OptimizerKind::kLion}), two / 2);
  EXPECT_EQ(moments({OptimizerKind::kSgdMomentum}), two / 2);
  EXPECT_EQ(moments({OptimizerKind::kSgd}), 0u);
}

TEST(PlanTest, OneMemberWithRoomForEverythingTrainsInTheWindow) {
  const Layout layout = *Layout::Build(Gpt(4), {});
  const JobPlan plan = *PlanJob(Stage(3), layout, 1, 0, 1, kPlenty);
  EXPECT_TRUE(plan.master_in_window);
  EXPECT_EQ(plan.memory.parameters, layout.chunks() * 64 * 1024);
  EXPECT_EQ(plan.memory.window, 0u);
  EXPECT_EQ(plan.memory.gradients, 0u);
  EXPECT_EQ(plan.memory.moments, 8 * layout.trainable_elements());
}

TEST(PlanTest, Bf16KeepsFp32MastersBesideTheCopies) {
  ModelDescription model = Gpt(8, 128);
  model.dtype = DType::kBFloat16;
  const Layout layout = *Layout::Build(model, {});
  const JobPlan full = *PlanJob(Stage(0), layout, 2, 0, 1, kPlenty);
  EXPECT_FALSE(full.master_in_window);
  EXPECT_EQ(full.memory.parameters, 4 * layout.elements());
  EXPECT_EQ(full.memory.copies, layout.chunks() * 64 * 1024);
  const Partition partition(layout, 2);
  const JobPlan sharded = *PlanJob(Stage(3), layout, 2, 1, 1, kPlenty);
  EXPECT_EQ(sharded.memory.parameters, 4 * partition.ShardElements(1));
  EXPECT_EQ(sharded.memory.copies, 2 * partition.ShardElements(1));
}

// Reads the number behind `words` in a message.
uint64_t NumberAfter(const std::string& text, const std::string& words) {
  const size_t at = text.find(words);
  EXPECT_NE(at, std::string::npos) << text;
  return at == std::string::npos ? 0 : std::strtoull(text.c_str() + at + words.size(), nullptr, 10);
}

TEST(PlanTest, AWindowThatIsTooSmallIsRefusedWithOneThatWorks) {
  const Layout layout = *Layout::Build(Gpt(6, 256), {});
  Config config = Stage(3);
  config.zero.max_live_parameters = 1000;
  absl::Status status = PlanJob(config, layout, 2, 0, 1, kPlenty).status();
  ASSERT_TRUE(absl::IsFailedPrecondition(status)) << status;
  const uint64_t works =
      NumberAfter(std::string(status.message()), "stage3_max_live_parameters to at least ");
  config.zero.max_live_parameters = works;
  const absl::StatusOr<JobPlan> plan = PlanJob(config, layout, 2, 0, 1, kPlenty);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_LT(plan->window.base_chunks, layout.chunks());
  EXPECT_EQ(plan->window.max_chunks, layout.chunks());
  config.zero.max_live_parameters = works - 16 * 1024;  // a chunk less
  EXPECT_FALSE(PlanJob(config, layout, 2, 0, 1, kPlenty).ok());
}

TEST(PlanTest, ALimitThatIsTooSmallIsRefusedWithOneThatWorks) {
  const Layout layout = *Layout::Build(Gpt(6, 256), {});
  for (uint32_t stage : {1u, 3u}) {
    Config config = Stage(stage);
    config.zerod.window_bytes_max = 70000;
    absl::Status status = PlanJob(config, layout, 2, 0, 1, kPlenty).status();
    ASSERT_TRUE(absl::IsFailedPrecondition(status)) << status;
    const std::string words =
        stage == 3 ? "zerod.window_bytes_max to at least " : "it must be at least ";
    config.zerod.window_bytes_max = NumberAfter(std::string(status.message()), words);
    EXPECT_TRUE(PlanJob(config, layout, 2, 0, 1, kPlenty).ok()) << stage;
    config.zerod.window_bytes_max -= 1;
    EXPECT_FALSE(PlanJob(config, layout, 2, 0, 1, kPlenty).ok()) << stage;
  }
}

TEST(PlanTest, HugeSettingsDoNotWrapAround) {
  const Layout layout = *Layout::Build(Gpt(2), {});
  Config config = Stage(3);
  config.zero.max_live_parameters = uint64_t{1} << 62;
  const absl::StatusOr<JobPlan> plan = PlanJob(config, layout, 2, 0, 1, kPlenty);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->window.base_chunks, layout.chunks());
}

TEST(PlanTest, PersistentUnitsAreResident) {
  const Layout layout = Units({100, 50000, 60000, 200});
  Config config = Stage(3);
  config.zero.param_persistence_threshold = 1000;
  config.zero.max_live_parameters = 70000;
  const JobPlan plan = *PlanJob(config, layout, 2, 0, 1, kPlenty);
  EXPECT_EQ(plan.window.resident, (std::vector<bool>{true, false, false, true}));
  EXPECT_EQ(plan.window.pinned, plan.window.resident);
}

TEST(PlanTest, NodeSumIsChosenWhereRanksGradientsDoNotFit) {
  const Layout layout = *Layout::Build(Gpt(8, 128), {});
  const JobPlan rich = *PlanJob(Stage(3), layout, 2, 0, 4, kPlenty);
  EXPECT_FALSE(rich.node_sum);
  EXPECT_EQ(rich.gradient_offsets.size(), layout.units().size());
  EXPECT_GE(rich.gradient_file_bytes, 4 * layout.trainable_elements());
  const JobPlan poor = *PlanJob(Stage(3), layout, 2, 0, 4, rich.memory.total() - 1);
  EXPECT_TRUE(poor.node_sum);
  EXPECT_LT(poor.memory.total(), rich.memory.total());
  EXPECT_EQ(poor.memory.accumulator, 4 * layout.trainable_elements());
  EXPECT_THAT(poor.text, HasSubstr("node_sum (a scatter may wait"));
  // With one rank its own gradient is the node's sum.
  EXPECT_FALSE(PlanJob(Stage(3), layout, 2, 0, 1, 1)->node_sum);
  Config config = Stage(3);
  config.zerod.gradient_plan = GradientPlanChoice::kPerRank;
  EXPECT_FALSE(PlanJob(config, layout, 2, 0, 4, 1)->node_sum);
  config.zerod.gradient_plan = GradientPlanChoice::kNodeSum;
  EXPECT_TRUE(PlanJob(config, layout, 2, 0, 1, kPlenty)->node_sum);
}

}  // namespace
}  // namespace zerod::core
