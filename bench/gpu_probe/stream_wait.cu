// SPDX-License-Identifier: Apache-2.0
//
// Question 2: does a 64-bit word in imported VMM memory, written by cuStreamWriteValue64 and
// awaited by cuStreamWaitValue64, order two processes' streams, and how does it compare with an
// interprocess event?
//
// What is done: two processes without MPS on one GPU play ping-pong, each turn ordered (a) by two
// words in shared VMM memory, enqueued without any host handshake, (b) by two interprocess events,
// whose record must be known to the other host before it may wait (a word in a shared page here).
// Before each (a) turn data is written to a buffer that the other side copies out: a stale copy
// is counted. Last, a wait for a value that nobody writes is released by another stream of the
// waiting process, as it must be when the peer died.
//
// Build: ninja gpu_probes, or in the root:
//        nvcc -std=c++17 -arch=sm_90 -I. bench/gpu_probe/stream_wait.cu -ldl
// Run:   stream_wait [TURNS=1000]
// Read:  round trips in microseconds, as seen by the host of the first process. stale must be 0 and
//        released_by_own_write true for words to serve as events; else events and a shared
//        /dev/shm are needed.
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

#include "bench/gpu_probe/cuda_driver.h"
#include "bench/gpu_probe/fd_channel.h"

namespace probe {
namespace {

constexpr const char* kName = "stream_wait";
constexpr int kTurnsMax = 10'000;
constexpr size_t kDataWords = 256 << 10;  // 1 MiB
constexpr double kLimitSeconds = 20;

struct Page {
  std::atomic<uint64_t> recorded[2];
  CUipcEventHandle events[2];
  std::atomic<bool> events_ready[2], no_events, no_words, released;
  std::atomic<uint32_t> stale;
  double word_us[kTurnsMax], event_us[kTurnsMax];
};

struct Side {
  Driver cu;
  CUstream stream = nullptr, other = nullptr;
  VmmBlock block;
  CUdeviceptr Word(int index) const { return block.address + static_cast<size_t>(index) * 64; }
  CUdeviceptr Data() const { return block.address + 4096; }
};

template <class Condition>
bool Until(Condition condition) {
  const double deadline = NowSeconds() + kLimitSeconds;
  while (!condition()) {
    if (NowSeconds() > deadline) return false;
  }
  return true;
}

// The first side writes the data, then word 0 = turn, and waits for word 1; the second copies the
// data out, and answers.
bool PlayWords(Side* side, int me, int turns, Page* page) {
  const Driver& cu = side->cu;
  void* pinned = nullptr;
  CU_OK(cu, cuMemHostAlloc(&pinned, kDataWords * 4, 0));
  const auto* copy = static_cast<volatile unsigned*>(pinned);
  for (int turn = 1; turn <= turns; ++turn) {
    const double start = NowSeconds();
    const auto value = static_cast<cuuint64_t>(turn);
    if (me == 0) {
      CU_OK(cu, cuMemsetD32Async(side->Data(), static_cast<unsigned>(turn), kDataWords,
                                 side->stream));
      CU_OK(cu, cuStreamWriteValue64(side->stream, side->Word(0), value, 0));
      CU_OK(cu, cuStreamWaitValue64(side->stream, side->Word(1), value, CU_STREAM_WAIT_VALUE_GEQ));
    } else {
      CU_OK(cu, cuStreamWaitValue64(side->stream, side->Word(0), value, CU_STREAM_WAIT_VALUE_GEQ));
      CU_OK(cu, cuMemcpyDtoHAsync(pinned, side->Data(), kDataWords * 4, side->stream));
      CU_OK(cu, cuStreamWriteValue64(side->stream, side->Word(1), value, 0));
    }
    if (!Drain(cu, side->stream, kLimitSeconds)) return false;
    page->word_us[turn - 1] = me == 0 ? (NowSeconds() - start) * 1e6 : page->word_us[turn - 1];
    if (me == 1 && (copy[0] != value || copy[kDataWords - 1] != value)) page->stale.fetch_add(1);
  }
  CU_OK(cu, cuMemFreeHost(pinned));
  return true;
}

// The same turns, data included, ordered by events.
bool PlayEvents(Side* side, int me, int turns, Page* page) {
  const Driver& cu = side->cu;
  CUevent mine = nullptr, theirs = nullptr;
  if (cu.cuEventCreate(&mine, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING) != CUDA_SUCCESS ||
      cu.cuIpcGetEventHandle(&page->events[me], mine) != CUDA_SUCCESS) {
    page->no_events = true;
  }
  page->events_ready[me] = true;
  if (!Until([&] { return page->events_ready[1 - me].load(); })) return false;
  if (!page->no_events &&
      cu.cuIpcOpenEventHandle(&theirs, page->events[1 - me]) != CUDA_SUCCESS) {
    page->no_events = true;
    page->recorded[me] = ~uint64_t{0};  // the other side must not wait for this one
  }
  if (page->no_events) return true;
  void* pinned = nullptr;
  CU_OK(cu, cuMemHostAlloc(&pinned, kDataWords * 4, 0));
  const auto await_peer = [&](uint64_t turn) {
    if (!Until([&] { return page->recorded[1 - me].load() >= turn; })) return false;
    CU_OK(cu, cuStreamWaitEvent(side->stream, theirs, 0));
    return true;
  };
  for (int turn = 1; turn <= turns && !page->no_events; ++turn) {
    const double start = NowSeconds();
    const auto value = static_cast<uint64_t>(turn);
    if (me == 0) {
      CU_OK(cu, cuMemsetD32Async(side->Data(), static_cast<unsigned>(turn), kDataWords,
                                 side->stream));
    } else {
      if (!await_peer(value)) return false;
      CU_OK(cu, cuMemcpyDtoHAsync(pinned, side->Data(), kDataWords * 4, side->stream));
    }
    CU_OK(cu, cuEventRecord(mine, side->stream));
    page->recorded[me] = value;
    if (me == 0 && !await_peer(value)) return false;
    if (!Drain(cu, side->stream, kLimitSeconds)) return false;
    if (me == 0) page->event_us[turn - 1] = (NowSeconds() - start) * 1e6;
  }
  return true;
}

bool PlayRelease(Side* side, Page* page) {
  const Driver& cu = side->cu;
  CU_OK(cu, cuStreamWaitValue64(side->stream, side->Word(2), 1, CU_STREAM_WAIT_VALUE_GEQ));
  if (Drain(cu, side->stream, 0.2)) return false;  // it must be waiting
  CU_OK(cu, cuStreamWriteValue64(side->other, side->Word(2), 1, 0));
  page->released = Drain(cu, side->stream, 5);
  return true;
}

int Player(int me, int peer, int turns, Page* page) {
  Side side;
  CUdevice device = 0;
  if (!StartGpu(&side.cu, &device).empty()) return kFailed;
  const Driver& cu = side.cu;
  int words = 0;
  CU_OK(cu, cuDeviceGetAttribute(&words, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS,
                                 device));
  if (words == 0) {
    page->no_words = true;
    return kCannotBeHad;
  }
  CU_OK(cu, cuStreamCreate(&side.stream, CU_STREAM_NON_BLOCKING));
  CU_OK(cu, cuStreamCreate(&side.other, CU_STREAM_NON_BLOCKING));
  char step = 'x';
  int fd = -1;
  if (me == 0) {
    side.block = VmmExport(cu, kDataWords * 4 + 4096, &fd);
    CU_OK(cu, cuMemsetD32Async(side.block.address, 0, side.block.bytes / 4, side.stream));
    if (!Drain(cu, side.stream, kLimitSeconds) || !Send(peer, &step, 1, fd)) return kFailed;
  } else {
    if (!Receive(peer, &step, 1, &fd)) return kFailed;
    side.block = VmmImport(cu, kDataWords * 4 + 4096, fd);
  }
  close(fd);
  if (!PlayWords(&side, me, turns, page) || !PlayEvents(&side, me, turns, page)) return kFailed;
  if (me == 0 && !PlayRelease(&side, page)) return kFailed;
  return kAnswered;
}

int Main(int turns) {
  Figures figures;
  const std::string reason = DescribeGpu(&figures);
  if (!reason.empty()) return Finish(kName, kCannotBeHad, figures, reason + ".");
  void* memory =
      mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  int ends[2];
  if (memory == MAP_FAILED || !MakeChannel(ends, 60)) {
    return Finish(kName, kFailed, figures, "No shared page or socket pair.");
  }
  auto* page = new (memory) Page();  // placement; tidy: allow
  const pid_t first = Spawn([&] { return Player(0, ends[0], turns, page); });
  const pid_t second = Spawn([&] { return Player(1, ends[1], turns, page); });
  const int first_code = Await(first, 240);
  const int second_code = Await(second, first_code == kAnswered ? 60 : 5);
  if (page->no_words) {
    return Finish(kName, kCannotBeHad, figures, "This GPU or driver has no 64-bit stream values.");
  }
  figures.Number("turns", turns).Number("stale", page->stale);
  if (first_code != kAnswered || second_code != kAnswered) {
    return Finish(kName, kFailed, figures,
                  Format("The players ended with %d and %d; stderr says where, -1 is a wait that "
                         "did not end.", first_code, second_code));
  }
  const std::vector<double> words(page->word_us, page->word_us + turns);
  const std::vector<double> events(page->event_us, page->event_us + turns);
  figures.Number("word_p50_us", Quantile(words, 0.5)).Number("word_p99_us", Quantile(words, 0.99));
  if (!page->no_events) {
    figures.Number("event_p50_us", Quantile(events, 0.5))
        .Number("event_p99_us", Quantile(events, 0.99));
  }
  figures.Bool("events_available", !page->no_events)
      .Bool("released_by_own_write", page->released);
  return Finish(kName, kAnswered, figures,
                Format("Words: %.1f us a round trip, %u stale of %d; events: %s; a wait that the "
                       "peer left %s released by the waiting process.",
                       Quantile(words, 0.5), page->stale.load(), turns,
                       page->no_events ? "not available"
                                       : Format("%.1f us", Quantile(events, 0.5)).c_str(),
                       page->released ? "can be" : "can NOT be"));
}

}  // namespace
}  // namespace probe

int main(int argc, char** argv) {
  return probe::Main(std::clamp(argc > 1 ? atoi(argv[1]) : 1000, 1, probe::kTurnsMax));
}
