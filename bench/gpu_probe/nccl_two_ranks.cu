// SPDX-License-Identifier: Apache-2.0
//
// Question 5: can two NCCL ranks share one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1, NCCL 2.30 or newer),
// so that tests need only one, and does ncclCommAbort from another thread end a collective that
// a peer never joins?
//
// What is done: two processes on GPU 0 make a non-blocking communicator, all-reduce and check the
// sum, time 20 of 16 MiB. Then rank 0 starts an all-reduce alone; after a second a watchdog thread
// aborts it. Both ranks then make a new communicator and all-reduce again.
//
// Build: ninja gpu_probes, or in the root:
//        nvcc -std=c++17 -arch=sm_90 -I. bench/gpu_probe/nccl_two_ranks.cu -ldl -lpthread
// Run:   nccl_two_ranks [PATH_OF_LIBNCCL=libnccl.so.2]     (pip install nvidia-nccl-cu13 has one)
// Read:  first_sum_right: two ranks on one GPU work. abort_ms: how long the abort took; stream_ms:
//        from the abort until the stream was empty. async_error_before: what NCCL reported of the
//        stuck collective just before. stream_result: 0 means that the stream then ended without an
//        error, so that only our own flag tells that the result is void. second_sum_right: the
//        communicator can be made anew in the same processes.
#include <limits.h>
#include <sys/mman.h>

#include <atomic>
#include <new>
#include <thread>

#include "bench/gpu_probe/cuda_driver.h"

namespace probe {
namespace {

constexpr const char* kName = "nccl_two_ranks";
constexpr size_t kElements = 4 << 20;

// The little of nccl.h that is used. The configuration is that of 2.14, the first that had one:
// newer libraries read `size` and `version` and fill in the rest.
constexpr int kSuccess = 0, kInProgress = 7, kFloat32 = 7, kSum = 0;
struct Comm;
struct UniqueId {
  char bytes[128];
};
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
  int padding = INT_MIN;
};

struct Nccl {
  int (*GetVersion)(int*) = nullptr;
  int (*GetUniqueId)(UniqueId*) = nullptr;
  int (*CommInitRankConfig)(Comm**, int, UniqueId, int, Config*) = nullptr;
  int (*CommGetAsyncError)(Comm*, int*) = nullptr;
  int (*CommAbort)(Comm*) = nullptr;
  int (*AllReduce)(const void*, void*, size_t, int, int, Comm*, CUstream) = nullptr;
};

std::string Load(const char* path, Nccl* nccl) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string("no NCCL: ") + dlerror();
#define PROBE_LOAD(name)                                                                       \
  nccl->name = reinterpret_cast<decltype(nccl->name)>(dlsym(library, "nccl" #name));            \
  if (nccl->name == nullptr) return "this NCCL is too old, it lacks nccl" #name;
  PROBE_LOAD(GetVersion)
  PROBE_LOAD(GetUniqueId)
  PROBE_LOAD(CommInitRankConfig)
  PROBE_LOAD(CommGetAsyncError)
  PROBE_LOAD(CommAbort)
  PROBE_LOAD(AllReduce)
#undef PROBE_LOAD
  return "";
}

struct Page {
  std::atomic<bool> id_ready[2];
  UniqueId ids[2];
  std::atomic<int> version, failed_with, async_error_before, stream_result;
  std::atomic<bool> first_right[2], second_right[2], aborted_early, alone_done;
  double init_ms, all_reduce_us, abort_ms, stream_ms;
};

struct Rank {
  int rank;
  Nccl nccl;
  Driver cu;
  CUstream stream = nullptr;
  CUdeviceptr data = 0;
  Page* page;
};

// Polls until the communicator is no more in progress; its state, or kInProgress at the deadline.
int Settle(const Rank& self, Comm* comm, double timeout_seconds) {
  const double deadline = NowSeconds() + timeout_seconds;
  int state = kInProgress;
  while (state == kInProgress && NowSeconds() < deadline) {
    const int asked = self.nccl.CommGetAsyncError(comm, &state);
    if (asked != kSuccess) return asked;
    if (state == kInProgress) usleep(200);
  }
  return state;
}

// Makes communicator number `which`; null where it failed, with the reason in the page.
Comm* Connect(Rank* self, int which) {
  Page* page = self->page;
  if (self->rank == 0) {
    page->failed_with = self->nccl.GetUniqueId(&page->ids[which]);
    page->id_ready[which] = true;
  }
  const double deadline = NowSeconds() + 60;
  while (!page->id_ready[which]) {
    if (NowSeconds() > deadline) return nullptr;
    usleep(200);
  }
  Comm* comm = nullptr;
  Config config;
  int state = self->nccl.CommInitRankConfig(&comm, 2, page->ids[which], self->rank, &config);
  if (state == kInProgress || state == kSuccess) state = Settle(*self, comm, 60);
  if (state == kSuccess) return comm;
  page->failed_with = state;
  return nullptr;
}

bool Reduce(Rank* self, Comm* comm) {
  const int state = self->nccl.AllReduce(reinterpret_cast<void*>(self->data),
                                         reinterpret_cast<void*>(self->data), kElements, kFloat32,
                                         kSum, comm, self->stream);
  return (state == kSuccess || state == kInProgress) && Settle(*self, comm, 30) == kSuccess;
}

// Sums 1.0 of rank 0 and 2.0 of rank 1; true where every element is 3.0.
bool ReduceAndCheck(Rank* self, Comm* comm) {
  const Driver& cu = self->cu;
  const unsigned bits = self->rank == 0 ? 0x3f800000u : 0x40000000u;
  CU_OK(cu, cuMemsetD32Async(self->data, bits, kElements, self->stream));
  if (!Reduce(self, comm)) return false;
  std::vector<float> sums(kElements);
  CU_OK(cu, cuMemcpyDtoHAsync(sums.data(), self->data, kElements * 4, self->stream));
  if (!Drain(cu, self->stream, 30)) return false;
  return std::all_of(sums.begin(), sums.end(), [](float sum) { return sum == 3.0f; });
}

// Rank 0 alone starts a collective, a watchdog aborts it.
void AbortAlone(Rank* self, Comm* comm) {
  Page* page = self->page;
  std::atomic<double> aborted_at{0};
  const int state = self->nccl.AllReduce(reinterpret_cast<void*>(self->data),
                                         reinterpret_cast<void*>(self->data), kElements, kFloat32,
                                         kSum, comm, self->stream);
  page->aborted_early = state != kSuccess && state != kInProgress;
  std::thread watchdog([&] {
    usleep(1'000'000);
    int error = -1;
    self->nccl.CommGetAsyncError(comm, &error);
    page->async_error_before = error;
    const double start = NowSeconds();
    aborted_at = start;
    self->nccl.CommAbort(comm);
    page->abort_ms = (NowSeconds() - start) * 1e3;
  });
  page->stream_result = -1;
  const double deadline = NowSeconds() + 60;
  while (NowSeconds() < deadline) {
    const CUresult result = self->cu.cuStreamQuery(self->stream);
    if (result != CUDA_ERROR_NOT_READY) {
      page->stream_result = result;
      break;
    }
  }
  const double ended = NowSeconds();
  watchdog.join();
  page->stream_ms = (ended - aborted_at) * 1e3;  // negative: it ended before the abort
  page->alone_done = true;
}

int Run(int rank, const char* path, Page* page) {
  Rank self = {};
  self.rank = rank;
  self.page = page;
  CUdevice device = 0;
  if (!Load(path, &self.nccl).empty() || !StartGpu(&self.cu, &device).empty()) return kFailed;
  const Driver& cu = self.cu;
  CU_OK(cu, cuStreamCreate(&self.stream, CU_STREAM_NON_BLOCKING));
  CU_OK(cu, cuMemAlloc(&self.data, kElements * 4));
  int version = 0;
  self.nccl.GetVersion(&version);
  page->version = version;
  double start = NowSeconds();
  Comm* comm = Connect(&self, 0);
  if (comm == nullptr) return kFailed;
  if (rank == 0) page->init_ms = (NowSeconds() - start) * 1e3;
  page->first_right[rank] = ReduceAndCheck(&self, comm);
  start = NowSeconds();
  constexpr int kTimes = 20;
  for (int k = 0; k < kTimes; ++k) {
    if (!Reduce(&self, comm)) return kFailed;
  }
  if (!Drain(cu, self.stream, 60)) return kFailed;
  if (rank == 0) page->all_reduce_us = (NowSeconds() - start) * 1e6 / kTimes;
  if (rank == 0) {
    AbortAlone(&self, comm);
  } else {
    const double deadline = NowSeconds() + 70;
    while (!page->alone_done && NowSeconds() < deadline) usleep(1000);
    self.nccl.CommAbort(comm);
  }
  comm = Connect(&self, 1);
  if (comm == nullptr) return kFailed;
  page->second_right[rank] = ReduceAndCheck(&self, comm);
  self.nccl.CommAbort(comm);
  return kAnswered;
}

int Main(const char* path) {
  Figures figures;
  const std::string reason = DescribeGpu(&figures);
  if (!reason.empty()) return Finish(kName, kCannotBeHad, figures, reason + ".");
  Nccl nccl;
  const std::string missing = Load(path, &nccl);
  if (!missing.empty()) return Finish(kName, kCannotBeHad, figures, missing + ".");
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  void* memory =
      mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return Finish(kName, kFailed, figures, "No shared page.");
  auto* page = new (memory) Page();  // placement; tidy: allow
  pid_t ranks[2];
  for (int rank = 0; rank < 2; ++rank) {
    ranks[rank] = Spawn([&] { return Run(rank, path, page); });
  }
  const int first = Await(ranks[0], 240);
  const int second = Await(ranks[1], first == kAnswered ? 120 : 5);
  const bool shared = page->first_right[0] && page->first_right[1];
  const bool again = page->second_right[0] && page->second_right[1];
  figures.Number("nccl", page->version)
      .Bool("first_sum_right", shared)
      .Number("init_ms", page->init_ms)
      .Number("all_reduce_16mib_us", page->all_reduce_us)
      .Bool("abort_returned", page->alone_done)
      .Number("abort_ms", page->abort_ms)
      .Number("stream_ms", page->stream_ms)
      .Number("stream_result", page->stream_result)
      .Number("async_error_before", page->async_error_before)
      .Bool("second_sum_right", again)
      .Number("last_nccl_error", page->failed_with);
  if (!shared && page->version < 23000) {
    return Finish(kName, kCannotBeHad, figures, "This NCCL is older than 2.30.");
  }
  const bool answered = first == kAnswered && second == kAnswered && !page->aborted_early;
  return Finish(kName, answered ? kAnswered : kFailed, figures,
                Format("Two ranks on one GPU: %s; abort: %s in %.0f ms, stream empty after %.0f "
                       "ms; new communicator: %s (ranks ended with %d and %d).",
                       shared ? "right" : "NOT right",
                       page->alone_done ? "returned" : "did NOT end", page->abort_ms,
                       page->stream_ms, again ? "right" : "NOT right", first, second));
}

}  // namespace
}  // namespace probe

int main(int argc, char** argv) { return probe::Main(argc > 1 ? argv[1] : "libnccl.so.2"); }
