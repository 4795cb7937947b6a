// SPDX-License-Identifier: Apache-2.0
//
// Gradients under per_rank, and steps, against a daemon in this process.
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_daemon.h"

namespace zerod::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kGradientA = 4096;

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

// --- Waits -------------------------------------------------------------------------------------

TEST(Waits, AreToldOfWhenTheyAreLong) {
  FakeDaemon daemon;
  std::atomic<uint64_t> barrier{0};
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    FakeDaemon::Reply reply = daemon.Default(entry);
    if (entry.op == shm::Op::kScalar) {
      barrier = entry.cookie;
      reply.answer = false;
    }
    return reply;
  });
  std::vector<std::string> told;
  auto client = daemon.Attach(nullptr, [&](const std::string& text) {
    if (barrier == 0) return;  // of the gather, where the machine is slow
    told.push_back(text);
    if (told.size() == 2) daemon.Complete(barrier);
  });
  EXPECT_TRUE(client->Gather(kB).ok());
  EXPECT_TRUE(client->Barrier().ok());
  ASSERT_EQ(told.size(), 2u);
  EXPECT_THAT(told[0], HasSubstr("still waiting for "));
  EXPECT_THAT(told[0], HasSubstr("'zerodctl --address unix:/fake jobs'"));
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
