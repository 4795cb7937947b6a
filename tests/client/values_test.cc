// SPDX-License-Identifier: Apache-2.0
//
// The exchange of values, against a daemon in this process.
#include <cstring>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/shm/format.h"
#include "tests/client/fake_daemon.h"

namespace zerod::client {
namespace {

using ::testing::ElementsAre;

TEST(Values, PutAndReadGoInPieces) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  std::vector<float> stored(20000);
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    auto* area = reinterpret_cast<float*>(daemon.transfer());
    if (entry.op == shm::Op::kPut) {
      memcpy(stored.data() + entry.arg0, area, entry.arg1 * 4);
    } else if (entry.op == shm::Op::kRead) {
      EXPECT_EQ(entry.flags, static_cast<uint16_t>(shm::StateKind::kExpAvgSq));
      memcpy(area, stored.data() + entry.arg0, entry.arg1 * 4);
    }
    return FakeDaemon::Reply{};
  });
  std::vector<float> values(5000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i + 1);
  ASSERT_TRUE(client->Put(kB, 100, values.data(), values.size(), StateKind::kMaster).ok());
  daemon.Sync();
  EXPECT_EQ(daemon.requests().size(), 3u);  // 2048 values each
  EXPECT_EQ(stored[100], 1.0f);
  EXPECT_EQ(stored[5099], 5000.0f);
  EXPECT_EQ(stored[5100], 0.0f);
  std::vector<float> read(5000);
  ASSERT_TRUE(client->Read(kB, 100, read.data(), read.size(), StateKind::kExpAvgSq).ok());
  EXPECT_EQ(read, values);
}

TEST(Values, RangesAndHoldsAreChecked) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  const float value = 0;
  EXPECT_EQ(client->Put(kB, 20000, &value, 1, StateKind::kMaster).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client->Put(kB, 1, &value, ~uint64_t{0}, StateKind::kMaster).code(),
            absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(client->Gather(kB).ok());
  EXPECT_EQ(client->Put(kB, 0, &value, 1, StateKind::kMaster).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(Values, AllReduceReturnsTheDaemonsResult) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    EXPECT_EQ(entry.flags, static_cast<uint16_t>(shm::ScalarOp::kMax));
    for (uint64_t i = 0; i < entry.arg0; ++i) {
      daemon.complete()->scalar.value[i] = daemon.submit()->scalar.value[i] * 2;
    }
    return FakeDaemon::Reply{};
  });
  const auto result = client->AllReduce({1, 2.5}, ScalarOp::kMax);
  ASSERT_TRUE(result.ok());
  EXPECT_THAT(*result, ElementsAre(2, 5));
  EXPECT_EQ(client->AllReduce(std::vector<double>(65), ScalarOp::kMax).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Values, StateIsPutWithItsKindAndWhateverIsHeld) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  const float value = 0;
  ASSERT_TRUE(client->Gather(kB).ok());
  ASSERT_TRUE(client->Put(kB, 0, &value, 1, StateKind::kExpAvg).ok());
  EXPECT_EQ(daemon.requests().back().op, shm::Op::kPut);
  EXPECT_EQ(daemon.requests().back().flags, static_cast<uint16_t>(shm::StateKind::kExpAvg));
}

TEST(Values, AGradientIsHandedOverOnceWhateverWasLanded) {
  for (const bool node_sum : {false, true}) {
    FakeDaemon daemon(FakeDaemon::MakePlan(node_sum));
    auto client = daemon.Attach();
    const std::vector<float> gradient(client->parameters()[4].elements, 1.0f);
    ASSERT_TRUE(client->Land(3, gradient.data(), DType::kFloat32).ok());
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(client->Scatter(kB, true).ok());  // nothing there: nothing is sent
      EXPECT_EQ(client->HandOver(kA).value(), 1u);
      EXPECT_EQ(client->HandOver(kB).value(), 1u);
    }
    EXPECT_TRUE(client->Scattered(kA) && client->Scattered(kB));
    daemon.WaitForRequests(2);
    const std::vector<shm::SubmitEntry> requests = daemon.requests();
    ASSERT_EQ(requests.size(), 2u);
    for (const shm::SubmitEntry& entry : requests) {
      EXPECT_EQ(entry.op, shm::Op::kScatter);
      EXPECT_EQ(entry.flags, shm::kLast);
    }
    EXPECT_EQ(requests[0].unit, kA);
    EXPECT_EQ(requests[1].unit, kB);
    EXPECT_EQ(client->Land(4, gradient.data(), DType::kFloat32).code(),
              absl::StatusCode::kFailedPrecondition);
  }
}

// A RECLAIM closes that many rounds of every unit (Job::CloseRounds), also of one whose gradients
// are still to come.
TEST(Values, RoundsAreCountedAsTheDaemonCountsThem) {
  FakeDaemon daemon(FakeDaemon::MakePlan());
  auto client = daemon.Attach();
  EXPECT_EQ(client->HandOver(kA).value(), 1u);
  ASSERT_TRUE(client->Reclaim(kA).ok());
  EXPECT_EQ(client->HandOver(kA).value(), 2u);
  EXPECT_EQ(client->HandOver(kB).value(), 2u);
}

TEST(Values, ThereIsALastRound) {
  FakeDaemon daemon(FakeDaemon::MakePlan());
  auto client = daemon.Attach();
  for (uint32_t round = 1; round <= shm::kRoundsMax; ++round) {
    ASSERT_EQ(client->HandOver(kA).value(), round);
    ASSERT_TRUE(client->Reclaim(kA).ok());
  }
  const absl::Status status = client->HandOver(kA).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("255 times"));
}

// The order is the client's here, the layout's there.
TEST(Values, ProgressGoesBothWays) {
  AttachPlan plan = FakeDaemon::MakePlan();
  std::swap(plan.parameters[0].touched, plan.parameters[3].touched);
  FakeDaemon daemon(plan);
  auto client = daemon.Attach();
  const size_t bytes = shm::ProgressBytes(plan.parameters.size());
  std::vector<std::byte> kept(bytes);
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    EXPECT_EQ(entry.arg0, plan.parameters.size());
    if (entry.op == shm::Op::kRestore) {
      memcpy(kept.data(), daemon.transfer(), bytes);
      memset(daemon.transfer(), 0, bytes);
      daemon.complete()->loss_scale = 512;
    } else {
      EXPECT_EQ(entry.op, shm::Op::kReadProgress);
      memcpy(daemon.transfer(), kept.data(), bytes);
    }
    return FakeDaemon::Reply{};
  });
  OptimizerProgress progress;
  for (uint64_t i = 0; i < plan.parameters.size(); ++i) progress.parameter_steps.push_back(10 + i);
  progress.loss_scaler = {512, 20, 3, 2};
  EXPECT_EQ(client->loss_scale(), 1);
  ASSERT_TRUE(client->Restore(progress).ok());
  EXPECT_EQ(client->loss_scale(), 512);
  daemon.Sync();
  shm::ProgressRecord record;
  memcpy(&record, kept.data(), sizeof(record));
  EXPECT_EQ(record.has_loss_scaler, 1u);
  std::vector<uint64_t> steps(plan.parameters.size());
  memcpy(steps.data(), kept.data() + sizeof(record), 8 * steps.size());
  EXPECT_THAT(steps, ElementsAre(13, 11, 12, 10, 14, 15));
  const auto read = client->ReadProgress();
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->parameter_steps, progress.parameter_steps);
  ASSERT_TRUE(read->loss_scaler.has_value());
  EXPECT_EQ(read->loss_scaler->scale, 512);
  EXPECT_EQ(read->loss_scaler->iterations, 20u);
  EXPECT_EQ(read->loss_scaler->last_overflow, 3);
  EXPECT_EQ(read->loss_scaler->hysteresis, 2u);
  progress.parameter_steps.pop_back();
  EXPECT_EQ(client->Restore(progress).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace zerod::client
