// SPDX-License-Identifier: Apache-2.0
//
// Gradients under node_sum: parts, slots and room, against a daemon in this process.
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_daemon.h"

namespace zerod::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kSlotA = 64 + 40032 * 4;
constexpr uint64_t kSlotB = 64 + 20000 * 4;

class NodeSum : public ::testing::Test {
 protected:
  // Leaves scatters unanswered; everything else as by default.
  void HoldScatters(FakeDaemon& daemon) {
    daemon.SetHandler([&daemon](const shm::SubmitEntry& entry) {
      FakeDaemon::Reply reply = daemon.Default(entry);
      reply.answer = entry.op != shm::Op::kScatter;
      return reply;
    });
  }
  // The daemon answers a scatter where there is no room, as when other ranks do not come.
  void AnswerOnlyForRoom(FakeDaemon& daemon) {
    daemon.SetHandler([&](const shm::SubmitEntry& entry) {
      FakeDaemon::Reply reply = daemon.Default(entry);
      if (entry.op == shm::Op::kScatter) {
        unanswered_.push_back(entry.cookie);
        reply.answer = false;
      } else if (entry.op == shm::Op::kMakeRoom) {
        EXPECT_EQ(entry.cookie, 0u);
        ++asked_;
        daemon.Complete(unanswered_.at(0));
        unanswered_.erase(unanswered_.begin());
      }
      return reply;
    });
  }
  // What was scattered until now, oldest first.
  std::vector<shm::SubmitEntry> Scatters(FakeDaemon& daemon, Client& client) {
    EXPECT_TRUE(client.Barrier().ok());  // all before it is there then
    std::vector<shm::SubmitEntry> scatters = daemon.requests();
    std::erase_if(scatters, [](const auto& entry) { return entry.op != shm::Op::kScatter; });
    return scatters;
  }

  std::atomic<int> asked_{0};
  std::vector<uint64_t> unanswered_;  // of the daemon's thread
};

TEST_F(NodeSum, EachPassHasItsOwnSlot) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  HoldScatters(daemon);
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  ASSERT_TRUE(Land(*client, 3, 2).ok());
  ASSERT_TRUE(client->Scatter(kA, false).ok());
  ASSERT_TRUE(Land(*client, 2, 4).ok());
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  daemon.WaitForRequests(2);
  const auto requests = daemon.requests();
  EXPECT_EQ(requests[0].flags, 0);
  EXPECT_EQ(requests[1].flags, shm::kLast);
  EXPECT_NE(requests[0].cookie, 0u);
  EXPECT_EQ(requests[0].arg0 % 64, 0u);
  EXPECT_GE(requests[1].arg0, requests[0].arg0 + kSlotA);
  // [touched of a.weight, a.bias] then the elements.
  EXPECT_EQ(daemon.gradient_bytes(requests[0].arg0)[0], 0);
  EXPECT_EQ(daemon.gradient_bytes(requests[0].arg0)[1], 1);
  EXPECT_EQ(daemon.gradient(requests[0].arg0 + 64)[40003], 3.0f);
  EXPECT_EQ(daemon.gradient_bytes(requests[1].arg0)[0], 1);
  EXPECT_EQ(daemon.gradient_bytes(requests[1].arg0)[1], 0);
  EXPECT_EQ(daemon.gradient(requests[1].arg0 + 64)[39999], 4.0f);
  EXPECT_EQ(daemon.touched(3), 0);  // the submit file's are per_rank's
}

TEST_F(NodeSum, FullStagingWaitsForAnswersAndReusesSlotsClean) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  HoldScatters(daemon);
  auto client = daemon.Attach();
  for (int pass = 0; pass < 2; ++pass) {
    ASSERT_TRUE(Land(*client, 2, 9).ok());
    ASSERT_TRUE(Land(*client, 3, 9).ok());
    ASSERT_TRUE(client->Scatter(kA, false).ok());
  }
  daemon.WaitForRequests(2);
  const auto first = daemon.requests()[0];
  std::atomic<bool> landed{false};
  std::thread lander([&] {
    EXPECT_TRUE(Land(*client, 3, 1).ok());
    landed = true;
  });
  // It waits for the daemon, whatever else happens.
  EXPECT_TRUE(client->Gather(kB).ok());
  EXPECT_TRUE(client->Barrier().ok());
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  while (daemon.submit()->sleeping.load() == 0 && absl::Now() < limit) std::this_thread::yield();
  EXPECT_FALSE(landed);
  daemon.Complete(first.cookie);
  lander.join();
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  const auto reused = Scatters(daemon, *client).at(2);
  EXPECT_EQ(reused.arg0, first.arg0);
  EXPECT_EQ(daemon.gradient_bytes(reused.arg0)[0], 0);  // not what lay there before
  EXPECT_EQ(daemon.gradient_bytes(reused.arg0)[1], 1);
  EXPECT_EQ(daemon.gradient(reused.arg0 + 64)[40006], 1.0f);
  EXPECT_EQ(daemon.gradient(reused.arg0 + 64)[40007], 0.0f);  // the padding behind it
  EXPECT_GT(client->counters().scatter_wait_seconds, 0.0);
}

TEST_F(NodeSum, FullStagingAsksForRoomOncePerAnswer) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  AnswerOnlyForRoom(daemon);
  auto client = daemon.Attach();
  for (int pass = 0; pass < 6; ++pass) {
    ASSERT_TRUE(Land(*client, 2, 1).ok());
    ASSERT_TRUE(client->Scatter(kA, false).ok());
  }
  EXPECT_EQ(Scatters(daemon, *client).size(), 6u);
  EXPECT_EQ(asked_, 4);  // two fit
}

// There is a bound to requests on their way as there is one to memory.
TEST_F(NodeSum, ManySmallGradientsAskForRoomToo) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  AnswerOnlyForRoom(daemon);
  auto client = daemon.Attach();
  constexpr int kPasses = 300;
  for (int pass = 0; pass < kPasses; ++pass) {
    ASSERT_TRUE(Land(*client, 0, 1).ok());
    ASSERT_TRUE(client->Scatter(kRoot, false).ok());
  }
  EXPECT_EQ(Scatters(daemon, *client).size(), static_cast<size_t>(kPasses));
  EXPECT_GT(asked_, 0);
  EXPECT_LT(asked_, kPasses);
}

TEST_F(NodeSum, TheEndOfAMicroStepComesBehindAllOfIt) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 4, 1).ok());
  ASSERT_TRUE(Land(*client, 0, 1).ok());
  ASSERT_TRUE(client->Scatter(kRoot, true).ok());
  ASSERT_TRUE(client->EndMicroStep().ok());  // hands b over
  ASSERT_TRUE(client->EndMicroStep().ok());
  ASSERT_TRUE(Land(*client, 4, 2).ok());  // in a place of its own
  ASSERT_TRUE(client->Scatter(kB, true).ok());
  ASSERT_TRUE(client->Barrier().ok());
  std::vector<std::pair<shm::Op, uint32_t>> told;
  for (const auto& entry : daemon.requests()) {
    if (entry.op == shm::Op::kScalar || entry.op == shm::Op::kMakeRoom) continue;
    told.emplace_back(entry.op, entry.unit);
    EXPECT_EQ(entry.step, client->step());
    EXPECT_EQ(entry.cookie == 0, entry.op == shm::Op::kMicroStep);
  }
  EXPECT_THAT(told, ElementsAre(std::pair(shm::Op::kScatter, kRoot),
                                std::pair(shm::Op::kScatter, kB),
                                std::pair(shm::Op::kMicroStep, 0u),
                                std::pair(shm::Op::kMicroStep, 0u),
                                std::pair(shm::Op::kScatter, kB)));
}

TEST(PerRank, TheEndOfAMicroStepIsNoRequest) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  ASSERT_TRUE(client->EndMicroStep().ok());
  ASSERT_TRUE(client->Barrier().ok());
  EXPECT_EQ(daemon.requests().size(), 1u);
}

TEST_F(NodeSum, OpenSlotsThatLeaveNoRoomAreHandedOverEarly) {
  AttachPlan plan = FakeDaemon::MakePlan(true);
  plan.gradient_bytes = kSlotA + kSlotB;  // root and a do not fit beside b
  FakeDaemon daemon(plan);
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 4, 1).ok());  // b opens
  ASSERT_TRUE(Land(*client, 3, 1).ok());  // a opens: full
  EXPECT_THAT(daemon.requests(), IsEmpty());
  ASSERT_TRUE(Land(*client, 0, 1).ok());  // root needs room: b, the oldest, goes
  EXPECT_EQ(Scatters(daemon, *client).at(0).unit, kB);
  EXPECT_EQ(Scatters(daemon, *client).at(0).flags, 0);
  ASSERT_TRUE(Land(*client, 4, 2).ok());  // and comes back: a goes
  EXPECT_EQ(Scatters(daemon, *client).at(1).unit, kA);
  ASSERT_TRUE(client->Step({}).ok());
  std::vector<uint32_t> last;
  for (const auto& request : daemon.requests()) {
    if (request.op != shm::Op::kScatter || request.flags != shm::kLast) continue;
    last.push_back(request.unit);
  }
  EXPECT_THAT(last, ElementsAre(kRoot, kB));
}

TEST_F(NodeSum, OpenSlotsAreMovedTogetherWhereRoomIsInPieces) {
  AttachPlan plan = FakeDaemon::MakePlan(true);
  const uint64_t slot_root = 64 + 160 * 4;
  plan.gradient_bytes = kSlotA + kSlotB + slot_root - 64;
  FakeDaemon daemon(plan);
  HoldScatters(daemon);
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 4, 1).ok());  // b at the front,
  ASSERT_TRUE(Land(*client, 0, 3).ok());  // root behind it
  ASSERT_TRUE(client->Scatter(kB, true).ok());
  daemon.WaitForRequests(1);
  daemon.Complete(daemon.requests()[0].cookie);
  // Room for a is there, but root lies in its middle.
  ASSERT_TRUE(Land(*client, 2, 5).ok());
  ASSERT_TRUE(client->Scatter(kRoot, true).ok());
  daemon.WaitForRequests(2);
  const auto root = daemon.requests()[1];
  EXPECT_EQ(root.unit, kRoot);
  EXPECT_EQ(root.arg0, 0u);
  EXPECT_EQ(daemon.gradient_bytes(root.arg0)[0], 1);
  EXPECT_EQ(daemon.gradient(root.arg0 + 64)[99], 3.0f);
}

TEST_F(NodeSum, TooSmallStagingNamesTheSetting) {
  AttachPlan plan = FakeDaemon::MakePlan(true);
  plan.gradient_bytes = kSlotB;
  FakeDaemon daemon(plan);
  auto client = daemon.Attach();
  const absl::Status status = Land(*client, 2, 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("zerod.staging_bytes"));
}

AttachPlan PlanInParts(uint64_t slots) {
  AttachPlan plan = FakeDaemon::MakePlan(true);
  plan.staged_part_elements = 16 * 1024;
  plan.gradient_bytes = slots * (64 + 16 * 1024 * 4);
  return plan;
}

// The unit a has 40032 elements: two parts and a piece.
TEST_F(NodeSum, ALargeParameterLeavesPartByPart) {
  FakeDaemon daemon(PlanInParts(3));
  HoldScatters(daemon);
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 2, 5).ok());
  EXPECT_EQ(Scatters(daemon, *client).size(), 2u);  // the last part waits for the rest of the unit
  ASSERT_TRUE(Land(*client, 3, 7).ok());
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  const auto scatters = Scatters(daemon, *client);
  ASSERT_EQ(scatters.size(), 3u);
  for (uint64_t part = 0; part < 3; ++part) {
    EXPECT_EQ(scatters[part].arg1, part);
    EXPECT_EQ(scatters[part].flags, part < 2 ? 0 : shm::kLast);
    EXPECT_EQ(daemon.gradient_bytes(scatters[part].arg0)[0], 1);
    EXPECT_EQ(daemon.gradient_bytes(scatters[part].arg0)[1], part < 2 ? 0 : 1);
    EXPECT_EQ(daemon.gradient(scatters[part].arg0 + 64)[0], 5.0f);
  }
  const float* const rest = daemon.gradient(scatters[2].arg0 + 64);
  EXPECT_EQ(rest[39999 - 32768], 5.0f);
  EXPECT_EQ(rest[40000 - 32768], 7.0f);
  EXPECT_EQ(rest[40007 - 32768], 0.0f);
}

// The mark is sent though everything had left before it: other ranks' sums wait for it.
TEST_F(NodeSum, WhatLeftEarlyIsMarkedByAnEmptySlot) {
  FakeDaemon daemon(PlanInParts(1));
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 3, 7).ok());
  ASSERT_TRUE(Land(*client, 4, 7).ok());  // takes the place of the former
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  const auto scatters = Scatters(daemon, *client);
  ASSERT_EQ(scatters.size(), 4u);  // a; two parts of b, the second to make room; a's mark
  EXPECT_EQ(scatters[3].unit, kA);
  EXPECT_EQ(scatters[3].flags, shm::kLast);
  EXPECT_THAT(std::vector<uint8_t>(daemon.gradient_bytes(scatters[3].arg0),
                                   daemon.gradient_bytes(scatters[3].arg0) + 2),
              ElementsAre(0, 0));
}

TEST_F(NodeSum, AGradientInterruptedHalfWayCannotBePartOfAStep) {
  FakeDaemon daemon(PlanInParts(1));
  HoldScatters(daemon);
  std::atomic<bool> interrupt{false};
  auto client = daemon.Attach([&] { return interrupt.load(); });
  interrupt = true;
  EXPECT_TRUE(absl::IsCancelled(Land(*client, 2, 5)));  // no room for the second part
  interrupt = false;
  for (const absl::Status& status :
       {Land(*client, 4, 1), client->Scatter(kA, true), client->Step({}).status()}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("'layers.a.weight' was interrupted"));
  }
}

TEST_F(NodeSum, RefusedScatterIsToldByTheNextCall) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  auto client = daemon.Attach();
  daemon.SetHandler([](const shm::SubmitEntry& entry) {
    if (entry.op != shm::Op::kScatter) return FakeDaemon::Reply{};
    return FakeDaemon::Reply{true, static_cast<int32_t>(absl::StatusCode::kInvalidArgument),
                             "bad offset", 0};
  });
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  ASSERT_TRUE(client->Barrier().ok());  // the answer is there by then
  EXPECT_EQ(client->Step({}).status(), absl::InvalidArgumentError("bad offset"));
}

TEST_F(NodeSum, WaitForRoomEndsWithTheInterrupt) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  HoldScatters(daemon);
  std::atomic<bool> interrupt{false};
  auto client = daemon.Attach([&] { return interrupt.load(); });
  for (int pass = 0; pass < 2; ++pass) {
    ASSERT_TRUE(Land(*client, 2, 1).ok());
    ASSERT_TRUE(client->Scatter(kA, false).ok());
  }
  interrupt = true;
  EXPECT_EQ(Land(*client, 2, 1).code(), absl::StatusCode::kCancelled);
  interrupt = false;
  daemon.WaitForRequests(2);
  for (const auto& request : daemon.requests()) daemon.Complete(request.cookie);
  EXPECT_TRUE(Land(*client, 2, 1).ok());
}

}  // namespace
}  // namespace zerod::client
