// SPDX-License-Identifier: Apache-2.0
//
// What is read out of /proc and /sys/fs/cgroup, on made-up trees of either cgroup version.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "storage/arena/arena.h"

namespace zerod::arena {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

constexpr uint64_t kMiB = uint64_t{1} << 20;

class MemorySourceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "zerod-memory-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    Put("proc/meminfo", "MemTotal: 9999999 kB\nMemFree: 5 kB\nMemAvailable:    1048576 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Put(const std::string& path, const std::string& text) {
    const std::filesystem::path full = root_ / path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }
  absl::StatusOr<Available> Read() {
    return MakeSystemMemorySource((root_ / "proc").string(), (root_ / "cgroup").string())->Read();
  }
  void Expect(uint64_t bytes, const std::string& limited_by) {
    const auto available = Read();
    ASSERT_TRUE(available.ok()) << available.status();
    EXPECT_EQ(available->bytes, bytes);
    EXPECT_THAT(available->limited_by, EndsWith(limited_by));
  }

  std::filesystem::path root_;
};

TEST_F(MemorySourceTest, MachineAloneWhereThereIsNoCgroup) {
  Expect(1024 * kMiB, "/meminfo MemAvailable");
  Put("proc/self/cgroup", "0::/gone\n4:memory:/gone\n");
  Expect(1024 * kMiB, "/meminfo MemAvailable");
}

TEST_F(MemorySourceTest, Version1CountsDroppableCacheOfTheSubtree) {
  Put("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n");
  Put("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Put("cgroup/memory/a/b/memory.limit_in_bytes", "104857600\n");
  Put("cgroup/memory/a/b/memory.usage_in_bytes", "62914560\n");
  Put("cgroup/memory/a/b/memory.stat", "inactive_file 7\ntotal_inactive_file 10485760\n");
  Expect(50 * kMiB, "/memory/a/b/memory.limit_in_bytes");
}

TEST_F(MemorySourceTest, Version2TakesTheTightestAncestor) {
  Put("proc/self/cgroup", "0::/job/task\n");
  Put("cgroup/job/memory.max", "209715200\n");
  Put("cgroup/job/memory.current", "199229440\n");
  Put("cgroup/job/memory.stat", "anon 5\ninactive_file 1048576\nactive_file 9\n");
  Put("cgroup/job/task/memory.max", "max\n");
  Put("cgroup/job/task/memory.current", "5\n");
  Expect(11 * kMiB, "/job/memory.max");
  Put("cgroup/job/task/memory.high", "3145733\n");
  Expect(3 * kMiB, "/job/task/memory.high");
}

TEST_F(MemorySourceTest, Version2OfAHybridHost) {
  Put("proc/self/cgroup", "1:cpu:/\n0::/x\n");
  Put("cgroup/unified/x/memory.max", "1048576\n");
  Put("cgroup/unified/x/memory.current", "0\n");
  Expect(kMiB, "/unified/x/memory.max");
}

TEST_F(MemorySourceTest, MountRootCountsInsideAContainer) {
  // The container sees its host's path, and its own cgroup as the root of the mount.
  Put("proc/self/cgroup", "4:memory:/docker/0123\n");
  Put("cgroup/memory/memory.limit_in_bytes", "2097152\n");
  Put("cgroup/memory/memory.usage_in_bytes", "1048576\n");
  Expect(kMiB, "/cgroup/memory/memory.limit_in_bytes");
  Put("proc/self/cgroup", "4:memory:/../outside\n");
  Expect(kMiB, "/cgroup/memory/memory.limit_in_bytes");
}

TEST_F(MemorySourceTest, OverTheLimitIsZeroNotNegative) {
  Put("proc/self/cgroup", "0::/\n");
  Put("cgroup/memory.max", "1048576\n");
  Put("cgroup/memory.current", "2097152\n");
  Expect(0, "/cgroup/memory.max");
}

TEST_F(MemorySourceTest, NonsenseIsAnErrorThatNamesTheFile) {
  Put("proc/self/cgroup", "0::/\n");
  Put("cgroup/memory.max", "plenty\n");
  EXPECT_THAT(std::string(Read().status().message()), HasSubstr("/cgroup/memory.max holds no"));
  Put("cgroup/memory.max", "max\n");
  Put("proc/meminfo", "MemTotal: 3 kB\n");
  EXPECT_THAT(std::string(Read().status().message()), HasSubstr("has no MemAvailable"));
}

TEST(SystemMemorySourceTest, ReadsThisMachine) {
  const auto available = MakeSystemMemorySource()->Read();
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_GT(available->bytes, 0u);
  EXPECT_FALSE(available->limited_by.empty());
}

}  // namespace
}  // namespace zerod::arena
