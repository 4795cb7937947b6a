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

uint64_t Pages(uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

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
  EXPECT_EQ(plan.memory.moments, 2 * Pages(4 * layout.trainable_elements()));
}

TEST(PlanTest, Bf16KeepsFp32MastersBesideTheCopies) {
  ModelDescription model = Gpt(8, 128);
  model.dtype = DType::kBFloat16;
  const Layout layout = *Layout::Build(model, {});
  const JobPlan full = *PlanJob(Stage(0), layout, 2, 0, 1, kPlenty);
  EXPECT_FALSE(full.master_in_window);
  EXPECT_EQ(full.memory.parameters, Pages(4 * layout.elements()));
  EXPECT_EQ(full.memory.copies, layout.chunks() * 64 * 1024);
  const Partition partition(layout, 2);
  const JobPlan sharded = *PlanJob(Stage(3), layout, 2, 1, 1, kPlenty);
  EXPECT_EQ(sharded.memory.parameters, Pages(4 * partition.ShardElements(1)));
  EXPECT_EQ(sharded.memory.copies, Pages(2 * partition.ShardElements(1)));
}

TEST(PlanTest, WhatIsNotTrainedHasNoMasterIn16Bits) {
  ModelDescription model = Gpt(8, 128);
  model.dtype = DType::kBFloat16;
  uint64_t adapters = 0;
  for (ParameterDescription& p : model.parameters) p.trainable = ++adapters % 8 == 0;
  const Layout layout = *Layout::Build(model, {});
  const uint64_t frozen = layout.elements() - layout.trainable_elements();
  ASSERT_GT(frozen, layout.trainable_elements());

  // With room for everything, and below stage 3, the window has them.
  for (const int stage : {0, 2, 3}) {
    const JobPlan plan = *PlanJob(Stage(stage), layout, 1, 0, 1, kPlenty);
    EXPECT_EQ(plan.memory.parameters, Pages(4 * layout.trainable_elements()));
    EXPECT_EQ(plan.memory.copies + plan.memory.window, layout.chunks() * 64 * 1024);
  }
  // Else they are kept beside it.
  Config small = Stage(3);
  small.zero.param_persistence_threshold = 0;
  small.zero.max_live_parameters = layout.elements() / 2;
  const JobPlan evicting = *PlanJob(small, layout, 1, 0, 1, kPlenty);
  EXPECT_EQ(evicting.memory.parameters, Pages(4 * layout.trainable_elements()));
  EXPECT_EQ(evicting.memory.copies, Pages(2 * frozen));
  const Partition partition(layout, 2);
  const JobPlan sharded = *PlanJob(small, layout, 2, 1, 1, kPlenty);
  EXPECT_EQ(sharded.memory.parameters, Pages(4 * partition.TrainableShardElements(1)));
  EXPECT_EQ(sharded.memory.copies, Pages(2 * partition.ShardElements(1)));
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

// The smallest ones first, until their sum is reached.
TEST(PlanTest, TheSumOfPersistentUnitsIsBounded) {
  const Layout layout = Units({640, 320, 32, 50000, 960});
  Config config = Stage(3);
  config.zero.param_persistence_threshold = 1000;
  config.zero.max_live_parameters = 50000;
  const auto resident = [&](uint64_t sum) {
    config.zero.model_persistence_threshold = sum;
    return PlanJob(config, layout, 2, 0, 1, kPlenty)->window.resident;
  };
  EXPECT_EQ(resident(0), (std::vector<bool>{false, false, false, false, false}));
  EXPECT_EQ(resident(31), (std::vector<bool>{false, false, false, false, false}));
  EXPECT_EQ(resident(32), (std::vector<bool>{false, false, true, false, false}));
  EXPECT_EQ(resident(991), (std::vector<bool>{false, true, true, false, false}));
  EXPECT_EQ(resident(992), (std::vector<bool>{true, true, true, false, false}));
  EXPECT_EQ(resident(uint64_t{1} << 62), (std::vector<bool>{true, true, true, false, true}));
}

TEST(PlanTest, PiecesFitIntoTheStagingAndTheBuckets) {
  const Layout layout = *Layout::Build(Gpt(2, 1500), {});
  constexpr uint64_t kDefault = 500000000;
  for (uint32_t members : {1u, 2u, 3u, 7u, 64u}) {
    const uint64_t most = PieceElements(layout, members, kDefault);
    EXPECT_GE(most, 1024u);
    EXPECT_LE(most, uint64_t{1} << 20);
    if (members > 1) {
      EXPECT_LE(kPiecesInFlight * 2 * (members - 1) * most * sizeof(float), kStagingBytes);
    }
    for (uint64_t bucket : {uint64_t{0}, kBucketElementsMin, uint64_t{1000000}}) {
      const uint64_t piece = PieceElements(layout, members, bucket);
      EXPECT_GE(piece, 1024u);
      EXPECT_LE(piece, most);
      EXPECT_LE(kPiecesInFlight * members * piece, std::max(bucket, kBucketElementsMin));
    }
  }
  // A small model does not reserve what it can never use.
  EXPECT_LE(PieceElements(*Layout::Build(Gpt(1, 20), {}), 2, kDefault), 4096u);
  // However large a unit, its pieces have numbers.
  const Layout large = Units({int64_t{1} << 36});
  EXPECT_LT((uint64_t{1} << 36) / PieceElements(large, 2, 0), uint64_t{1} << 20);
}

TEST(PlanTest, BucketsBoundTheStaging) {
  const Layout layout = *Layout::Build(Gpt(4, 512), {});
  Config config = Stage(3);
  const JobPlan plain = *PlanJob(config, layout, 2, 0, 1, kPlenty);
  EXPECT_EQ(plain.in_flight_elements, 8u << 20);
  config.zero.reduce_bucket_size = 300000;
  const JobPlan reduce = *PlanJob(config, layout, 2, 0, 1, kPlenty);
  EXPECT_LT(reduce.reduce_piece_elements, plain.reduce_piece_elements);
  EXPECT_EQ(reduce.gather_piece_elements, plain.gather_piece_elements);
  EXPECT_EQ(reduce.memory.staging, plain.memory.staging);  // the other kind needs it
  config.zero.allgather_bucket_size = 300000;
  const JobPlan both = *PlanJob(config, layout, 2, 0, 1, kPlenty);
  EXPECT_EQ(both.gather_piece_elements, reduce.reduce_piece_elements);
  EXPECT_EQ(both.in_flight_elements, 300000u);
  EXPECT_LT(both.memory.staging, plain.memory.staging);
  EXPECT_EQ(both.memory.staging,
            kPiecesInFlight * 2 * sizeof(float) * both.gather_piece_elements);
  config.zero.allgather_sequential = true;
  EXPECT_EQ(PlanJob(config, layout, 2, 0, 1, kPlenty)->in_flight_elements, 1u);
  EXPECT_EQ(PlanJob(config, layout, 1, 0, 1, kPlenty)->memory.staging, 0u);
}

TEST(PlanTest, StagingDoesNotGrowWithTheLargestParameter) {
  Config config = Stage(3);
  config.zerod.gradient_plan = GradientPlanChoice::kNodeSum;
  const auto plan = [&](int64_t elements) {
    return *PlanJob(config, Units({elements, 100}), 1, 0, 2, kPlenty);
  };
  // Small: room for everything at once.
  const uint64_t header = StagedHeaderBytes(1);
  EXPECT_EQ(plan(5000).staging_bytes, Pages(5000 * 4 + 128 * 4 + 2 * header));
  EXPECT_EQ(plan(5000).staged_part_elements, kStagedPartElementsMax);
  EXPECT_EQ(plan(1 << 28).staging_bytes,
            Pages(kStagedPartsAtOnce * (header + kStagedPartElementsMax * 4)));
  config.zerod.staging_bytes = 1 << 20;
  EXPECT_EQ(plan(1 << 28).staging_bytes, 1u << 20);
  EXPECT_EQ(plan(1 << 28).staged_part_elements, (1u << 18) / kStagedPartsAtOnce);
  config.zerod.staging_bytes = 1;  // one part, as small as is possible
  EXPECT_EQ(plan(1 << 20).staged_part_elements, 1024u);
  EXPECT_EQ(plan(1 << 20).staging_bytes, Pages(header + 4096));
  EXPECT_EQ(plan(1 << 28).staged_part_elements, (1u << 28) / kStagedPartsMax);  // larger
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
  EXPECT_EQ(poor.memory.accumulator, Pages(4 * layout.trainable_elements()));
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
