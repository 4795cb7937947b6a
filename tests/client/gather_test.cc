// SPDX-License-Identifier: Apache-2.0
//
// Gathers, holds, remaps, guards and the ways in which a wait ends, against a daemon in this
// process.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_daemon.h"

namespace zerod::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const float* Data(const Client& client, uint32_t parameter) {
  return static_cast<const float*>(client.parameters()[parameter].data);
}

TEST(Gather, ValidCopyNeedsNoRequest) {
  FakeDaemon daemon;
  daemon.Publish(kA, 0, 10, 2.5f);
  auto client = daemon.Attach();
  EXPECT_TRUE(client->TryGather(kA));
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(Data(*client, 2)[0], 2.5f);
  EXPECT_EQ(Data(*client, 2)[39999], 2.5f);
  EXPECT_EQ(daemon.hold(kA), 1u);
  EXPECT_TRUE(client->Held(kA));
  EXPECT_THAT(daemon.requests(), IsEmpty());
  EXPECT_EQ(client->counters().gather_hits, 2u);
}

TEST(Gather, AsksForWhatIsNotValidAndHoldsItMeanwhile) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  uint32_t hold_meanwhile = 0;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    hold_meanwhile = daemon.hold(entry.unit);
    return daemon.Default(entry);
  });
  EXPECT_FALSE(client->TryGather(kB));
  EXPECT_EQ(daemon.hold(kB), 0u);
  ASSERT_TRUE(client->Gather(kB).ok());
  daemon.Sync();
  EXPECT_EQ(hold_meanwhile, 1u);
  EXPECT_EQ(daemon.hold(kB), 1u);
  EXPECT_EQ(Data(*client, 4)[19999], 2.0f);
  ASSERT_EQ(daemon.requests().size(), 1u);
  EXPECT_EQ(daemon.requests()[0].step, 1u);
}

TEST(Gather, CopyOfAnotherStepIsNotTaken) {
  FakeDaemon daemon;
  daemon.Publish(kA, 7, 10, 1.0f);  // the client computes step 1 and reads version 0
  auto client = daemon.Attach();
  EXPECT_FALSE(client->TryGather(kA));
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(daemon.requests().size(), 1u);
}

TEST(Gather, FillingAndEvictingCopiesAreNotTaken) {
  FakeDaemon daemon;
  daemon.Publish(kA, 0, 10, 1.0f);
  auto client = daemon.Attach();
  for (auto state : {shm::CopyState::kAbsent, shm::CopyState::kFilling,
                     shm::CopyState::kEvicting}) {
    daemon.SetState(kA, state);
    EXPECT_FALSE(client->TryGather(kA));
    EXPECT_EQ(daemon.hold(kA), 0u);
  }
}

TEST(Gather, FollowsAUnitToOtherChunks) {
  FakeDaemon daemon;
  daemon.Publish(kA, 0, 10, 1.0f);
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(Data(*client, 2)[0], 1.0f);
  client->Release(kA);
  const uint64_t remaps = client->counters().remaps;
  // Scattered, out of order, and one where it was: two mappings.
  daemon.PublishAt(kA, 0, {20, 11, 3}, 2.0f);
  ASSERT_TRUE(client->Gather(kA).ok());
  for (uint64_t i : {0, 16384, 32768, 39999}) EXPECT_EQ(Data(*client, 2)[i], 2.0f);
  EXPECT_EQ(client->counters().remaps, remaps + 2);
}

TEST(Gather, NeighbouringChunksAreOneMapping) {
  FakeDaemon daemon;
  daemon.Publish(kA, 0, 10, 1.0f);
  auto client = daemon.Attach();
  const uint64_t remaps = client->counters().remaps;
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(client->counters().remaps, remaps + 1);
  client->Release(kA);
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(client->counters().remaps, remaps + 1);
}

TEST(Gather, DamagedChunkTableIsAnError) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.PublishAt(kA, 0, {10, 1000, shm::kNoChunk}, 1.0f);
  EXPECT_FALSE(client->TryGather(kA));
  const absl::Status status = client->Gather(kA);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("chunk table is damaged"));
  EXPECT_EQ(daemon.hold(kA), 0u);
}

TEST(Gather, RefusalIsTheDaemonsSentence) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([](const shm::SubmitEntry&) {
    return FakeDaemon::Reply{true, static_cast<int32_t>(absl::StatusCode::kResourceExhausted),
                             "no room beside unit 'x'", 0};
  });
  const absl::Status status = client->Gather(kA);
  EXPECT_EQ(status, absl::ResourceExhaustedError("no room beside unit 'x'"));
  EXPECT_EQ(daemon.hold(kA), 0u);
  EXPECT_FALSE(client->Held(kA));
}

TEST(Gather, AnswerWithoutAValidCopyIsAnError) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([](const shm::SubmitEntry&) { return FakeDaemon::Reply{}; });
  EXPECT_EQ(client->Gather(kA).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(daemon.hold(kA), 0u);
}

// Two threads, one unit: whoever looks in vain, or lets go, leaves the hold of the one who waits.
TEST(Gather, AnotherThreadKeepsTheHoldOfOneThatWaits) {
  for (const bool early : {false, true}) {
    FakeDaemon daemon;
    auto client = daemon.Attach();
    daemon.SetHandler([](const shm::SubmitEntry&) {
      return FakeDaemon::Reply{false, 0, "", 0};
    });
    absl::Status gathered;
    std::thread waiting([&] { gathered = client->Gather(kB); });
    daemon.WaitForRequests(1);
    EXPECT_EQ(daemon.hold(kB), 1u);
    EXPECT_FALSE(client->TryGather(kB));
    EXPECT_EQ(daemon.hold(kB), 1u);
    daemon.Publish(kB, 0, 10, 3.0f);
    if (early) {  // the other one opens it first, and is done with it
      EXPECT_TRUE(client->TryGather(kB));
      client->Release(kB);
      EXPECT_EQ(daemon.hold(kB), 1u);
    }
    daemon.Complete(daemon.requests()[0].cookie);
    waiting.join();
    EXPECT_TRUE(gathered.ok()) << gathered;
    EXPECT_TRUE(client->Held(kB));
    EXPECT_EQ(daemon.hold(kB), 1u);
    EXPECT_EQ(Data(*client, 4)[0], 3.0f);
    client->Release(kB);
    EXPECT_EQ(daemon.hold(kB), 0u);
  }
}

// What a tensor that outlives its client shows may be another unit's weights a moment later.
TEST(Release, ComesWithTheClientsEnd) {
  FakeDaemon daemon;
  daemon.Publish(kA, 0, 10, 2.5f);
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  const std::shared_ptr<const void> memory = client->memory();
  client.reset();
  EXPECT_EQ(daemon.hold(kA), 0u);
}

TEST(Gather, UnknownUnitIsAnError) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  EXPECT_EQ(client->Gather(99).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(client->TryGather(99));
  EXPECT_FALSE(client->Held(99));
  client->Release(99);
}

TEST(Release, ClearsTheHoldAndHintsForWhatIsNotResident) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kRoot).ok());
  ASSERT_TRUE(client->Gather(kA).ok());
  client->Release(kRoot);
  client->Release(kA);
  client->Release(kA);  // not held: nothing happens
  daemon.WaitForRequests(3);
  EXPECT_EQ(daemon.hold(kRoot), 0u);
  EXPECT_EQ(daemon.hold(kA), 0u);
  ASSERT_EQ(daemon.requests().size(), 3u);
  EXPECT_EQ(daemon.requests()[2].op, shm::Op::kRelease);
  EXPECT_EQ(daemon.requests()[2].unit, kA);
  EXPECT_EQ(daemon.requests()[2].cookie, 0u);
}

TEST(Release, ResidentUnitsStayReadable) {
  FakeDaemon daemon;
  daemon.Publish(kRoot, 0, 0, 4.0f);
  auto client = daemon.Attach();
  EXPECT_EQ(Data(*client, 0)[0], 4.0f);  // mapped by attaching
  ASSERT_TRUE(client->Gather(kRoot).ok());
  client->Release(kRoot);
  EXPECT_EQ(Data(*client, 0)[0], 4.0f);
}

TEST(Trace, HasEachGatherThatIsNew) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kB).ok());
  ASSERT_TRUE(client->Gather(kB).ok());
  ASSERT_TRUE(client->Gather(kA).ok());
  client->Release(kB);
  ASSERT_TRUE(client->Gather(kB).ok());
  EXPECT_THAT(daemon.trace(), ElementsAre(kB, kA, kB));
  ASSERT_TRUE(client->Step({}).ok());
  EXPECT_THAT(daemon.trace(), IsEmpty());
  EXPECT_FALSE(client->Held(kA));
  EXPECT_EQ(daemon.hold(kA), 0u);
}

TEST(Trace, IsBounded) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  for (uint32_t i = 0; i < shm::kTraceMax + 10; ++i) {
    ASSERT_TRUE(client->Gather(kRoot).ok());
    client->Release(kRoot);
  }
  EXPECT_EQ(daemon.trace().size(), shm::kTraceMax);
}

// --- How waits end ----------------------------------------------------------------------------

TEST(Waits, EndWithTheJobsFailure) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([&](const shm::SubmitEntry&) {
    daemon.Fail(absl::StatusCode::kAborted, "rank 1 died; attach anew");
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  EXPECT_EQ(client->Gather(kA), absl::AbortedError("rank 1 died; attach anew"));
  // Sticky, for everything.
  EXPECT_EQ(client->Gather(kRoot), absl::AbortedError("rank 1 died; attach anew"));
  EXPECT_FALSE(client->TryGather(kRoot));
  EXPECT_EQ(client->Step({}).status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(client->Barrier().code(), absl::StatusCode::kAborted);
}

TEST(Waits, EndWithTheDaemonsDeath) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([&](const shm::SubmitEntry&) {
    daemon.HangUp();
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  const absl::Time start = absl::Now();
  const absl::Status status = client->Gather(kA);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("unix:/fake is gone"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  EXPECT_EQ(daemon.hold(kA), 0u);
}

TEST(Waits, AnswerBeforeTheFailureCounts) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    daemon.Default(entry);
    daemon.Complete(entry.cookie);
    daemon.Fail(absl::StatusCode::kAborted, "too late");
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  EXPECT_TRUE(client->Gather(kA).ok());
}

TEST(Waits, EndWithTheInterrupt) {
  FakeDaemon daemon;
  std::atomic<bool> interrupt{false};
  auto client = daemon.Attach([&] { return interrupt.load(); });
  uint64_t cookie = 0;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) {
    cookie = entry.cookie;
    interrupt = true;
    return FakeDaemon::Reply{false, 0, "", 0};
  });
  const absl::Status status = client->Gather(kA);
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(daemon.hold(kA), 0u);
  // The late answer disturbs nobody.
  interrupt = false;
  daemon.SetHandler([&](const shm::SubmitEntry& entry) { return daemon.Default(entry); });
  daemon.Complete(cookie);
  EXPECT_TRUE(client->Gather(kA).ok());
  EXPECT_TRUE(client->Gather(kB).ok());
}

TEST(Waits, SeveralThreadsShareTheRing) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (uint32_t unit : {kA, kB, kFrozen}) {
    threads.emplace_back([&, unit] {
      for (int i = 0; i < 300; ++i) {
        daemon.SetState(unit, shm::CopyState::kAbsent);  // so that each one asks
        if (!client->Gather(unit).ok()) ++failures;
        client->Release(unit);
      }
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 300; ++i) {
      if (!client->Barrier().ok()) ++failures;
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
}

// --- Faults -----------------------------------------------------------------------------------

class FaultDeathTest : public ::testing::Test {
 protected:
  void SetUp() override { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};

TEST_F(FaultDeathTest, ReadOfAReleasedUnitNamesIt) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Step({}).ok());
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(Data(*client, 3)[6], 1.0f);
  client->Release(kA);
  [[maybe_unused]] volatile float sink = 0;
  EXPECT_DEATH(sink = Data(*client, 3)[6],
               "read parameter 'layers.a.bias' of unit 'layers.a' in step 2, but the unit is not "
               "gathered");
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_EQ(Data(*client, 3)[6], 1.0f);
}

TEST_F(FaultDeathTest, ReadOfAUnitThatWasNeverGatheredNamesIt) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  [[maybe_unused]] volatile float sink = 0;
  EXPECT_DEATH(sink = Data(*client, 4)[0], "'layers.b.weight' of unit 'layers.b' in step 1");
}

TEST_F(FaultDeathTest, WriteToAParameterNamesIt) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  EXPECT_DEATH(const_cast<float*>(Data(*client, 2))[5] = 1,
               "wrote to parameter 'layers.a.weight'.*read-only");
}

TEST_F(FaultDeathTest, ReadAfterTheClientsEndNamesIt) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  const float* data = Data(*client, 2);
  const std::shared_ptr<const void> memory = client->memory();
  client.reset();
  [[maybe_unused]] volatile float sink = 0;
  EXPECT_DEATH(sink = *data, "'layers.a.weight'");
}

TEST_F(FaultDeathTest, PreviousHandlerIsCalled) {
  const auto fault = [] {
    struct sigaction action {};
    action.sa_handler = [](int) {
      const char text[] = "previous handler\n";
      (void)!write(2, text, sizeof(text) - 1);
      _exit(3);
    };
    sigaction(SIGSEGV, &action, nullptr);
    FakeDaemon daemon;
    auto client = daemon.Attach();
    volatile float sink = *Data(*client, 2);
    (void)sink;
  };
  EXPECT_EXIT(fault(), ::testing::ExitedWithCode(3),
              "read parameter 'layers.a.weight'.*\n.*previous handler");
}

TEST_F(FaultDeathTest, FaultsElsewhereAreNotExplained) {
  FakeDaemon daemon;
  auto client = daemon.Attach();
  EXPECT_EXIT(raise(SIGSEGV), [](int status) { return status != 0; },
              ::testing::Not(HasSubstr("zerod: pid")));
}

TEST(Guard, CanBeOff) {
  AttachPlan plan = FakeDaemon::MakePlan();
  plan.guard_pages = false;
  FakeDaemon daemon(plan);
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  client->Release(kA);
  EXPECT_EQ(Data(*client, 2)[0], 1.0f);
}

// --- Fork -------------------------------------------------------------------------------------

TEST(Fork, ChildReadsParametersAndTouchesNothingElse) {
  FakeDaemon daemon;
  daemon.Publish(kRoot, 0, 0, 4.0f);
  auto client = daemon.Attach();
  ASSERT_TRUE(client->Gather(kA).ok());
  const pid_t child = fork();
  if (child == 0) {
    int failed = 0;
    failed |= Data(*client, 0)[0] == 4.0f ? 0 : 1;
    failed |= Data(*client, 2)[0] == 1.0f ? 0 : 2;
    failed |= absl::IsFailedPrecondition(client->Gather(kA)) ? 0 : 4;
    failed |= client->TryGather(kA) ? 8 : 0;
    client->Release(kA);
    client->ReleaseAll();
    failed |= absl::IsFailedPrecondition(client->Step({}).status()) ? 0 : 16;
    const float gradient[7] = {};
    failed |= absl::IsFailedPrecondition(client->Land(3, gradient, DType::kFloat32)) ? 0 : 32;
    failed |= absl::IsFailedPrecondition(client->Detach()) ? 0 : 64;
    client->counters();
    client.reset();
    _exit(failed);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  // The parent's attachment is as it was.
  EXPECT_EQ(daemon.hold(kA), 1u);
  EXPECT_EQ(Data(*client, 2)[0], 1.0f);
  EXPECT_TRUE(client->Gather(kB).ok());
  EXPECT_TRUE(client->Barrier().ok());
}

}  // namespace
}  // namespace zerod::client
