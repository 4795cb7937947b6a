// SPDX-License-Identifier: Apache-2.0
//
// Question 1: can GPU memory that one process exports as a VMM file descriptor be imported in
// other PID, IPC and mount namespaces (a pod), and what happens to the importer's mapping when
// the exporter is SIGKILLed while it works on that memory?
//
// What is done: the exporter creates 64 MiB and hands the fd over a socket (SCM_RIGHTS). The
// importer, in PID and IPC namespaces of its own and with a /dev/shm of its own, maps it, reads
// what the exporter wrote and writes for the exporter to read. Then the exporter is killed with
// memsets in flight; the importer reads the whole block again, writes it, reads it back, unmaps.
//
// Build: ninja gpu_probes, or in the root:
//        nvcc -std=c++17 -arch=sm_90 -I. bench/gpu_probe/vmm_fd.cu -ldl
// Run:   vmm_fd      as root, or where user namespaces are allowed
// Read:  imported and seen_both_ways: sharing works across namespaces. intact_after_kill and
//        usable_after_kill: the mapping outlives its exporter (a crash of the daemon does not
//        fault the trainer). freed_bytes about equal to block_bytes: nothing leaks.
#include <sched.h>
#include <sys/mount.h>

#include "bench/gpu_probe/cuda_driver.h"
#include "bench/gpu_probe/fd_channel.h"

namespace probe {
namespace {

constexpr const char* kName = "vmm_fd";
constexpr size_t kBytes = size_t{64} << 20;
constexpr size_t kQuarter = kBytes / 4;
constexpr unsigned kFromExporter = 0x0e0e0e0e, kFromImporter = 0x01010101, kAfter = 0xafafafaf;

// What the importer tells. A zero means that it did not come so far.
struct Told {
  char step;
  bool own_shm, imported, seen, intact, usable;
  double import_us, freed_bytes;
};

void Fill(const Driver& cu, CUstream stream, CUdeviceptr at, unsigned value, size_t bytes) {
  CU_OK(cu, cuMemsetD32Async(at, value, bytes / 4, stream));
  if (!Drain(cu, stream, 20)) _exit(kFailed);
}

bool Holds(const Driver& cu, CUstream stream, CUdeviceptr at, unsigned value, size_t bytes) {
  std::vector<unsigned> words(bytes / 4);
  CU_OK(cu, cuMemcpyDtoHAsync(words.data(), at, bytes, stream));
  if (!Drain(cu, stream, 20)) _exit(kFailed);
  for (const unsigned word : words) {
    if (word != value) return false;
  }
  return true;
}

int Exporter(int importer, int parent) {
  Driver cu;
  CUdevice device = 0;
  if (!StartGpu(&cu, &device).empty()) return kFailed;
  CUstream stream = nullptr;
  CU_OK(cu, cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  int fd = -1;
  const VmmBlock block = VmmExport(cu, kBytes, &fd);
  Fill(cu, stream, block.address, kFromExporter, kBytes);
  char step = 'x';
  if (!Send(importer, &step, 1, fd)) return kFailed;
  close(fd);
  if (!Receive(importer, &step, 1)) return kFailed;  // it wrote the second quarter
  step = Holds(cu, stream, block.address + kQuarter, kFromImporter, kQuarter) ? 'y' : 'n';
  // Busy from now on with the last quarter, until killed.
  for (unsigned round = 0;; ++round) {
    CU_OK(cu, cuMemsetD32Async(block.address + 3 * kQuarter, round, kQuarter / 4, stream));
    if (round == 100 && !Send(parent, &step, 1)) return kFailed;
    if (round % 64 == 63 && !Drain(cu, stream, 20)) return kFailed;
  }
}

int Importer(int exporter, int parent, bool own_shm) {
  Driver cu;
  CUdevice device = 0;
  if (!StartGpu(&cu, &device).empty()) return kFailed;
  CUstream stream = nullptr;
  CU_OK(cu, cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  Told told = {};
  told.own_shm = own_shm;
  char step = 0;
  int fd = -1;
  if (!Receive(exporter, &step, 1, &fd)) return kFailed;
  const double start = NowSeconds();
  const VmmBlock block = VmmImport(cu, kBytes, fd);
  told.import_us = (NowSeconds() - start) * 1e6;
  told.imported = true;
  close(fd);
  told.seen = Holds(cu, stream, block.address, kFromExporter, kBytes);
  Fill(cu, stream, block.address + kQuarter, kFromImporter, kQuarter);
  if (!Send(exporter, &step, 1) || !Receive(parent, &step, 1)) return kFailed;  // it is dead now
  told.intact = Holds(cu, stream, block.address, kFromExporter, kQuarter) &&
                Holds(cu, stream, block.address + kQuarter, kFromImporter, kQuarter) &&
                Holds(cu, stream, block.address + 2 * kQuarter, kFromExporter, kQuarter);
  Fill(cu, stream, block.address, kAfter, kBytes);
  told.usable = Holds(cu, stream, block.address, kAfter, kBytes);
  size_t before = 0, after = 0, total = 0;
  CU_OK(cu, cuMemGetInfo(&before, &total));
  VmmUnmap(cu, block);
  CU_OK(cu, cuMemGetInfo(&after, &total));
  told.freed_bytes = static_cast<double>(after) - static_cast<double>(before);
  return Send(parent, &told, sizeof(told)) ? kAnswered : kFailed;
}

// Forks the importer into its namespaces. Returns its exit code; kCannotBeHad without namespaces.
int NamespacedImporter(int exporter, int parent) {
  constexpr int kSpaces = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNS;
  if (unshare(kSpaces) != 0 && unshare(kSpaces | CLONE_NEWUSER) != 0) return kCannotBeHad;
  const bool own_shm = mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                       mount("tmpfs", "/dev/shm", "tmpfs", 0, nullptr) == 0;
  // In the new PID namespace getppid() of the child is 0, so Spawn's check does not fit.
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    _exit(Importer(exporter, parent, own_shm));
  }
  return child < 0 ? kFailed : Await(child, 120);
}

int Main() {
  Figures figures;
  const std::string reason = DescribeGpu(&figures);
  if (!reason.empty()) return Finish(kName, kCannotBeHad, figures, reason + ".");
  int across[2], of_exporter[2], of_importer[2];
  if (!MakeChannel(across, 60) || !MakeChannel(of_exporter, 60) || !MakeChannel(of_importer, 60)) {
    return Finish(kName, kFailed, figures, "No socket pairs.");
  }
  const pid_t exporter = Spawn([&] { return Exporter(across[0], of_exporter[1]); });
  const pid_t importer = Spawn([&] { return NamespacedImporter(across[1], of_importer[1]); });
  for (const int fd : {across[0], across[1], of_exporter[1], of_importer[1]}) close(fd);
  char seen_by_exporter = 0;
  Told told = {};
  const bool ready = Receive(of_exporter[0], &seen_by_exporter, 1);
  kill(exporter, SIGKILL);
  Await(exporter, 10);
  const bool done = ready && Send(of_importer[0], &seen_by_exporter, 1) &&
                    Receive(of_importer[0], &told, sizeof(told));
  const int code = Await(importer, ready ? 60 : 5);
  if (code == kCannotBeHad) {
    return Finish(kName, kCannotBeHad, figures, "No namespaces: neither root nor user namespaces.");
  }
  if (!ready) {
    return Finish(kName, kFailed, figures, "Sharing across namespaces failed; stderr says where.");
  }
  figures.Number("block_bytes", static_cast<double>(kBytes))
      .Bool("imported", true)
      .Bool("seen_both_ways", seen_by_exporter == 'y' && told.seen)
      .Bool("importer_ended_well", done && code == kAnswered)
      .Bool("own_dev_shm", told.own_shm)
      .Number("import_us", told.import_us)
      .Bool("intact_after_kill", told.intact)
      .Bool("usable_after_kill", told.usable)
      .Number("freed_bytes", told.freed_bytes);
  return Finish(kName, kAnswered, figures,
                Format("A VMM fd imports across namespaces; after the exporter's SIGKILL the "
                       "importer's mapping is %s and %s%s.",
                       told.intact ? "intact" : "NOT intact", told.usable ? "usable" : "NOT usable",
                       done ? "" : " (the importer did not finish: it died or hung)"));
}

}  // namespace
}  // namespace probe

int main() { return probe::Main(); }
