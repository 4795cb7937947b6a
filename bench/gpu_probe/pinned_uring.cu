// SPDX-License-Identifier: Apache-2.0
//
// Question 3: can one range be mapped with huge pages, pinned for CUDA (cuMemHostRegister, what
// cudaHostRegister calls) and registered with io_uring, and which of the two is charged to
// RLIMIT_MEMLOCK?
//
// What is done: for each kind of memory (MAP_HUGETLB, anonymous 4 KiB pages, a memfd) and twice, as
// this process is and without CAP_IPC_LOCK under a soft limit of at most half the range: mmap,
// touch, pin for CUDA, register with io_uring (raw system calls), then one O_DIRECT WRITE_FIXED of
// what the GPU copied in, read back and compared. VmLck and VmPin of /proc/self/status are read at
// each step.
//
// Build: ninja gpu_probes, or in the root:
//        nvcc -std=c++17 -arch=sm_90 -I. bench/gpu_probe/pinned_uring.cu -ldl
// Run:   pinned_uring [FOLDER=.] [MIB=32]       add --without-gpu for the io_uring half alone
//        huge pages must exist: sysctl vm.nr_hugepages=64
// Read:  one entry per kind and privilege: `mapped`, `cuda`, `uring` are "ok" or the error;
//        *_pin_kib and *_lck_kib are what the step added. A `uring` of ENOMEM under the limit
//        means that it is charged; a `cuda` that is ok there means that pinning is not.
#include <fcntl.h>
#include <linux/capability.h>

#include "bench/gpu_probe/cuda_driver.h"
#include "bench/gpu_probe/uring.h"

namespace probe {
namespace {

constexpr const char* kName = "pinned_uring";
constexpr const char* kKinds[] = {"hugetlb", "anonymous", "memfd"};
constexpr unsigned kPattern = 0x51515151;

void* Map(size_t kind, size_t bytes) {
  constexpr int kAccess = PROT_READ | PROT_WRITE;
  if (kind == 0) {
    return mmap(nullptr, bytes, kAccess, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
  }
  if (kind == 1) return mmap(nullptr, bytes, kAccess, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const int fd = memfd_create("pinned_uring", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return MAP_FAILED;
  void* memory = mmap(nullptr, bytes, kAccess, MAP_SHARED, fd, 0);
  close(fd);
  return memory;
}

// Drops CAP_IPC_LOCK, which exempts from the limit, and sets the limit.
bool Limit(size_t bytes) {
  rlimit limit;
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return false;
  limit.rlim_cur = std::min<rlim_t>(bytes, limit.rlim_max);
  if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return false;
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2];
  if (syscall(SYS_capget, &header, data) != 0) return false;
  data[0].effective &= ~(1u << CAP_IPC_LOCK);
  data[0].permitted &= ~(1u << CAP_IPC_LOCK);
  return syscall(SYS_capset, &header, data) == 0;
}

// One O_DIRECT write of the registered range and a buffered read; "ok" or what failed.
std::string WriteAndCompare(Uring* ring, const char* folder, char* memory, size_t bytes) {
  const std::string path = folder + Format("/pinned_uring.%d", getpid());
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0) return Format("open: %s", strerror(errno));
  unlink(path.c_str());
  ring->Queue(IORING_OP_WRITE_FIXED, fd, memory, static_cast<uint32_t>(bytes), 0, 1);
  uint64_t tag = 0;
  int32_t result = 0;
  std::string outcome = "ok";
  if (ring->Enter(1, 1) != 1 || !ring->Take(&tag, &result)) {
    outcome = "the write did not complete";
  } else if (result != static_cast<int32_t>(bytes)) {
    outcome = result < 0 ? strerror(-result) : "short write";
  } else {
    memset(memory, 0, bytes);
    if (pread(fd, memory, bytes, 0) != static_cast<ssize_t>(bytes)) outcome = "short read";
    const auto* words = reinterpret_cast<const unsigned*>(memory);
    for (size_t k = 0; k < bytes / 4 && outcome == "ok"; ++k) {
      if (words[k] != kPattern) outcome = "other bytes than written";
    }
  }
  close(fd);
  return outcome;
}

// Fills the pinned range from the GPU.
void FillFromGpu(const Driver& cu, char* memory, size_t bytes) {
  CUdeviceptr device_memory = 0;
  CUstream stream = nullptr;
  CU_OK(cu, cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  CU_OK(cu, cuMemAlloc(&device_memory, bytes));
  CU_OK(cu, cuMemsetD32Async(device_memory, kPattern, bytes / 4, stream));
  CU_OK(cu, cuMemcpyDtoHAsync(memory, device_memory, bytes, stream));
  if (!Drain(cu, stream, 20)) _exit(kFailed);
  CU_OK(cu, cuMemFree(device_memory));
}

// In a child of its own; writes the JSON of the case to `out`.
int Case(size_t kind, bool limited, bool with_gpu, const char* folder, size_t bytes, int out) {
  Figures figures;
  Driver cu;
  CUdevice device = 0;
  if (with_gpu && !StartGpu(&cu, &device).empty()) return kFailed;
  // Before the ring is made: that is when the kernel decides whether to charge it.
  if (limited && !Limit(bytes / 2)) return kFailed;
  long pin = 0, lck = 0;
  const auto step = [&](const char* name) {
    const long pin_now = StatusKib("VmPin"), lck_now = StatusKib("VmLck");
    if (name != nullptr) {
      figures.Number(Format("%s_pin_kib", name), static_cast<double>(pin_now - pin))
          .Number(Format("%s_lck_kib", name), static_cast<double>(lck_now - lck));
    }
    pin = pin_now;
    lck = lck_now;
  };
  const auto finish = [&] {
    const std::string json = figures.Json();
    return write(out, json.data(), json.size()) == static_cast<ssize_t>(json.size()) ? kAnswered
                                                                                     : kFailed;
  };
  void* memory = Map(kind, bytes);
  figures.Text("mapped", memory != MAP_FAILED ? "ok" : strerror(errno));
  if (memory == MAP_FAILED) return finish();
  auto* data = static_cast<char*>(memory);
  memset(data, 0x51, bytes);
  Uring ring;
  const int opened = ring.Open(8);
  step(nullptr);
  if (with_gpu) {
    const CUresult pinned = cu.cuMemHostRegister(data, bytes, 0);
    figures.Text("cuda", pinned == CUDA_SUCCESS ? "ok" : CudaError(cu, pinned));
    step("cuda");
    if (pinned == CUDA_SUCCESS) FillFromGpu(cu, data, bytes);
  }
  const iovec range = {data, bytes};
  const int registered = opened != 0 ? opened : ring.RegisterBuffers(&range, 1);
  figures.Text("uring", registered == 0 ? "ok" : strerror(registered));
  step("uring");
  if (registered == 0) figures.Text("write_fixed", WriteAndCompare(&ring, folder, data, bytes));
  return finish();
}

int Main(const char* folder, size_t bytes, bool with_gpu) {
  Figures figures;
  if (with_gpu) {
    const std::string reason = DescribeGpu(&figures);
    if (!reason.empty()) return Finish(kName, kCannotBeHad, figures, reason + ".");
  }
  figures.Number("range_kib", static_cast<double>(bytes >> 10));
  bool all_ran = true;
  std::string sentence;
  for (size_t kind = 0; kind < 3; ++kind) {
    for (const bool limited : {false, true}) {
      int pipes[2];
      if (pipe(pipes) != 0) return Finish(kName, kFailed, figures, "No pipe.");
      const pid_t child =
          Spawn([&] { return Case(kind, limited, with_gpu, folder, bytes, pipes[1]); });
      close(pipes[1]);
      const int code = Await(child, 120);
      char json[2048] = "";
      const ssize_t got = read(pipes[0], json, sizeof(json) - 1);
      close(pipes[0]);
      const bool ran = code == kAnswered && got > 0;
      all_ran = all_ran && ran;
      const std::string name =
          Format("%s, %s", kKinds[kind], limited ? "limited" : "as it is");
      figures.Raw(name, ran ? json : Quoted(Format("ended with %d", code)));
    }
  }
  sentence = with_gpu ? "Each case's `cuda` and `uring` say whether both pins hold together."
                      : "The io_uring half alone, without CUDA: not the answer to the question.";
  const int code = !all_ran ? kFailed : with_gpu ? kAnswered : kCannotBeHad;
  return Finish(kName, code, figures, sentence);
}

}  // namespace
}  // namespace probe

int main(int argc, char** argv) {
  const char* folder = ".";
  long mib = 32;
  bool with_gpu = true;
  int position = 0;
  for (int k = 1; k < argc; ++k) {
    if (strcmp(argv[k], "--without-gpu") == 0) {
      with_gpu = false;
    } else if (position++ == 0) {
      folder = argv[k];
    } else {
      mib = atol(argv[k]);
    }
  }
  mib = std::clamp(mib, 2L, 1024L) / 2 * 2;  // whole huge pages; at most what one buffer may have
  return probe::Main(folder, static_cast<size_t>(mib) << 20, with_gpu);
}
