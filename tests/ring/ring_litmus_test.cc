// SPDX-License-Identifier: Apache-2.0
//
// The store-load races of docs/formats/ring.md and window.md, run as often as the time allows: a
// wake must not be lost, and a copy must never be both claimed and retracted. Without the fences
// such a race goes wrong some times in a million (measured below, not asserted), so the number of
// trials is part of the result.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <iostream>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/ring/ring_fixture.h"

namespace zerod::shm {
namespace {

constexpr uint64_t kTrials = 2'000'000;
constexpr absl::Duration kBudget = absl::Seconds(5);
// Fewer than these show nothing: the machine is too busy for the test to mean something.
constexpr uint64_t kTrialsMin = 1000;

// Then a spinning side gives up its core: the other one may need it.
constexpr int kSpinsMax = 50000;

// Waits for `word` to become `value`; gives up its core when that takes long.
void Await(const std::atomic<uint64_t>& word, uint64_t value) {
  for (int spins = 0; word.load(std::memory_order_acquire) != value; ++spins) {
    if (spins > kSpinsMax) std::this_thread::yield();
  }
}

void Delay(uint64_t turns) {
  for (uint64_t i = 0; i < turns; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
}

// 0..31, different from trial to trial, so that the two sides meet at each possible offset.
uint64_t Jitter(uint64_t trial) { return (trial * 0x9e3779b97f4a7c15) >> 59; }

constexpr uint64_t kEnd = ~uint64_t{0};

// Runs left(trial) and right(trial) at the same time, then check(trial) alone, until kTrials or
// the budget are used up. Returns the number of trials. check() tells whether left was first; it
// is then started later, so that both are first about equally often, which is when they collide.
template <typename Left, typename Right, typename Check>
uint64_t Race(Left left, Right right, Check check, absl::Duration budget = kBudget) {
  alignas(64) std::atomic<uint64_t> go{0};
  alignas(64) std::atomic<uint64_t> done{0};
  std::thread other([&] {
    for (uint64_t trial = 1;; ++trial) {
      uint64_t seen = 0;
      for (int spins = 0; (seen = go.load(std::memory_order_acquire)) < trial; ++spins) {
        if (spins > kSpinsMax) std::this_thread::yield();
      }
      if (seen == kEnd) return;
      Delay(Jitter(trial));
      right(trial);
      done.store(trial, std::memory_order_release);
    }
  });
  const absl::Time end = absl::Now() + budget;
  uint64_t left_delay = 0;
  uint64_t trial = 1;
  for (; trial <= kTrials; ++trial) {
    if (trial % 1024 == 0 && absl::Now() > end) break;
    go.store(trial, std::memory_order_release);
    // Now and then one after the other: on a busy machine the two may share a core, and left would
    // always be first.
    const bool in_turn = trial % 16 == 0;
    if (in_turn) Await(done, trial);
    Delay(left_delay + Jitter(trial * 31));
    left(trial);
    Await(done, trial);
    const bool left_first = check(trial);
    if (in_turn) continue;
    if (left_first) {
      left_delay = std::min<uint64_t>(left_delay + 1, 100000);
    } else if (left_delay > 0) {
      --left_delay;
    }
  }
  go.store(kEnd, std::memory_order_release);
  other.join();
  return trial - 1;
}

TEST(RingLitmusTest, TheDaemonIsNeverLeftAsleep) {
  Pages pages;
  SubmitRing client(pages.client_submit(), pages.client_complete(), pages.doorbell());
  ServeRing daemon(pages.submit(), pages.complete());
  bool asleep = false;
  uint64_t lost = 0, slept = 0;
  const uint64_t trials = Race(
      [&](uint64_t) { asleep = daemon.PrepareSleep(); },
      [&](uint64_t trial) {
        SubmitEntry entry{};
        entry.op = Op::kGather;
        entry.cookie = trial;
        EXPECT_TRUE(client.Push(entry).ok());
      },
      [&](uint64_t trial) {
        const bool rung = pages.Rung();
        slept += asleep;
        lost += asleep && !rung;
        daemon.CancelSleep();
        SubmitEntry entry;
        EXPECT_TRUE(daemon.Pop(&entry).value());
        EXPECT_EQ(entry.cookie, trial);
        return asleep;
      });
  std::cout << trials << " trials, asleep in " << slept << ", lost wakes " << lost << "\n";
  EXPECT_EQ(lost, 0u);
  EXPECT_GE(trials, kTrialsMin);
  EXPECT_GT(slept, 0u);
}

// The other direction goes through the futex itself. A lost wake is a sleep that lasts long after
// the daemon's Wake() has returned.
TEST(RingLitmusTest, TheClientIsNeverLeftAsleep) {
  Pages pages;
  SubmitRing client(pages.client_submit(), pages.client_complete(), pages.doorbell(),
                    /*spin=*/absl::ZeroDuration());
  ServeRing daemon(pages.submit(), pages.complete());
  constexpr absl::Duration kSlice = absl::Seconds(1);
  absl::Time woken, popped;
  uint64_t lost = 0;
  uint32_t wakes_before = 0;
  const uint64_t trials = Race(
      [&](uint64_t) {
        CompleteEntry done;
        while (!client.Pop(&done)) client.Sleep(kSlice);
        popped = absl::Now();
      },
      [&](uint64_t) {
        EXPECT_TRUE(daemon.Push({}).ok());
        daemon.Wake();
        woken = absl::Now();
      },
      [&](uint64_t) {
        lost += popped - woken > kSlice / 2;
        const uint32_t wakes = pages.complete()->wake.load();
        const bool slept = wakes != wakes_before;
        wakes_before = wakes;
        return slept;
      });
  std::cout << trials << " trials, " << pages.complete()->wake.load() << " wakes, lost " << lost
            << "\n";
  EXPECT_EQ(lost, 0u);
  // A lost wake costs a whole slice, and the trials of that time.
  EXPECT_GE(trials, kTrialsMin);
  EXPECT_GT(pages.complete()->wake.load(), 0u);
}

TEST(RingLitmusTest, NeverBothClaimedAndRetracted) {
  alignas(64) std::atomic<uint32_t> hold{0};
  alignas(64) std::atomic<uint64_t> word{0};
  HoldWords client(&hold, &word, 1);
  const std::atomic<uint32_t>* const holds[] = {&hold};
  const uint64_t valid = PackUnitWord({7, 1, CopyState::kValid});
  word = valid;
  bool claimed = false, retracted = false;
  uint64_t both = 0, client_won = 0, daemon_won = 0;
  const uint64_t trials = Race([&](uint64_t) { retracted = TryRetract(&word, holds); },
                               [&](uint64_t) { claimed = client.Claim(0, 7); },
                               [&](uint64_t) {
                                 both += claimed && retracted;
                                 client_won += claimed;
                                 daemon_won += retracted;
                                 hold = 0;
                                 word = valid;
                                 return retracted;
                               });
  std::cout << trials << " trials, claimed " << client_won << ", retracted " << daemon_won
            << ", neither " << trials - client_won - daemon_won << ", both " << both << "\n";
  EXPECT_EQ(both, 0u);
  EXPECT_GE(trials, kTrialsMin);
  EXPECT_GT(client_won, 0u);
  EXPECT_GT(daemon_won, 0u);
}

// The same as it is used: clients that read what they hold, a daemon that takes copies back,
// rewrites them and publishes the next version.
TEST(RingLitmusTest, WhatIsHeldDoesNotChange) {
  constexpr int kClients = 2;
  constexpr int kWords = 64;
  std::atomic<uint64_t> word{PackUnitWord({0, 0, CopyState::kValid})};
  std::atomic<uint32_t> hold[kClients] = {};
  std::vector<std::atomic<uint32_t>> copy(kWords);
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> torn{0}, reads{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] {
      HoldWords mine(&hold[c], &word, 1);
      while (!stop.load(std::memory_order_relaxed)) {
        const uint32_t version = mine.Word(0).version;
        if (!mine.Claim(0, version)) continue;
        for (const auto& value : copy) torn += value.load(std::memory_order_relaxed) != version;
        mine.Unclaim(0);
        // Now and then away for a while, so that the daemon has its chance on a busy machine too.
        if (reads.fetch_add(1, std::memory_order_relaxed) % 8 == 0) std::this_thread::yield();
      }
    });
  }
  const std::atomic<uint32_t>* const holds[] = {&hold[0], &hold[1]};
  constexpr uint64_t kEachMin = 100;  // fewer rewrites or reads than these show nothing
  const absl::Time start = absl::Now();
  uint32_t version = 0;
  for (uint64_t turn = 1;; ++turn) {
    if (turn % 256 == 0) {
      const absl::Duration taken = absl::Now() - start;
      const bool enough = version > kEachMin && reads > kEachMin;
      if (taken > absl::Seconds(30) || (enough && taken > absl::Seconds(2))) break;
    }
    if (!TryRetract(&word, holds)) {
      if (turn % 16 == 0) std::this_thread::yield();
      continue;
    }
    ++version;
    word.store(PackUnitWord({version, version, CopyState::kFilling}), std::memory_order_release);
    for (auto& value : copy) value.store(version, std::memory_order_relaxed);
    word.store(PackUnitWord({version, version, CopyState::kValid}), std::memory_order_release);
  }
  stop = true;
  for (std::thread& client : clients) client.join();
  std::cout << version << " rewrites, " << reads << " reads under a hold, " << torn << " torn\n";
  EXPECT_EQ(torn, 0u);
  EXPECT_GT(version, kEachMin);
  EXPECT_GT(reads, kEachMin);
}

// What the fence is worth on this machine: the same protocol without it. Printed, not asserted:
// another CPU may not show it in so few trials.
TEST(RingLitmusTest, MeasureWithoutTheFence) {
  alignas(64) std::atomic<uint32_t> tail{0};
  alignas(64) std::atomic<uint32_t> sleeping{0};
  bool asleep = false, rung = false;
  uint64_t lost = 0;
  const uint64_t trials = Race(
      [&](uint64_t trial) {
        sleeping.store(1, std::memory_order_release);
        asleep = tail.load(std::memory_order_acquire) != static_cast<uint32_t>(trial);
      },
      [&](uint64_t trial) {
        tail.store(static_cast<uint32_t>(trial), std::memory_order_release);
        rung = sleeping.load(std::memory_order_acquire) != 0;
      },
      [&](uint64_t) {
        lost += asleep && !rung;
        sleeping = 0;
        return asleep;
      },
      absl::Seconds(3));
  std::cout << trials << " trials without the fence: " << lost << " lost wakes\n";
  EXPECT_GE(trials, kTrialsMin);
}

}  // namespace
}  // namespace zerod::shm
