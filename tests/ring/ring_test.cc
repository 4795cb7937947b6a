// SPDX-License-Identifier: Apache-2.0
#include "proto/shm/ring.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/epoll.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/ring/ring_fixture.h"

namespace zerod::shm {
namespace {

using ::testing::HasSubstr;

// The tables of docs/formats/ring.md. A change here is a new kFormatVersion.
static_assert(offsetof(SubmitPage, tail) == 64 && offsetof(SubmitPage, cq_head) == 128 &&
              offsetof(SubmitPage, sleeping) == 192 && offsetof(SubmitPage, trace_len) == 256 &&
              offsetof(SubmitPage, entry) == 320 && offsetof(SubmitPage, step) == 16704 &&
              offsetof(SubmitPage, scalar) == 29056 && sizeof(StepRecord) == 12320);
static_assert(offsetof(CompletePage, wake) == 64 && offsetof(CompletePage, tail) == 128 &&
              offsetof(CompletePage, sq_head) == 192 && offsetof(CompletePage, sleeping) == 256 &&
              offsetof(CompletePage, failed) == 320 && offsetof(CompletePage, failure) == 324 &&
              offsetof(CompletePage, entry) == 1408 && offsetof(CompletePage, texts) == 9600 &&
              offsetof(CompletePage, scalar) == 25984 &&
              offsetof(CompletePage, grad_norm) == 26496 &&
              offsetof(CompletePage, skipped) == 26504 &&
              offsetof(CompletePage, loss_scale) == 26512);
static_assert(kFormatVersion == 5);

SubmitEntry Gather(uint64_t cookie) {
  SubmitEntry entry{};
  entry.op = Op::kGather;
  entry.unit = static_cast<uint32_t>(cookie * 7);
  entry.step = cookie + 1;
  entry.cookie = cookie;
  return entry;
}

class RingTest : public ::testing::Test {
 protected:
  Pages pages_;
  SubmitRing client_{pages_.client_submit(), pages_.client_complete(), pages_.doorbell()};
  ServeRing daemon_{pages_.submit(), pages_.complete()};
};

TEST_F(RingTest, CarriesEntriesInOrderManyTimesRound) {
  uint64_t next = 1, expected = 1;
  for (int round = 0; round < 100; ++round) {
    for (int i = 0; i < 37; ++i) ASSERT_TRUE(client_.Push(Gather(next++)).ok());
    SubmitEntry entry;
    for (int i = 0; i < 37; ++i) {
      ASSERT_TRUE(daemon_.Pop(&entry).value());
      const SubmitEntry want = Gather(expected);
      ASSERT_EQ(memcmp(&entry, &want, sizeof(entry)), 0);
      CompleteEntry done{};
      done.cookie = entry.cookie;
      done.result = entry.cookie * 2;
      ASSERT_TRUE(daemon_.Push(done).ok());
      ++expected;
    }
    EXPECT_FALSE(daemon_.Pop(&entry).value());
    CompleteEntry done{};
    for (uint64_t cookie = expected - 37; cookie < expected; ++cookie) {
      ASSERT_TRUE(client_.Pop(&done));
      ASSERT_EQ(done.cookie, cookie);
      ASSERT_EQ(done.result, cookie * 2);
      ASSERT_EQ(client_.Text(done), "");
    }
    EXPECT_FALSE(client_.Pop(&done));
  }
}

TEST_F(RingTest, FullSubmissionRingRefusesAndLosesNothing) {
  for (uint64_t i = 0; i < kRingEntries; ++i) ASSERT_TRUE(client_.Push(Gather(i)).ok());
  EXPECT_EQ(client_.Push(Gather(999)).code(), absl::StatusCode::kResourceExhausted);
  SubmitEntry entry;
  ASSERT_TRUE(daemon_.Pop(&entry).value());
  EXPECT_EQ(entry.cookie, 0u);
  EXPECT_TRUE(client_.Push(Gather(kRingEntries)).ok());
  for (uint64_t i = 1; i <= kRingEntries; ++i) {
    ASSERT_TRUE(daemon_.Pop(&entry).value());
    EXPECT_EQ(entry.cookie, i);
  }
}

TEST_F(RingTest, UnreadCompletionsDetach) {
  for (uint32_t i = 0; i < kRingEntries; ++i) ASSERT_TRUE(daemon_.Push({}).ok());
  EXPECT_EQ(daemon_.Push({}).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(RingTest, NonsenseIndicesDetach) {
  SubmitEntry entry;
  for (uint32_t tail : {kRingEntries + 1, 0x80000000u, 0xffffffffu}) {
    pages_.client_submit()->tail = tail;
    EXPECT_EQ(daemon_.Pop(&entry).status().code(), absl::StatusCode::kInvalidArgument) << tail;
  }
  for (uint32_t head : {1u, 0x80000000u, 0xffffffffu - kRingEntries}) {
    pages_.client_submit()->cq_head = head;
    EXPECT_EQ(daemon_.Push({}).code(), absl::StatusCode::kInvalidArgument) << head;
  }
  EXPECT_EQ(pages_.complete()->sq_head, 0u);
  EXPECT_EQ(pages_.complete()->tail, 0u);
}

TEST_F(RingTest, IndicesWrap) {
  Pages pages;
  const uint32_t start = 0xffffffff - 100;
  pages.submit()->tail = start;
  pages.submit()->cq_head = start;
  pages.complete()->tail = start;
  pages.complete()->sq_head = start;
  SubmitRing client(pages.client_submit(), pages.client_complete(), pages.doorbell());
  ServeRing daemon(pages.submit(), pages.complete());
  for (uint64_t i = 0; i < 300; ++i) {
    ASSERT_TRUE(client.Push(Gather(i)).ok());
    SubmitEntry entry;
    ASSERT_TRUE(daemon.Pop(&entry).value());
    ASSERT_EQ(entry.cookie, i);
    CompleteEntry done{};
    done.cookie = i;
    ASSERT_TRUE(daemon.Push(done).ok());
    ASSERT_TRUE(client.Pop(&done));
    ASSERT_EQ(done.cookie, i);
  }
}

TEST_F(RingTest, DoorbellRingsOnlyForASleeper) {
  ASSERT_TRUE(client_.Push(Gather(1)).ok());
  EXPECT_FALSE(pages_.Rung());
  EXPECT_FALSE(daemon_.PrepareSleep()) << "an entry is there: not the time to sleep";
  SubmitEntry entry;
  ASSERT_TRUE(daemon_.Pop(&entry).value());
  EXPECT_TRUE(daemon_.PrepareSleep());
  ASSERT_TRUE(client_.Push(Gather(2)).ok());
  EXPECT_TRUE(pages_.Rung());
  daemon_.CancelSleep();
  ASSERT_TRUE(client_.Push(Gather(3)).ok());
  EXPECT_FALSE(pages_.Rung());
}

TEST_F(RingTest, DoorbellIsReportedEachTimeWithoutBeingRead) {
  const UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{kDoorbellEvents, {}};
  ASSERT_EQ(epoll_ctl(epoll.get(), EPOLL_CTL_ADD, pages_.doorbell(), &event), 0);
  SubmitEntry entry;
  for (uint64_t i = 0; i < 100; ++i) {
    ASSERT_TRUE(daemon_.PrepareSleep());
    EXPECT_EQ(epoll_wait(epoll.get(), &event, 1, 0), 0) << "nothing new was rung";
    ASSERT_TRUE(client_.Push(Gather(i)).ok());
    EXPECT_EQ(epoll_wait(epoll.get(), &event, 1, 0), 1);
    daemon_.CancelSleep();
    ASSERT_TRUE(daemon_.Pop(&entry).value());
  }
}

TEST_F(RingTest, SleepEndsWithTheSlice) {
  const absl::Time start = absl::Now();
  EXPECT_FALSE(client_.Sleep(absl::Milliseconds(20)));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(19));
  EXPECT_EQ(pages_.submit()->sleeping, 0u);
}

TEST_F(RingTest, SleepEndsWithACompletion) {
  std::thread daemon([&] {
    while (pages_.submit()->sleeping == 0) std::this_thread::yield();
    EXPECT_TRUE(daemon_.Push({}).ok());
    daemon_.Wake();
  });
  const absl::Time start = absl::Now();
  EXPECT_TRUE(client_.Sleep(absl::Seconds(30)));
  EXPECT_LT(absl::Now() - start, absl::Seconds(15));
  daemon.join();
  EXPECT_TRUE(client_.Sleep(absl::Seconds(30))) << "still unread";
}

TEST_F(RingTest, WakeDoesNothingForOneWhoIsAwake) {
  ASSERT_TRUE(daemon_.Push({}).ok());
  daemon_.Wake();
  EXPECT_EQ(pages_.complete()->wake, 0u);
}

TEST_F(RingTest, FailureWakesSticksAndTheFirstCounts) {
  EXPECT_TRUE(client_.Failure().ok());
  std::thread daemon([&] {
    while (pages_.submit()->sleeping == 0) std::this_thread::yield();
    daemon_.Fail(absl::StatusCode::kAborted, "member 3 is gone; start again");
    daemon_.Fail(absl::StatusCode::kInternal, "too late");
  });
  EXPECT_TRUE(client_.Sleep(absl::Seconds(30)));
  daemon.join();
  EXPECT_EQ(client_.Failure(), absl::AbortedError("member 3 is gone; start again"));
  EXPECT_EQ(client_.Push(Gather(1)), client_.Failure());
  EXPECT_TRUE(client_.Sleep(absl::Seconds(30)));
}

TEST_F(RingTest, TextsTravelUntilTheyAreOverwritten) {
  std::vector<std::string> texts;
  for (uint32_t i = 0; i < kTextSlots + 1; ++i) {
    texts.push_back("refused " + std::string(i, 'x'));
    ASSERT_TRUE(daemon_.Push({}, texts.back()).ok());
  }
  CompleteEntry done;
  ASSERT_TRUE(client_.Pop(&done));
  EXPECT_EQ(client_.Text(done), "") << "its slot has been used again";
  for (uint32_t i = 1; i < kTextSlots + 1; ++i) {
    ASSERT_TRUE(client_.Pop(&done));
    EXPECT_EQ(client_.Text(done), texts[i]);
  }
  ASSERT_TRUE(daemon_.Push({}, std::string(5000, 'y')).ok());
  ASSERT_TRUE(client_.Pop(&done));
  EXPECT_EQ(client_.Text(done), std::string(kTextBytes - 8, 'y'));
}

TEST_F(RingTest, PagesOfAnotherFormatAreRefused) {
  EXPECT_TRUE(CheckPages(pages_.client_submit(), pages_.client_complete()).ok());
  pages_.complete()->version = kFormatVersion + 1;
  absl::Status status = CheckPages(pages_.client_submit(), pages_.client_complete());
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("same version of zerod on both sides"));
  pages_.complete()->version = kFormatVersion;
  pages_.submit()->magic = 1;
  status = CheckPages(pages_.client_submit(), pages_.client_complete());
  EXPECT_THAT(std::string(status.message()), HasSubstr("submit page is not zerod's"));
}

TEST(CopySharedTest, CopiesExactlyWhateverTheAlignment) {
  alignas(8) char from[64];
  for (size_t i = 0; i < sizeof(from); ++i) from[i] = static_cast<char>(i + 1);
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t bytes = 0; bytes < 40; ++bytes) {
      char to[64] = {};
      CopyShared(to + 3, from + begin, bytes);
      ASSERT_EQ(memcmp(to + 3, from + begin, bytes), 0);
      ASSERT_EQ(to[2], 0);
      ASSERT_EQ(to[3 + bytes], 0);
    }
  }
}

// --- Hold words -------------------------------------------------------------------------------

class HoldTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kUnits = 4;
  void Set(uint32_t unit, uint32_t version, CopyState state) {
    words_[unit] = PackUnitWord({version, 9, state});
  }
  bool Retract(uint32_t unit) {
    const std::atomic<uint32_t>* holds[] = {&first_[unit], &second_[unit]};
    return TryRetract(&words_[unit], holds);
  }
  std::atomic<uint32_t> first_[kUnits] = {};
  std::atomic<uint32_t> second_[kUnits] = {};
  std::atomic<uint64_t> words_[kUnits] = {};
  HoldWords client_{first_, words_, kUnits};
};

TEST_F(HoldTest, ClaimsOnlyAValidCopyOfTheVersion) {
  EXPECT_FALSE(client_.Claim(0, 0)) << "zeroed memory is an absent unit";
  Set(1, 5, CopyState::kValid);
  EXPECT_FALSE(client_.Claim(1, 4));
  EXPECT_FALSE(client_.Held(1)) << "a failed claim leaves nothing behind";
  EXPECT_TRUE(client_.Claim(1, 5));
  EXPECT_TRUE(client_.Claim(1, 5));
  for (CopyState state : {CopyState::kAbsent, CopyState::kFilling, CopyState::kEvicting}) {
    Set(2, 5, state);
    EXPECT_FALSE(client_.Claim(2, 5));
  }
  EXPECT_TRUE(client_.Held(1));
  EXPECT_EQ(first_[1], 6u) << "version + 1";
}

TEST_F(HoldTest, WhatIsClaimedIsNotRetracted) {
  Set(1, 5, CopyState::kValid);
  ASSERT_TRUE(client_.Claim(1, 5));
  const uint64_t before = words_[1];
  EXPECT_FALSE(Retract(1));
  EXPECT_EQ(words_[1], before);
  client_.Unclaim(1);
  EXPECT_TRUE(Retract(1));
  EXPECT_EQ(words_[1], PackUnitWord({5, 9, CopyState::kAbsent}));
  EXPECT_FALSE(client_.Claim(1, 5));
  EXPECT_FALSE(Retract(1)) << "there is nothing to retract";
}

TEST_F(HoldTest, AHoldOfAnotherVersionDoesNotKeepAStaleCopy) {
  Set(1, 5, CopyState::kValid);
  client_.Intend(1, 6);
  EXPECT_TRUE(Retract(1)) << "the client waits for 6: copy 5 is in the way";
}

TEST_F(HoldTest, OnlyAValidCopyIsRetracted) {
  for (CopyState state : {CopyState::kAbsent, CopyState::kFilling, CopyState::kEvicting}) {
    Set(1, 4, state);
    const uint64_t before = words_[1];
    EXPECT_FALSE(Retract(1));
    EXPECT_EQ(words_[1], before);
  }
}

TEST_F(HoldTest, AnyClientsHoldCounts) {
  Set(3, 0, CopyState::kValid);
  second_[3] = 1;
  EXPECT_FALSE(Retract(3));
}

TEST(UnitWordTest, PacksAndUnpacks) {
  const UnitWord word = UnpackUnitWord(PackUnitWord({0xfffffffe, 0xabcdef, CopyState::kEvicting}));
  EXPECT_EQ(word.version, 0xfffffffe);
  EXPECT_EQ(word.epoch, 0xabcdefu);
  EXPECT_EQ(word.state, CopyState::kEvicting);
  EXPECT_EQ(UnpackUnitWord(PackUnitWord({1, 0x1000002, CopyState::kValid})).epoch, 2u);
}

}  // namespace
}  // namespace zerod::shm
