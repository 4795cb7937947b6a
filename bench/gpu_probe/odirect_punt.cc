// SPDX-License-Identifier: Apache-2.0
//
// Question 4: does io_uring hand O_DIRECT writes on this file system and kernel to its worker
// threads ("punt", slower and with CPU of its own), and does preallocating help?
//
// What is done: the same file is written front to back with O_DIRECT through one io_uring, first
// as `unallocated` (an empty file that grows), then `fallocated` (extents exist, unwritten), then
// `prewritten` (every block written and synced before). While it writes, a second thread counts
// the ring's worker threads (named iou-wrk-...) in /proc/self/task. A second file of each kind is
// written block by block with pwritev2(RWF_NOWAIT), the attempt that io_uring makes inline before
// it punts: each EAGAIN (or short write) is a block that would be punted, an exact count.
//
// Build: ninja odirect_punt, or in the root:
//        g++ -std=c++17 -O2 -pthread -I. bench/gpu_probe/odirect_punt.cc
// Run:   odirect_punt [FOLDER=.] [MIB=256] [BLOCK_KIB=1024] [DEPTH=16] [ROUNDS=3]
// Read:  per kind, `punted` of `blocks` by NOWAIT and `workers_seen` (distinct threads over all
//        rounds); punted > 0 or workers_seen > 0 means punting. GB/s and latencies are the median
//        over the rounds; `enter_us` is what one submitting call costs the I/O thread: a write
//        done inline shows there, a punted one in CPU of the workers. On a busy machine trust
//        the counts, not the times.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/vfs.h>

#include <atomic>
#include <fstream>
#include <set>
#include <thread>

#include <dirent.h>

#include "bench/gpu_probe/uring.h"

namespace probe {
namespace {

constexpr const char* kName = "odirect_punt";
constexpr const char* kKinds[] = {"unallocated", "fallocated", "prewritten"};

struct Options {
  std::string folder = ".";
  size_t file_bytes = size_t{256} << 20;
  size_t block_bytes = size_t{1} << 20;
  unsigned depth = 16;
  int rounds = 3;
};

// Counts the io-wq threads of this process until Stop.
class WorkerWatch {
 public:
  WorkerWatch() : thread_([this] { Run(); }) {}
  size_t Stop() {
    stop_ = true;
    thread_.join();
    return seen_.size();
  }

 private:
  void Run() {
    while (!stop_) {
      DIR* tasks = opendir("/proc/self/task");
      if (tasks == nullptr) return;
      while (const dirent* task = readdir(tasks)) {
        std::ifstream comm(std::string("/proc/self/task/") + task->d_name + "/comm");
        std::string name;
        if (comm >> name && name.rfind("iou-wrk", 0) == 0) seen_.insert(task->d_name);
      }
      closedir(tasks);
      usleep(500);
    }
  }
  std::atomic<bool> stop_{false};
  std::set<std::string> seen_;
  std::thread thread_;
};

// A fresh file of the kind, or -1 with errno. Unlinked at once: nothing is left behind.
int MakeFile(const Options& options, size_t kind, char* block) {
  const std::string path = options.folder + Format("/odirect_punt.%d", getpid());
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0) return -1;
  unlink(path.c_str());
  bool ok = true;
  if (kind >= 1) ok = fallocate(fd, 0, 0, static_cast<off_t>(options.file_bytes)) == 0;
  if (kind == 2) {
    for (size_t at = 0; ok && at < options.file_bytes; at += options.block_bytes) {
      ok = pwrite(fd, block, options.block_bytes, static_cast<off_t>(at)) ==
           static_cast<ssize_t>(options.block_bytes);
    }
  }
  if (ok && fsync(fd) == 0) return fd;
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

struct Round {
  double seconds = 0;
  std::vector<double> latency_us, enter_us;
};

// Writes the whole file; returns 0 or an errno.
int WriteFile(const Options& options, int fd, char* buffers, Round* round) {
  Uring ring;
  if (const int error = ring.Open(options.depth)) return error;
  const size_t blocks = options.file_bytes / options.block_bytes;
  std::vector<double> started(options.depth);
  size_t queued = 0, finished = 0;
  const auto queue = [&](uint64_t slot) {
    ring.Queue(IORING_OP_WRITE, fd, buffers + slot * options.block_bytes,
               static_cast<uint32_t>(options.block_bytes), queued * options.block_bytes, slot);
    ++queued;
    started[slot] = NowSeconds();
    const double before = NowSeconds();
    const int submitted = ring.Enter(1, 0);
    round->enter_us.push_back((NowSeconds() - before) * 1e6);
    return submitted == 1 ? 0 : submitted < 0 ? -submitted : EIO;
  };
  const double start = NowSeconds();
  for (unsigned slot = 0; slot < options.depth && queued < blocks; ++slot) {
    if (const int error = queue(slot)) return error;
  }
  while (finished < blocks) {
    uint64_t slot = 0;
    int32_t result = 0;
    if (!ring.Take(&slot, &result)) {
      const int entered = ring.Enter(0, 1);
      if (entered < 0 && entered != -EINTR) return -entered;
      continue;
    }
    if (result < 0) return -result;
    if (static_cast<size_t>(result) != options.block_bytes) return EIO;
    round->latency_us.push_back((NowSeconds() - started[slot]) * 1e6);
    ++finished;
    if (queued < blocks) {
      if (const int error = queue(slot)) return error;
    }
  }
  round->seconds = NowSeconds() - start;
  return 0;
}

// How many blocks cannot be written without waiting; -1 with errno where NOWAIT is unknown.
long CountPunted(const Options& options, int fd, char* block) {
  long punted = 0;
  for (size_t at = 0; at < options.file_bytes; at += options.block_bytes) {
    const iovec piece = {block, options.block_bytes};
    const ssize_t wrote = pwritev2(fd, &piece, 1, static_cast<off_t>(at), RWF_NOWAIT);
    if (wrote == static_cast<ssize_t>(options.block_bytes)) continue;
    if (wrote < 0 && errno != EAGAIN) return -1;
    ++punted;
    const ssize_t rest = pwrite(fd, block, options.block_bytes, static_cast<off_t>(at));
    if (rest != static_cast<ssize_t>(options.block_bytes)) return -1;
  }
  return punted;
}

struct Kind {
  long punted = -1;
  size_t workers = 0;
  double gb_per_second = 0, p50_us = 0, p99_us = 0, enter_p50_us = 0, enter_p99_us = 0;
};

// Returns "" or what failed.
std::string Measure(const Options& options, size_t kind, char* buffers, Kind* result) {
  std::vector<double> rate, p50, p99, enter_p50, enter_p99;
  WorkerWatch watch;
  std::string failure;
  for (int k = 0; k < options.rounds && failure.empty(); ++k) {
    const int fd = MakeFile(options, kind, buffers);
    if (fd < 0) {
      failure = Format("making a file with O_DIRECT: %s", strerror(errno));
      break;
    }
    Round round;
    if (const int error = WriteFile(options, fd, buffers, &round)) {
      failure = Format("io_uring write: %s", strerror(error));
    }
    close(fd);
    rate.push_back(static_cast<double>(options.file_bytes) / round.seconds / 1e9);
    p50.push_back(Quantile(round.latency_us, 0.5));
    p99.push_back(Quantile(round.latency_us, 0.99));
    enter_p50.push_back(Quantile(round.enter_us, 0.5));
    enter_p99.push_back(Quantile(round.enter_us, 0.99));
  }
  result->workers = watch.Stop();
  if (!failure.empty()) return failure;
  const int fd = MakeFile(options, kind, buffers);
  if (fd < 0) return Format("making a file: %s", strerror(errno));
  result->punted = CountPunted(options, fd, buffers);
  const int error = errno;
  close(fd);
  if (result->punted < 0) return Format("pwritev2(RWF_NOWAIT): %s", strerror(error));
  result->gb_per_second = Quantile(rate, 0.5);
  result->p50_us = Quantile(p50, 0.5);
  result->p99_us = Quantile(p99, 0.5);
  result->enter_p50_us = Quantile(enter_p50, 0.5);
  result->enter_p99_us = Quantile(enter_p99, 0.5);
  return "";
}

std::string FileSystem(const std::string& folder) {
  struct statfs info;
  if (statfs(folder.c_str(), &info) != 0) return "unknown";
  switch (static_cast<unsigned long>(info.f_type)) {
    case 0xEF53: return "ext4 (or ext2, ext3)";
    case 0x58465342: return "xfs";
    case 0x9123683E: return "btrfs";
    case 0x794C7630: return "overlayfs";
    case 0x01021994: return "tmpfs";
    case 0x6969: return "nfs";
    default: return Format("type 0x%lx", static_cast<unsigned long>(info.f_type));
  }
}

int Main(int argc, char** argv) {
  Options options;
  if (argc > 1) options.folder = argv[1];
  if (argc > 2) options.file_bytes = static_cast<size_t>(atol(argv[2])) << 20;
  if (argc > 3) options.block_bytes = static_cast<size_t>(atol(argv[3])) << 10;
  if (argc > 4) options.depth = static_cast<unsigned>(atoi(argv[4]));
  if (argc > 5) options.rounds = atoi(argv[5]);
  Figures figures;
  if (options.block_bytes == 0 || options.block_bytes % 4096 != 0 || options.file_bytes == 0 ||
      options.file_bytes % options.block_bytes != 0 || options.depth < 1 || options.depth > 4096 ||
      options.rounds < 1) {
    return Finish(kName, kFailed, figures,
                  "Blocks are multiples of 4 KiB, the file one of blocks, depth 1 to 4096.");
  }
  utsname system;
  uname(&system);
  figures.Text("kernel", system.release).Text("file_system", FileSystem(options.folder));
  figures.Number("file_bytes", static_cast<double>(options.file_bytes))
      .Number("block_bytes", static_cast<double>(options.block_bytes))
      .Number("depth", options.depth)
      .Number("rounds", options.rounds);
  {
    Uring ring;
    if (const int error = ring.Open(8)) {
      return Finish(kName, kCannotBeHad, figures,
                    Format("This kernel or container has no io_uring: %s.", strerror(error)));
    }
  }
  const size_t buffer_bytes = options.depth * options.block_bytes;
  void* memory = mmap(nullptr, buffer_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) return Finish(kName, kFailed, figures, "No memory for the buffers.");
  memset(memory, 0x5a, buffer_bytes);
  const double blocks = static_cast<double>(options.file_bytes / options.block_bytes);
  figures.Number("blocks", blocks);
  std::string sentence;
  for (size_t k = 0; k < 3; ++k) {
    Kind kind;
    const std::string failure = Measure(options, k, static_cast<char*>(memory), &kind);
    if (!failure.empty()) {
      const bool refused = failure.find(strerror(EINVAL)) != std::string::npos ||
                           failure.find(strerror(EOPNOTSUPP)) != std::string::npos;
      return Finish(kName, refused ? kCannotBeHad : kFailed, figures,
                    Format("%s: %s.", kKinds[k], failure.c_str()));
    }
    Figures of_kind;
    of_kind.Number("punted", static_cast<double>(kind.punted))
        .Number("workers_seen", static_cast<double>(kind.workers))
        .Number("gb_per_s", kind.gb_per_second)
        .Number("latency_p50_us", kind.p50_us)
        .Number("latency_p99_us", kind.p99_us)
        .Number("enter_p50_us", kind.enter_p50_us)
        .Number("enter_p99_us", kind.enter_p99_us);
    figures.Raw(kKinds[k], of_kind.Json());
    sentence += Format("%s%s: %ld of %.0f blocks punted, %zu workers seen, %.2f GB/s",
                       k == 0 ? "" : "; ", kKinds[k], kind.punted, blocks, kind.workers,
                       kind.gb_per_second);
  }
  return Finish(kName, kAnswered, figures, sentence + ".");
}

}  // namespace
}  // namespace probe

int main(int argc, char** argv) { return probe::Main(argc, argv); }
