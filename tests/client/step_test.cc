// SPDX-License-Identifier: Apache-2.0
//
// Gradients under both plans, steps, and the exchange of values, against a daemon in this process.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
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

enum : uint32_t { kRoot, kA, kB, kFrozen };
constexpr uint64_t kGradientA = 4096;
constexpr uint64_t kSlotA = 64 + 40032 * 4;
constexpr uint64_t kSlotB = 64 + 20000 * 4;

absl::Status Land(Client& client, uint32_t parameter, float value) {
  const std::vector<float> gradient(client.parameters()[parameter].elements, value);
  return client.Land(parameter, gradient.data(), DType::kFloat32);
}

// --- per_rank ---------------------------------------------------------------------------------

TEST(PerRank, FirstLandingCopiesAndLaterOnesAdd) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 3, 1.5f).ok());
  EXPECT_EQ(daemon.gradient(kGradientA)[40000], 1.5f);
  EXPECT_EQ(daemon.touched(3), 1);
  EXPECT_EQ(daemon.touched(2), 0);
  ASSERT_TRUE(Land(*client, 3, 0.25f).ok());
  EXPECT_EQ(daemon.gradient(kGradientA)[40006], 1.75f);
  EXPECT_EQ(daemon.gradient(kGradientA)[40007], 0.0f);  // padding stays zero
  EXPECT_EQ(client->counters().scatter_bytes, 2 * 7 * 4u);
}

TEST(PerRank, LargeGradientsArriveWhole) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  std::vector<float> gradient(40000);
  for (size_t i = 0; i < gradient.size(); ++i) gradient[i] = static_cast<float>(i);
  ASSERT_TRUE(client->Land(2, gradient.data(), DType::kFloat32).ok());
  EXPECT_EQ(memcmp(daemon.gradient(kGradientA), gradient.data(), gradient.size() * 4), 0);
}

TEST(PerRank, BFloat16IsWidenedExactly) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  const uint16_t gradient[7] = {0x3f80, 0xc000, 0x0001, 0x7f80, 0x8000, 0x3fc0, 0x4049};
  ASSERT_TRUE(client->Land(3, gradient, DType::kBFloat16).ok());
  const float* landed = daemon.gradient(kGradientA) + 40000;
  EXPECT_EQ(landed[0], 1.0f);
  EXPECT_EQ(landed[1], -2.0f);
  EXPECT_EQ(landed[2], std::ldexp(1.0f, -133));
  EXPECT_EQ(landed[3], std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::signbit(landed[4]));
  ASSERT_TRUE(client->Land(3, gradient, DType::kBFloat16).ok());
  EXPECT_EQ(landed[5], 3.0f);
  EXPECT_EQ(landed[6], 6.28125f);
}

TEST(PerRank, OnlyTheLastScatterIsARequest) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 2, 1).ok());
  ASSERT_TRUE(client->Scatter(kA, false).ok());
  EXPECT_FALSE(client->Scattered(kA));
  ASSERT_TRUE(Land(*client, 2, 1).ok());
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  EXPECT_TRUE(client->Scattered(kA));
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  daemon.WaitForRequests(1);
  ASSERT_EQ(daemon.requests().size(), 1u);
  EXPECT_EQ(daemon.requests()[0].op, shm::Op::kScatter);
  EXPECT_EQ(daemon.requests()[0].flags, shm::kLast);
  EXPECT_EQ(daemon.requests()[0].unit, kA);
  EXPECT_EQ(daemon.requests()[0].step, 1u);
}

TEST(PerRank, AUnitWithoutGradientsIsNeverScattered) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Scatter(kB, true).ok());
  ASSERT_TRUE(client->Step({}).ok());
  ASSERT_EQ(daemon.requests().size(), 1u);
  EXPECT_EQ(daemon.requests()[0].op, shm::Op::kStep);
}

TEST(PerRank, LateGradientsWaitForReclaim) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  std::atomic<uint64_t> reclaim_result{0};
  daemon.SetHandler([&](const shm::SubmitEntry&) {
    return FakeDaemon::Reply{true, 0, "", reclaim_result.load()};
  });
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  const absl::Status late = Land(*client, 3, 1);
  EXPECT_EQ(late.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(late.message()), HasSubstr("'layers.a'"));
  // Still needed: add.
  ASSERT_TRUE(client->Reclaim(kA).ok());
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  EXPECT_EQ(daemon.gradient(kGradientA)[40000], 2.0f);
  ASSERT_TRUE(client->Scatter(kA, true).ok());
  // Consumed: afresh.
  reclaim_result = 1;
  ASSERT_TRUE(client->Reclaim(kA).ok());
  EXPECT_EQ(daemon.touched(3), 0);
  ASSERT_TRUE(Land(*client, 3, 5).ok());
  EXPECT_EQ(daemon.gradient(kGradientA)[40000], 5.0f);
  ASSERT_TRUE(client->Step({}).ok());
  std::vector<shm::Op> ops;
  for (const auto& request : daemon.requests()) ops.push_back(request.op);
  using shm::Op;
  EXPECT_THAT(ops, ElementsAre(Op::kScatter, Op::kReclaim, Op::kScatter, Op::kReclaim,
                               Op::kScatter, Op::kStep));
}

TEST(PerRank, StepHandsOverTheRestAndForgets) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(Land(*client, 0, 1).ok());
  ASSERT_TRUE(Land(*client, 4, 1).ok());
  ASSERT_TRUE(client->Scatter(kB, true).ok());
  std::vector<uint8_t> touched_at_step;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    if (entry.op == shm::Op::kStep) {
      for (uint32_t i = 0; i < 6; ++i) touched_at_step.push_back(daemon.touched(i));
    }
    return FakeDaemon::Reply{};
  });
  ASSERT_TRUE(client->Step({}).ok());
  daemon.Sync();
  const auto requests = daemon.requests();
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_EQ(requests[0].unit, kB);
  EXPECT_EQ(requests[1].unit, kRoot);
  EXPECT_EQ(requests[1].flags, shm::kLast);
  EXPECT_EQ(requests[2].op, shm::Op::kStep);
  EXPECT_THAT(touched_at_step, ElementsAre(1, 0, 0, 0, 1, 0));
  EXPECT_EQ(client->step(), 2u);
  for (uint32_t i = 0; i < 6; ++i) EXPECT_EQ(daemon.touched(i), 0);
  EXPECT_FALSE(client->Scattered(kB));
  ASSERT_TRUE(Land(*client, 0, 7).ok());
  EXPECT_EQ(daemon.gradient(0)[99], 7.0f);
}

TEST(PerRank, FrozenAndUnknownParametersAreErrors) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  const absl::Status frozen = Land(*client, 5, 1);
  EXPECT_EQ(frozen.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(frozen.message()), HasSubstr("'frozen.weight'"));
  const float value = 0;
  EXPECT_EQ(client->Land(77, &value, DType::kFloat32).code(),
            absl::StatusCode::kInvalidArgument);
}

// --- node_sum ---------------------------------------------------------------------------------

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
  // What was scattered until now, oldest first.
  std::vector<shm::SubmitEntry> Scatters(FakeDaemon& daemon, Client& client) {
    EXPECT_TRUE(client.Barrier().ok());  // all before it is there then
    std::vector<shm::SubmitEntry> scatters = daemon.requests();
    std::erase_if(scatters, [](const auto& entry) { return entry.op != shm::Op::kScatter; });
    return scatters;
  }
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

// The daemon answers nothing but that there is no room, as where other ranks do not come.
TEST_F(NodeSum, FullStagingAsksForRoomOncePerAnswer) {
  FakeDaemon daemon(FakeDaemon::MakePlan(true));
  std::atomic<int> asked{0};
  std::vector<uint64_t> unanswered;  // of the daemon's thread
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    FakeDaemon::Reply reply = daemon.Default(entry);
    if (entry.op == shm::Op::kScatter) {
      unanswered.push_back(entry.cookie);
      reply.answer = false;
    } else if (entry.op == shm::Op::kMakeRoom) {
      EXPECT_EQ(entry.cookie, 0u);
      ++asked;
      daemon.Complete(unanswered.at(0));
      unanswered.erase(unanswered.begin());
    }
    return reply;
  });
  auto client = daemon.Attach();
  for (int pass = 0; pass < 6; ++pass) {
    ASSERT_TRUE(Land(*client, 2, 1).ok());
    ASSERT_TRUE(client->Scatter(kA, false).ok());
  }
  EXPECT_EQ(Scatters(daemon, *client).size(), 6u);
  EXPECT_EQ(asked, 4);  // two fit
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

// --- STEP -------------------------------------------------------------------------------------

TEST(Step, CarriesTheRecordAndTheBlob) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  shm::StepRecord record{};
  std::string blob;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    record = daemon.submit()->step;
    blob.assign(reinterpret_cast<const char*>(daemon.transfer() + 8192), entry.arg0);
    daemon.complete()->grad_norm = 12.5;
    daemon.complete()->skipped = 1;
    daemon.complete()->loss_scale = 512;
    return FakeDaemon::Reply{};
  });
  EXPECT_EQ(client->loss_scale(), 1);
  StepRequest request;
  request.max_norm = 1.5;
  request.loss_scale = 1024;
  request.want_norm = true;
  request.groups = {{0.1, 0.8, 0.99, 1e-6, 0.01}, {0.2}};
  request.groups[1].momentum = 0.7;
  request.groups[1].dampening = 0.1;
  request.groups[1].lr_decay = 0.3;
  request.groups[1].initial_accumulator_value = 0.4;
  request.groups[1].decoupled = false;
  request.groups[1].nesterov = true;
  request.groups[1].min_coeff = 0.5;
  request.groups[1].max_coeff = 0.6;
  request.groups[1].eps_inside_sqrt = true;
  request.groups[1].standard_newton_schulz = true;
  request.blob = "random state";
  const absl::StatusOr<StepResult> result = client->Step(request);
  ASSERT_TRUE(result.ok()) << result.status();
  daemon.Sync();
  EXPECT_TRUE(result->skipped);
  EXPECT_EQ(result->grad_norm, 12.5);
  EXPECT_EQ(record.max_norm, 1.5);
  EXPECT_EQ(record.loss_scale, 1024);
  EXPECT_EQ(record.want_norm, 1u);
  EXPECT_EQ(record.groups, 2u);
  EXPECT_EQ(record.group[0].eps, 1e-6);
  EXPECT_EQ(record.group[1].lr, 0.2);
  EXPECT_EQ(record.group[1].beta1, 0.9);
  EXPECT_EQ(record.group[1].momentum, 0.7);
  EXPECT_EQ(record.group[1].dampening, 0.1);
  EXPECT_EQ(record.group[1].lr_decay, 0.3);
  EXPECT_EQ(record.group[1].initial_accumulator_value, 0.4);
  EXPECT_EQ(record.group[0].max_coeff, 10);
  EXPECT_EQ(record.group[1].min_coeff, 0.5);
  EXPECT_EQ(record.group[1].max_coeff, 0.6);
  EXPECT_EQ(record.group[0].flags, uint64_t{shm::kDecoupled | shm::kBiasCorrection});
  EXPECT_EQ(record.group[1].flags,
            uint64_t{shm::kBiasCorrection | shm::kNesterov | shm::kEpsInsideSqrt |
                     shm::kStandardNewtonSchulz});
  EXPECT_EQ(result->loss_scale, 512);
  EXPECT_EQ(client->loss_scale(), 512);
  EXPECT_EQ(blob, "random state");
}

TEST(Step, GathersTheVersionItCommitted) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  ASSERT_TRUE(client->Step({}).ok());
  EXPECT_FALSE(client->Held(kA));
  EXPECT_FALSE(client->TryGather(kA));  // version 0
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(daemon.requests().back().step, 2u);
  EXPECT_EQ(daemon.hold(kA), 2u);
}

TEST(Step, RefusalDropsTheGradientsAndKeepsTheNumber) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([](const shm::SubmitEntry& entry) {
    if (entry.op != shm::Op::kStep) return FakeDaemon::Reply{};
    return FakeDaemon::Reply{true, static_cast<int32_t>(absl::StatusCode::kFailedPrecondition),
                             "ranks 0 and 1 disagree", 0};
  });
  ASSERT_TRUE(Land(*client, 3, 1).ok());
  EXPECT_EQ(client->Step({}).status(), absl::FailedPreconditionError("ranks 0 and 1 disagree"));
  EXPECT_EQ(client->step(), 1u);
  EXPECT_EQ(daemon.touched(3), 0);
  ASSERT_TRUE(Land(*client, 3, 2).ok());
  EXPECT_EQ(daemon.gradient(kGradientA)[40000], 2.0f);
}

TEST(Step, InterruptedOneIsTakenUpAgain) {
  FakeDaemon daemon;
  std::atomic<bool> interrupt{false};
  auto client = daemon.Attach([&] { return interrupt.load(); });
  uint64_t cookie = 0;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    cookie = entry.cookie;
    interrupt = true;
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  EXPECT_EQ(client->Step({}).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(client->step(), 1u);
  interrupt = false;
  daemon.Complete(cookie);
  EXPECT_TRUE(client->Step({}).ok());
  EXPECT_EQ(client->step(), 2u);
  EXPECT_EQ(daemon.requests().size(), 1u);
}

TEST(Step, TooMuchIsRefusedBeforeItIsSent) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  StepRequest request;
  request.groups.resize(shm::kGroupsMax + 1);
  EXPECT_EQ(client->Step(request).status().code(), absl::StatusCode::kInvalidArgument);
  request.groups.clear();
  request.blob.resize(4097);
  const absl::Status status = client->Step(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("zerod.client_state_bytes_max"));
  EXPECT_THAT(daemon.requests(), IsEmpty());
}

TEST(Detach, EndsTheClientsUse) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  ASSERT_TRUE(client->Detach().ok());
  EXPECT_EQ(daemon.hold(kA), 0u);
  EXPECT_EQ(client->Gather(kA).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(client->Detach().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(Detach, DaemonMayHangUpBeforeItsAnswerIsRead) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([&](const shm::SubmitEntry&) {
    daemon.HangUp();
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  EXPECT_TRUE(client->Detach().ok());
}

}  // namespace
}  // namespace zerod::client
