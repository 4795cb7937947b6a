// SPDX-License-Identifier: Apache-2.0
//
// Under a real memory limit: an arena refuses with the numbers where touching the memory would
// have had the kernel kill the process.
#include <errno.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>

#include "storage/arena/arena.h"

namespace zerod::arena {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kLimitBytes = 192 * kMiB;

bool WriteFile(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool written = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  close(fd);
  return written;
}

// This process's path in the memory hierarchy, or "" where there is none.
std::string OwnFolder(const std::string& start, const std::string& mount) {
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t at = line.find(start);
    if (at == std::string::npos) continue;
    return mount + line.substr(at + start.size());
  }
  return "";
}

// A cgroup of our own with kLimitBytes; removed at the end.
class LimitedGroup {
 public:
  LimitedGroup() {
    struct Place {
      std::string parent, limit_file;
    };
    for (const Place& place :
         {Place{OwnFolder(":memory:", "/sys/fs/cgroup/memory"), "memory.limit_in_bytes"},
          Place{OwnFolder("0::", "/sys/fs/cgroup"), "memory.max"}}) {
      if (place.parent.empty()) continue;
      const std::string folder = place.parent + "/zerod-test-" + std::to_string(getpid());
      if (mkdir(folder.c_str(), 0755) != 0) {
        reason_ += "cannot make " + folder + ": " + strerror(errno) + "; ";
        continue;
      }
      if (WriteFile(folder + "/" + place.limit_file, std::to_string(kLimitBytes))) {
        folder_ = folder;
        limit_path_ = folder + "/" + place.limit_file;
        return;
      }
      reason_ += "cannot set " + folder + "/" + place.limit_file + ": " + strerror(errno) + "; ";
      rmdir(folder.c_str());
    }
    if (reason_.empty()) reason_ = "no memory cgroup is mounted";
  }
  ~LimitedGroup() {
    if (!folder_.empty()) {
      EXPECT_EQ(rmdir(folder_.c_str()), 0) << folder_ << ": " << strerror(errno);
    }
  }
  bool ok() const { return !folder_.empty(); }
  const std::string& reason() const { return reason_; }
  const std::string& limit_path() const { return limit_path_; }
  bool Enter() const {
    return WriteFile(folder_ + "/cgroup.procs", std::to_string(getpid()));
  }

 private:
  std::string folder_, limit_path_, reason_;
};

// What went wrong in the child, as its exit status; 0 is success.
enum ChildResult { kFine, kNotEntered, kSmallRefused, kLargeGranted, kWrongError, kUnexpected };

ChildResult AskForMemory(const LimitedGroup& group, Access access) {
  if (!group.Enter()) return kNotEntered;
  Arena arena(MakeSystemMemorySource(), /*reserve_bytes=*/16 * kMiB);
  auto small = arena.Allocate("small", 32 * kMiB, 32 * kMiB, access);
  if (!small.ok()) return kSmallRefused;
  auto large = arena.Allocate("large", 4 * kLimitBytes, 4 * kLimitBytes, access);
  if (large.ok()) return kLargeGranted;
  if (large.status().code() != absl::StatusCode::kResourceExhausted ||
      std::string(large.status().message()).find(group.limit_path()) == std::string::npos) {
    return kWrongError;
  }
  // What is already taken counts: this would fit an empty group.
  if (small->populated_bytes() != 32 * kMiB) return kUnexpected;
  return arena.Allocate("second", 160 * kMiB, 160 * kMiB, access).ok() ? kLargeGranted : kFine;
}

class CgroupTest : public ::testing::TestWithParam<Access> {};

TEST_P(CgroupTest, RefusesInsteadOfBeingKilled) {
  LimitedGroup group;
  if (!group.ok()) GTEST_SKIP() << group.reason();
  const pid_t child = fork();
  ASSERT_GE(child, 0) << strerror(errno);
  if (child == 0) _exit(AskForMemory(group, GetParam()));
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "killed by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), kFine);
}

INSTANTIATE_TEST_SUITE_P(All, CgroupTest,
                         ::testing::Values(Access::kClientReads, Access::kPrivate));

// The other side of the claim: without asking, the same request does end in a kill. Were it not
// so, the test above would prove nothing.
TEST(CgroupControlTest, TouchingWithoutAskingIsKilled) {
  LimitedGroup group;
  if (!group.ok()) GTEST_SKIP() << group.reason();
  const pid_t child = fork();
  ASSERT_GE(child, 0) << strerror(errno);
  if (child == 0) {
    if (!group.Enter()) _exit(kNotEntered);
    const uint64_t bytes = 4 * kLimitBytes;
    const int fd = memfd_create("unasked", MFD_CLOEXEC);
    if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) _exit(kUnexpected);
    void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) _exit(kUnexpected);
    for (uint64_t at = 0; at < bytes; at += 4096) static_cast<volatile char*>(map)[at] = 1;
    _exit(kFine);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << "exit status " << WEXITSTATUS(status)
                                   << ": the limit does not bite here (swap?)";
  EXPECT_TRUE(WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGBUS) << WTERMSIG(status);
}

}  // namespace
}  // namespace zerod::arena
