// SPDX-License-Identifier: Apache-2.0
//
// A checkpoint's way out of a job and into another: weights, state tensors, the optimizer's counts
// and the loss scale. The second job goes on with the first one's bits.
#include <cstring>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using core::UnitIndex;
using ::testing::HasSubstr;

constexpr char kSmallWindow[] =
    "\"stage3_param_persistence_threshold\": 2000, \"stage3_max_live_parameters\": 70000, "
    "\"stage3_prefetch_bucket_size\": 20000";

struct Grid {
  uint32_t stage;
  uint32_t members;
  uint32_t local_world;
};

ClusterOptions Options(const Grid& grid, core::DType dtype) {
  ClusterOptions options;
  options.members = grid.members;
  options.local_world = grid.local_world;
  options.config = ConfigText(grid.stage, dtype, grid.stage == 3 ? kSmallWindow : "");
  options.model = SmallModel(dtype, 3, 90);
  return options;
}

// A unit with a frozen parameter.
UnitIndex PartlyTrained(const core::Layout& layout) {
  UnitIndex u = 0;
  while (layout.units()[u].trainable_elements == layout.units()[u].elements) ++u;
  return u;
}

struct Case {
  std::string name;
  core::DType dtype;
  Grid first;
  Grid second;
};

class Restore : public ::testing::TestWithParam<Case> {};

TEST_P(Restore, GoesOnWithTheSameBits) {
  const Case& c = GetParam();
  const Workload workload = DefaultWorkload();
  JobState state;
  core::OptimizerProgress progress;
  {
    Cluster cluster(Options(c.first, c.dtype));
    cluster.RunClients([&](uint32_t rank, FakeClient& client) {
      Train(cluster.layout(), rank, client, workload, 3, /*fresh=*/true);
      if (rank == 1) {  // any rank alone
        state = ReadState(cluster.layout(), client);
        const auto read = client.ReadProgress();
        ASSERT_TRUE(read.ok()) << read.status();
        progress = *read;
      }
      EXPECT_TRUE(client.Barrier().ok());
    });
  }
  const bool fp16 = c.dtype == core::DType::kFloat16;
  ASSERT_EQ(progress.loss_scaler.has_value(), fp16);
  EXPECT_EQ(fp16 ? progress.loss_scaler->iterations : 3u, 3u);
  Cluster cluster(Options(c.second, c.dtype));
  Reference reference(&cluster.layout(), c.second.members, c.second.local_world, false);
  for (int i = 0; i < 3; ++i) reference.Step(workload);
  ASSERT_TRUE(state == StateOf(cluster.layout(), reference));
  for (int i = 0; i < 2; ++i) reference.Step(workload);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 1) PutState(cluster.layout(), client, state);
    const auto scale = client.Restore(progress);
    ASSERT_TRUE(scale.ok()) << scale.status();
    EXPECT_EQ(*scale, 1.0);
    Workload rest = workload;
    rest.steps_before = 3;
    Train(cluster.layout(), rank, client, rest, 2, /*fresh=*/false);
    EXPECT_TRUE(ReadState(cluster.layout(), client) == StateOf(cluster.layout(), reference))
        << "rank " << rank;
    const auto after = client.ReadProgress();
    ASSERT_TRUE(after.ok()) << after.status();
    for (size_t p = 0; p < progress.parameter_steps.size(); ++p) {
      EXPECT_LE(progress.parameter_steps[p], after->parameter_steps[p]);
      EXPECT_LE(after->parameter_steps[p], progress.parameter_steps[p] + 2);
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

constexpr core::DType kFp32 = core::DType::kFloat32;
constexpr core::DType kBf16 = core::DType::kBFloat16;
constexpr core::DType kFp16 = core::DType::kFloat16;

// 1 x 2 and 2 x 1 add the same two gradients; in 16 bits the second rounds what it sends.
INSTANTIATE_TEST_SUITE_P(
    Jobs, Restore,
    ::testing::Values(Case{"Fp32OneMember", kFp32, {0, 1, 2}, {3, 1, 2}},
                      Case{"Fp32OneMemberBack", kFp32, {3, 1, 2}, {1, 1, 2}},
                      Case{"Fp32OneToTwoMembers", kFp32, {3, 1, 2}, {0, 2, 1}},
                      Case{"Fp32TwoMembersToOne", kFp32, {0, 2, 1}, {3, 1, 2}},
                      Case{"Fp32TwoMembers", kFp32, {2, 2, 1}, {3, 2, 1}},
                      Case{"Bf16OneMember", kBf16, {3, 1, 2}, {0, 1, 2}},
                      Case{"Bf16TwoMembers", kBf16, {0, 2, 1}, {3, 2, 1}},
                      Case{"Bf16TwoMembersBack", kBf16, {3, 2, 1}, {2, 2, 1}},
                      Case{"Fp16TwoMembers", kFp16, {3, 2, 1}, {0, 2, 1}}),
    [](const auto& c) { return c.param.name; });

TEST(Progress, RanksOfTwoMembersThatDifferAllHearOfIt) {
  Cluster cluster(Options({3, 2, 1}, kFp16));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    core::OptimizerProgress progress;
    progress.parameter_steps.assign(cluster.layout().parameters().size(), 4);
    progress.loss_scaler = core::LossScalerState{32, 7, 2, 1};
    core::OptimizerProgress other = progress;
    other.parameter_steps.back() += rank;
    const absl::Status refused = client.Restore(other).status();
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    EXPECT_THAT(std::string(refused.message()), HasSubstr("the ranks 0 and 1 restore"));
    EXPECT_EQ(client.ReadProgress()->parameter_steps[0], 0u);
    EXPECT_EQ(*client.Restore(progress), 32.0);
    EXPECT_TRUE(*client.ReadProgress() == progress);
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(Progress, OutlivesTheClients) {
  Cluster cluster(Options({0, 1, 1}, kFp16));
  core::OptimizerProgress progress;
  progress.parameter_steps.assign(cluster.layout().parameters().size(), 4);
  progress.loss_scaler = core::LossScalerState{32, 7, 2, 1};
  {
    Sleeper process;
    const auto attachment = cluster.Attach(0, &process);
    ASSERT_TRUE(attachment.ok()) << attachment.status();
    EXPECT_EQ(attachment->loss_scale, 1.0);
    const auto client = cluster.Client(0, *attachment);
    ASSERT_TRUE(client->Restore(progress).ok());
  }
  Sleeper process;
  absl::StatusOr<Attachment> attachment;
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  do {  // until the first one's death is known
    attachment = cluster.Attach(0, &process);
  } while (!attachment.ok() && absl::Now() < deadline);
  ASSERT_TRUE(attachment.ok()) << attachment.status();
  EXPECT_EQ(attachment->generation, 2u);
  EXPECT_EQ(attachment->loss_scale, 32.0);
  const auto client = cluster.Client(0, *attachment);
  EXPECT_TRUE(client->Barrier().ok());
  EXPECT_TRUE(*client->ReadProgress() == progress);
}

TEST(Progress, NonsenseInTheTransferAreaIsItsOwnersError) {
  Cluster cluster(Options({0, 1, 1}, kFp16));
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    const size_t bytes = shm::ProgressBytes(cluster.layout().parameters().size());
    shm::SubmitEntry entry{};
    entry.op = shm::Op::kRestore;
    entry.step = 1;
    entry.arg0 = cluster.layout().parameters().size();
    const core::OptimizerProgress before = *client.ReadProgress();
    for (const int byte : {0xff, 0x7f, 0x01}) {
      memset(client.transfer(), byte, bytes);
      entry.cookie = uint64_t{1} << 40 | static_cast<uint64_t>(byte);
      EXPECT_TRUE(absl::IsInvalidArgument(client.Request(entry).status())) << byte;
    }
    EXPECT_TRUE(*client.ReadProgress() == before);
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(State, WhatIsNotThereIsAnErrorOfWhoWritesIt) {
  ClusterOptions options = Options({3, 1, 1}, kFp32);
  options.model.groups = {core::OptimizerKind::kLion, core::OptimizerKind::kSgd};
  Cluster cluster(options);
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    const UnitIndex u = PartlyTrained(cluster.layout());
    const uint64_t last = cluster.layout().units()[u].trainable_elements - 1;
    EXPECT_TRUE(client.Put(u, last, {1.0f}, shm::StateKind::kExpAvg).ok());
    EXPECT_THAT(*client.Read(u, last, 1, shm::StateKind::kExpAvg), ::testing::ElementsAre(1.0f));
    EXPECT_TRUE(absl::IsInvalidArgument(
        client.Put(u, last, {1.0f, 2.0f}, shm::StateKind::kExpAvg)));
    EXPECT_TRUE(absl::IsInvalidArgument(
        client.Put(u, last, {1.0f}, shm::StateKind::kExpAvgSq)));
    EXPECT_THAT(*client.Read(u, last, 1, shm::StateKind::kExpAvg), ::testing::ElementsAre(1.0f));
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(State, IsWrittenWhileTheWeightsAreHeld) {
  Cluster cluster(Options({3, 1, 1}, kBf16));
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    PutInitial(cluster.layout(), client);
    for (core::UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
      const std::vector<float> values = client.Values(u);
      const uint64_t word = shm::PackUnitWord(client.Word(u));
      const core::Unit& unit = cluster.layout().units()[u];
      const std::vector<float> state(unit.trainable_elements, 3.0f);
      EXPECT_TRUE(client.Put(u, 0, state, shm::StateKind::kExpAvgSq).ok());
      EXPECT_EQ(shm::PackUnitWord(client.Word(u)), word);
      EXPECT_EQ(client.Values(u), values);
      client.Release(u);
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

struct GradientCase {
  std::string name;
  Grid grid;
  bool node_sum;
};

class GradientRead : public ::testing::TestWithParam<GradientCase> {};

TEST_P(GradientRead, GivesTheSumOfAllRanksAndChangesNothing) {
  const GradientCase& c = GetParam();
  ClusterOptions options = Options(c.grid, kFp32);
  options.config = ConfigText(c.grid.stage, kFp32, c.grid.stage == 3 ? kSmallWindow : "",
                              c.node_sum ? "\"gradient_plan\": \"node_sum\"" : "");
  Cluster cluster(options);
  const core::Layout& layout = cluster.layout();
  const Workload workload = DefaultWorkload();
  Reference reference(&layout, c.grid.members, c.grid.local_world, c.node_sum);
  for (int i = 0; i < 2; ++i) reference.Step(workload);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    Train(layout, rank, client, workload, 1, /*fresh=*/true);
    std::vector<std::vector<float>> values;
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
      values.push_back(client.Values(u));
      client.Release(u);
    }
    ASSERT_TRUE(Backward(layout, rank, client, workload).ok());
    const uint64_t step = client.step();
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      bool scattered = false;  // in Backward
      for (uint32_t p : layout.units()[u].parameters) {
        scattered |= layout.parameters()[p].trainable && Touches(workload, step, rank, p);
      }
      EXPECT_TRUE(scattered || client.Scatter(u, true).ok());
    }
    EXPECT_TRUE(client.Barrier().ok());
    for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
      const core::Parameter& p = layout.parameters()[i];
      if (!p.trainable) continue;
      std::vector<float> expected(p.elements);
      for (uint32_t r = 0; r < cluster.world(); ++r) {
        if (!Touches(workload, step, r, i)) continue;
        const std::vector<float> one = Gradient(layout, i, values[p.unit], step, r, 0);
        for (size_t e = 0; e < one.size(); ++e) expected[e] += one[e];
      }
      const auto read = client.Read(p.unit, p.offset, p.elements, shm::StateKind::kGradient);
      ASSERT_TRUE(read.ok()) << read.status();
      EXPECT_EQ(*read, expected) << "rank " << rank << " parameter " << i;
    }
    EXPECT_TRUE(client.Barrier().ok());
    ASSERT_TRUE(client.Step({workload.hyper, ""}).ok());
    EXPECT_TRUE(ReadState(layout, client) == StateOf(layout, reference));
    // Used up.
    const core::Parameter& p = layout.parameters()[0];
    EXPECT_THAT(*client.Read(p.unit, p.offset, 2, shm::StateKind::kGradient),
                ::testing::ElementsAre(0.0f, 0.0f));
    const UnitIndex frozen = PartlyTrained(layout);  // behind the trained ones
    const uint64_t last = layout.units()[frozen].trainable_elements - 1;
    EXPECT_TRUE(absl::IsInvalidArgument(
        client.Read(frozen, last, 2, shm::StateKind::kGradient).status()));
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST_P(GradientRead, FindsWhatOneRankSet) {
  const GradientCase& c = GetParam();
  ClusterOptions options = Options(c.grid, kFp32);
  options.config = ConfigText(c.grid.stage, kFp32, c.grid.stage == 3 ? kSmallWindow : "",
                              c.node_sum ? "\"gradient_plan\": \"node_sum\"" : "");
  Cluster cluster(options);
  const core::Layout& layout = cluster.layout();
  Workload workload = DefaultWorkload();
  workload.hyper.want_norm = true;
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    Train(layout, rank, client, workload, 1, /*fresh=*/true);
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
      client.Release(u);
    }
    ASSERT_TRUE(Backward(layout, rank, client, workload).ok());
    const uint64_t step = client.step();
    std::vector<bool> touched(layout.parameters().size());
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      bool scattered = false;
      for (uint32_t p : layout.units()[u].parameters) {
        scattered |= layout.parameters()[p].trainable && Touches(workload, step, rank, p);
        for (uint32_t r = 0; r < cluster.world(); ++r) {
          if (layout.parameters()[p].trainable && Touches(workload, step, r, p)) touched[p] = true;
        }
      }
      EXPECT_TRUE(scattered || client.Scatter(u, true).ok());
    }
    EXPECT_TRUE(client.Barrier().ok());
    const auto value = [](uint32_t i, uint64_t e) { return static_cast<float>(i + 1 + e % 3); };
    double squares = 0;
    for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
      if (!touched[i]) continue;
      const core::Parameter& p = layout.parameters()[i];
      std::vector<float> values(p.elements);
      for (uint64_t e = 0; e < p.elements; ++e) {
        values[e] = value(i, e);
        squares += static_cast<double>(values[e]) * values[e];
      }
      if (rank + 1 != cluster.world()) continue;
      ASSERT_TRUE(client.Put(p.unit, p.offset, values, shm::StateKind::kGradient).ok());
    }
    EXPECT_TRUE(client.Barrier().ok());
    for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
      if (!touched[i]) continue;
      const core::Parameter& p = layout.parameters()[i];
      const auto read = client.Read(p.unit, p.offset, p.elements, shm::StateKind::kGradient);
      ASSERT_TRUE(read.ok()) << read.status();
      for (uint64_t e = 0; e < p.elements; ++e) ASSERT_EQ((*read)[e], value(i, e)) << i << " " << e;
    }
    EXPECT_TRUE(client.Barrier().ok());
    const auto stepped = client.Step({workload.hyper, ""});
    ASSERT_TRUE(stepped.ok());
    const double norm = std::sqrt(squares) / (cluster.world() * workload.hyper.loss_scale);
    EXPECT_NEAR(stepped->grad_norm, norm, 1e-6 * norm);
  });
}

INSTANTIATE_TEST_SUITE_P(Grids, GradientRead,
                         ::testing::Values(GradientCase{"Stage0", {0, 1, 2}, false},
                                           GradientCase{"Stage3", {3, 1, 2}, false},
                                           GradientCase{"Stage3NodeSum", {3, 1, 2}, true},
                                           GradientCase{"TwoMembersStage0", {0, 2, 1}, false},
                                           GradientCase{"TwoMembersStage1", {1, 2, 1}, false},
                                           GradientCase{"TwoMembersStage3", {3, 2, 1}, false},
                                           GradientCase{"TwoMembersNodeSum", {3, 2, 1}, true}),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace zerod::engine::testing
