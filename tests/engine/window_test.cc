// SPDX-License-Identifier: Apache-2.0
//
// A window smaller than the model: eviction, holds, growth, and what is refused.
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using core::UnitIndex;

// Units of 2 chunks and more; room for a few of them.
ClusterOptions SmallWindow(uint32_t clients, const std::string& zerod_keys = "") {
  ClusterOptions options;
  options.local_world = clients;
  options.config = ConfigText(3, core::DType::kFloat32,
                              "\"stage3_param_persistence_threshold\": 2000, "
                              "\"stage3_max_live_parameters\": 80000, "
                              "\"stage3_prefetch_bucket_size\": 0",
                              zerod_keys);
  options.model = SmallModel(core::DType::kFloat32, 6, 130);
  return options;
}

TEST(Window, EvictsWhatNobodyHolds) {
  Cluster cluster(SmallWindow(1));
  ASSERT_LT(cluster.runner(0).plan().window.base_chunks, cluster.layout().chunks());
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    PutInitial(cluster.layout(), client);
    for (int turn = 0; turn < 3; ++turn) {
      for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
        ASSERT_TRUE(client.Gather(u).ok());
        EXPECT_EQ(client.Values(u), InitialValues(cluster.layout(), u));
        client.Release(u);
      }
    }
  });
  EXPECT_EQ(cluster.runner(0).Snapshot().window_growths, 0u);
}

TEST(Window, GrowsForWhatIsHeld) {
  Cluster cluster(SmallWindow(1));
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    PutInitial(cluster.layout(), client);
    for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
    }
    for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
      EXPECT_EQ(client.Values(u), InitialValues(cluster.layout(), u));
    }
  });
  EXPECT_GT(cluster.runner(0).Snapshot().window_growths, 0u);
}

TEST(Window, SaysWhatIsHeldWhereItMayNotGrow) {
  Cluster cluster(SmallWindow(1, "\"window_bytes_max\": 700000"));
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    PutInitial(cluster.layout(), client);
    absl::Status refused;
    std::vector<UnitIndex> held;
    for (UnitIndex u = 0; u < cluster.layout().units().size() && refused.ok(); ++u) {
      refused = client.Gather(u);
      if (refused.ok()) held.push_back(u);
    }
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(refused.message()),
                ::testing::HasSubstr(cluster.layout().units()[held.back()].name));
    // What is held stays as it is, and released room is given out again.
    for (UnitIndex u : held) EXPECT_EQ(client.Values(u), InitialValues(cluster.layout(), u));
    for (UnitIndex u : held) client.Release(u);
    const UnitIndex next = held.back() + 1;
    EXPECT_TRUE(client.Gather(next).ok());
    EXPECT_EQ(client.Values(next), InitialValues(cluster.layout(), next));
  });
}

TEST(Window, HeldCopiesSurviveTheOtherRanksAppetite) {
  Cluster cluster(SmallWindow(2));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 0) PutInitial(cluster.layout(), client);
    EXPECT_TRUE(client.Barrier().ok());
    const UnitIndex units = static_cast<UnitIndex>(cluster.layout().units().size());
    for (int turn = 0; turn < 20; ++turn) {
      // Each rank holds one unit and walks over the others, in opposite directions.
      const UnitIndex mine = (rank * 3 + turn) % units;
      ASSERT_TRUE(client.Gather(mine).ok());
      for (UnitIndex i = 0; i < units; ++i) {
        const UnitIndex u = rank == 0 ? i : units - 1 - i;
        if (u == mine) continue;
        ASSERT_TRUE(client.Gather(u).ok());
        EXPECT_EQ(client.Values(u), InitialValues(cluster.layout(), u));
        client.Release(u);
      }
      EXPECT_EQ(client.Values(mine), InitialValues(cluster.layout(), mine));
      client.Release(mine);
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(Window, TooSmallForTheLargestUnitIsRefusedWithTheOneThatWorks) {
  ClusterOptions options = SmallWindow(1);
  const absl::StatusOr<Config> config = Config::Parse(
      ConfigText(3, core::DType::kFloat32,
                 "\"stage3_param_persistence_threshold\": 100, "
                 "\"stage3_max_live_parameters\": 2000"),
      1);
  ASSERT_TRUE(config.ok());
  JobRequest request;
  request.id = "job";
  request.config = *config;
  request.layout = std::make_shared<const core::Layout>(*core::Layout::Build(options.model, {}));
  arena::Arena arena(arena::MakeSystemMemorySource(), 0);
  FakeMetrics metrics;
  const auto runner = JobRunner::Create(request, &arena, nullptr, &metrics, [](absl::Status) {});
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(runner.status().message()),
              ::testing::HasSubstr("stage3_max_live_parameters"));
  EXPECT_EQ(arena.reserved_bytes(), 0u);
}

class NoMemory : public arena::MemorySource {
 public:
  explicit NoMemory(uint64_t bytes) : bytes_(bytes) {}
  absl::StatusOr<arena::Available> Read() override {
    return arena::Available{bytes_, "the test's limit"};
  }
  const uint64_t bytes_;
};

TEST(Window, MemoryThatIsNotThereIsRefusedWithTheNumbers) {
  JobRequest request;
  request.id = "job";
  request.config = *Config::Parse(ConfigText(0, core::DType::kFloat32), 1);
  request.layout = std::make_shared<const core::Layout>(
      *core::Layout::Build(SmallModel(core::DType::kFloat32, 4, 130), {}));
  FakeMetrics metrics;
  arena::Arena arena(std::make_unique<NoMemory>(1 << 20), 0);
  const auto runner = JobRunner::Create(request, &arena, nullptr, &metrics, [](absl::Status) {});
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(arena.reserved_bytes(), 0u);
}

}  // namespace
}  // namespace zerod::engine::testing
