// SPDX-License-Identifier: Apache-2.0
//
// What a request costs: a round trip through the rings between two processes, against the least
// that two processes can do, one word bounced between them. Each pair waits in the same way:
//   spinning  neither side enters the kernel; means nothing unless two cores are idle
//   asleep    both sides sleep until the other wakes them. The bare word uses a futex both ways,
//             the rings an eventfd in epoll towards the daemon and a futex back
// Prints a table to stderr and JSON to stdout. usage: bench_ring [seconds per case, default 1]
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "proto/shm/ring.h"

namespace zerod::shm {
namespace {

constexpr int64_t kStuckNs = 10'000'000'000;  // a round trip that takes longer is given up
constexpr size_t kSamplesMax = 2'000'000;

struct Shared {
  SubmitPage submit;
  CompletePage complete;
  alignas(64) std::atomic<uint32_t> ping;
  alignas(64) std::atomic<uint32_t> pong;
};

constexpr uint32_t kStop = 0xffffffff;

int64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

[[noreturn]] void Die(const char* what) {
  fprintf(stderr, "bench_ring: %s\n", what);
  exit(1);
}

// Waits for `word` to leave `old`, in the kernel or not.
uint32_t AwaitChange(std::atomic<uint32_t>* word, uint32_t old, bool asleep) {
  const int64_t end = NowNs() + kStuckNs;
  for (uint32_t turns = 1;; ++turns) {
    const uint32_t now = word->load(std::memory_order_acquire);
    if (now != old) return now;
    if (asleep) {
      const timespec slice{1, 0};
      syscall(SYS_futex, word, FUTEX_WAIT, old, &slice, nullptr, 0);
    }
    if ((asleep || turns % 1024 == 0) && NowNs() > end) Die("the other process does not answer");
  }
}

void Change(std::atomic<uint32_t>* word, uint32_t value, bool asleep) {
  word->store(value, std::memory_order_release);
  if (asleep) syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void AnswerWord(Shared* shared, bool asleep) {
  for (uint32_t seen = 0;;) {
    seen = AwaitChange(&shared->ping, seen, asleep);
    Change(&shared->pong, seen, asleep);
    if (seen == kStop) return;
  }
}

void AnswerRing(Shared* shared, int doorbell, bool asleep) {
  ServeRing ring(&shared->submit, &shared->complete);
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{kDoorbellEvents, {}};
  if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, doorbell, &event) != 0) Die("epoll");
  int64_t end = NowNs() + kStuckNs;
  for (uint32_t turns = 1;; ++turns) {
    SubmitEntry entry;
    const absl::StatusOr<bool> popped = ring.Pop(&entry);
    if (!popped.ok()) Die("the ring is damaged");
    if (*popped) {
      CompleteEntry done{};
      done.cookie = entry.cookie;
      if (!ring.Push(done).ok()) Die("the completion ring is full");
      ring.Wake();
      if (entry.op == Op::kDetach) return;
      end = NowNs() + kStuckNs;
    } else if (asleep) {
      if (ring.PrepareSleep()) {
        epoll_wait(epoll, &event, 1, 1000);
        ring.CancelSleep();
      }
    }
    if (!*popped && (asleep || turns % 1024 == 0) && NowNs() > end) Die("the client is gone");
  }
}

struct Result {
  const char* what;
  size_t trips = 0;
  double p50_us = 0, p99_us = 0, mean_us = 0;
};

// Calls trip() for `seconds` after a warm-up, and sorts what it took.
template <typename Trip>
Result Measure(const char* what, double seconds, Trip trip) {
  for (int i = 0; i < 100; ++i) trip();
  std::vector<int64_t> taken_ns;
  taken_ns.reserve(kSamplesMax);
  const int64_t start = NowNs();
  const int64_t end = start + static_cast<int64_t>(seconds * 1e9);
  for (int64_t before = start; before < end && taken_ns.size() < kSamplesMax;) {
    trip();
    const int64_t after = NowNs();
    taken_ns.push_back(after - before);
    before = after;
  }
  Result result{what, taken_ns.size()};
  double sum = 0;
  for (int64_t ns : taken_ns) sum += static_cast<double>(ns);
  std::sort(taken_ns.begin(), taken_ns.end());
  result.mean_us = sum / 1e3 / static_cast<double>(taken_ns.size());
  result.p50_us = static_cast<double>(taken_ns[taken_ns.size() / 2]) / 1e3;
  result.p99_us = static_cast<double>(taken_ns[taken_ns.size() * 99 / 100]) / 1e3;
  return result;
}

Result MeasureWord(Shared* shared, const char* what, double seconds, bool asleep) {
  uint32_t value = 0;
  Result result = Measure(what, seconds, [&] {
    const uint32_t before = value++;
    Change(&shared->ping, value, asleep);
    AwaitChange(&shared->pong, before, asleep);
  });
  Change(&shared->ping, kStop, asleep);
  AwaitChange(&shared->pong, value, asleep);
  return result;
}

Result MeasureRing(Shared* shared, int doorbell, const char* what, double seconds, bool asleep) {
  SubmitRing ring(&shared->submit, &shared->complete, doorbell, /*spin=*/absl::ZeroDuration());
  SubmitEntry entry{};
  auto trip = [&] {
    ++entry.cookie;
    if (!ring.Push(entry).ok()) Die("the submission ring is full");
    CompleteEntry done{};
    const int64_t end = NowNs() + kStuckNs;
    for (uint32_t turns = 1; !ring.Pop(&done); ++turns) {
      if (asleep) ring.Sleep(absl::Seconds(1));
      if ((asleep || turns % 1024 == 0) && NowNs() > end) Die("the daemon does not answer");
    }
    if (done.cookie != entry.cookie) Die("an answer to another request");
  };
  entry.op = Op::kGather;
  Result result = Measure(what, seconds, trip);
  entry.op = Op::kDetach;
  trip();
  return result;
}

// Keeps this process on its n-th allowed core (of as many as there are), so that the two sides do
// not share one where there are two.
void Pin(const cpu_set_t& allowed, int n) {
  n %= CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || n-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof(one), &one) != 0) Die("sched_setaffinity");
    return;
  }
}

// One case: the answering side in a process of its own.
Result Run(const char* what, double seconds, bool rings, bool asleep) {
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                      -1, 0);
  const absl::StatusOr<int> doorbell = MakeDoorbell();
  if (memory == MAP_FAILED || !doorbell.ok()) Die("no shared memory or no eventfd");
  Shared* shared = new (memory) Shared();  // placement; tidy: allow
  InitPages(&shared->submit, &shared->complete);
  static const cpu_set_t allowed = [] {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) Die("sched_getaffinity");
    return set;
  }();
  Pin(allowed, 0);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child < 0) Die("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    Pin(allowed, 1);
    if (rings) {
      AnswerRing(shared, *doorbell, asleep);
    } else {
      AnswerWord(shared, asleep);
    }
    _exit(0);
  }
  const Result result = rings ? MeasureRing(shared, *doorbell, what, seconds, asleep)
                              : MeasureWord(shared, what, seconds, asleep);
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) Die("the answering process failed");
  close(*doorbell);
  munmap(memory, sizeof(Shared));
  return result;
}

int Main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 1.0;
  if (!(seconds > 0 && seconds <= 60)) Die("usage: bench_ring [seconds per case, 0 to 60]");
  const Result results[] = {
      Run("word_spinning", seconds, false, false), Run("ring_spinning", seconds, true, false),
      Run("word_asleep", seconds, false, true), Run("ring_asleep", seconds, true, true)};
  fprintf(stderr, "%-14s %10s %10s %10s %10s %8s\n", "round trip", "p50 us", "p99 us", "mean us",
          "trips", "ratio");
  printf("{\"bench\": \"ring\", \"cores\": %ld, \"cases\": [", sysconf(_SC_NPROCESSORS_ONLN));
  for (int i = 0; i < 4; ++i) {
    const Result& r = results[i];
    const double ratio = r.p50_us / results[i & ~1].p50_us;
    fprintf(stderr, "%-14s %10.2f %10.2f %10.2f %10zu %8.2f\n", r.what, r.p50_us, r.p99_us,
            r.mean_us, r.trips, ratio);
    printf("%s{\"case\": \"%s\", \"p50_us\": %.3f, \"p99_us\": %.3f, \"mean_us\": %.3f, "
           "\"trips\": %zu, \"ratio_to_bare\": %.3f}",
           i == 0 ? "" : ", ", r.what, r.p50_us, r.p99_us, r.mean_us, r.trips, ratio);
  }
  printf("]}\n");
  fprintf(stderr, "ratio: of the medians, ring over bare word, waiting in the same way\n");
  return 0;
}

}  // namespace
}  // namespace zerod::shm

int main(int argc, char** argv) { return zerod::shm::Main(argc, argv); }
