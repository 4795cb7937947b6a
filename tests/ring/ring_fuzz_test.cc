// SPDX-License-Identifier: Apache-2.0
//
// A client that writes whatever it likes into its pages: the daemon answers each round with an
// entry, with "nothing there", or with an error that detaches this client. It never crashes, never
// reads outside the ring (the address sanitizer looks), and another client does not notice.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "tests/ring/ring_fixture.h"

namespace zerod::shm {
namespace {

constexpr int kRounds = 20000;

void FillRandom(std::mt19937_64* random, void* to, size_t bytes) {
  auto* words = static_cast<uint64_t*>(to);
  for (size_t i = 0; i < bytes / 8; ++i) {
    __atomic_store_n(&words[i], (*random)(), __ATOMIC_RELAXED);
  }
}

// One act of a client that is broken or bad.
void Scribble(std::mt19937_64* random, SubmitPage* page) {
  std::mt19937_64& next = *random;
  switch (next() % 6) {
    case 0:
      page->tail.store(static_cast<uint32_t>(next()));
      break;
    case 1:  // a little too far, or behind
      page->tail.store(page->tail.load() + static_cast<uint32_t>(next() % 1024) - 512);
      break;
    case 2:
      page->cq_head.store(static_cast<uint32_t>(next()));
      break;
    case 3:
      page->cq_head.store(page->cq_head.load() + static_cast<uint32_t>(next() % 1024) - 512);
      break;
    case 4:
      page->sleeping.store(static_cast<uint32_t>(next()));
      break;
    default:
      FillRandom(random, page->entry, sizeof(page->entry));
  }
}

// One turn of the daemon with a client. False: it was detached.
bool Serve(ServeRing* ring, CompletePage* complete) {
  SubmitEntry entry;
  bool ok = true;
  for (uint32_t taken = 0; ok && taken < kRingEntries; ++taken) {
    const uint32_t head_before = complete->sq_head.load();
    const absl::StatusOr<bool> popped = ring->Pop(&entry);
    EXPECT_EQ(complete->sq_head.load(), head_before + (popped.ok() && *popped ? 1 : 0));
    if (!popped.ok()) {
      EXPECT_EQ(popped.status().code(), absl::StatusCode::kInvalidArgument);
      ok = false;
    } else if (!*popped) {
      break;
    } else {
      CompleteEntry done{};
      done.cookie = entry.cookie;
      const absl::Status pushed = ring->Push(done, "what the entry asks for makes no sense");
      EXPECT_TRUE(pushed.ok() || pushed.code() == absl::StatusCode::kInvalidArgument ||
                  pushed.code() == absl::StatusCode::kResourceExhausted);
      ok = pushed.ok();
    }
  }
  ring->Wake();
  if (ring->PrepareSleep()) ring->CancelSleep();
  if (!ok) ring->Fail(absl::StatusCode::kInvalidArgument, "the client is detached");
  return ok;
}

// A request and its answer over a healthy client's rings.
void RoundTrip(SubmitRing* client, ServeRing* daemon, CompletePage* complete, uint64_t cookie) {
  SubmitEntry entry{};
  entry.op = Op::kRelease;
  entry.cookie = cookie;
  ASSERT_TRUE(client->Push(entry).ok());
  ASSERT_TRUE(Serve(daemon, complete));
  CompleteEntry done{};
  ASSERT_TRUE(client->Pop(&done));
  ASSERT_EQ(done.cookie, cookie);
}

TEST(RingFuzzTest, GarbageOnlyDetaches) {
  const uint64_t seed = 20261123;
  std::mt19937_64 random(seed);
  Pages good_pages;
  SubmitRing good(good_pages.client_submit(), good_pages.client_complete(), good_pages.doorbell());
  ServeRing good_daemon(good_pages.submit(), good_pages.complete());
  auto pages = std::make_unique<Pages>();
  auto daemon = std::make_unique<ServeRing>(pages->submit(), pages->complete());
  int detached = 0, survived = 0;
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(round);
    Scribble(&random, pages->client_submit());
    if (Serve(daemon.get(), pages->complete())) {
      ++survived;
    } else {
      ++detached;
      EXPECT_NE(pages->complete()->failed.load(), 0u);
      EXPECT_EQ(pages->complete()->magic, kMagic);
      pages = std::make_unique<Pages>();
      daemon = std::make_unique<ServeRing>(pages->submit(), pages->complete());
    }
    RoundTrip(&good, &good_daemon, good_pages.complete(), static_cast<uint64_t>(round));
    if (HasFatalFailure()) return;
  }
  EXPECT_TRUE(good.Failure().ok());
  // Both outcomes must have been met, or the test looks at nothing.
  EXPECT_GT(detached, kRounds / 10);
  EXPECT_GT(survived, kRounds / 10);
}

TEST(RingFuzzTest, GarbageWrittenWhileTheDaemonLooks) {
  Pages pages;
  std::atomic<bool> stop{false};
  std::thread client([&] {
    std::mt19937_64 random(42);
    while (!stop.load(std::memory_order_relaxed)) Scribble(&random, pages.client_submit());
  });
  const absl::Time end = absl::Now() + absl::Seconds(1);
  int detached = 0;
  for (int round = 0; round < 200000 && absl::Now() < end; ++round) {
    // A new attachment of the same pages, wherever they stand.
    ServeRing daemon(pages.submit(), pages.complete());
    for (int turn = 0; turn < 4; ++turn) {
      if (Serve(&daemon, pages.complete())) continue;
      ++detached;
      break;
    }
  }
  stop = true;
  client.join();
  EXPECT_GT(detached, 0);
}

}  // namespace
}  // namespace zerod::shm
