// SPDX-License-Identifier: Apache-2.0
//
// What the arena promises about admission, reservation and seals, against a made-up machine.
#include "storage/arena/arena.h"

#include <errno.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

namespace zerod::arena {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMiB = size_t{1} << 20;

// A machine whose free memory the test sets; what the arena takes is not subtracted from it.
struct Machine {
  uint64_t bytes = 1024 * kMiB;
  absl::Status error;
  int reads = 0;
};

class FakeSource : public MemorySource {
 public:
  explicit FakeSource(Machine* machine) : machine_(machine) {}
  absl::StatusOr<Available> Read() override {
    ++machine_->reads;
    if (!machine_->error.ok()) return machine_->error;
    return Available{machine_->bytes, "/fake/memory.max"};
  }

 private:
  Machine* const machine_;
};

class ArenaTest : public ::testing::Test {
 protected:
  Machine machine_;
  Arena arena_{std::make_unique<FakeSource>(&machine_), /*reserve_bytes=*/16 * kMiB};
};

size_t OpenFds() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// How many of the region's pages the kernel has given it.
size_t ResidentPages(const Region& region) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident(region.bytes() / page);
  EXPECT_EQ(mincore(region.data(), region.bytes(), resident.data()), 0) << strerror(errno);
  size_t count = 0;
  for (unsigned char r : resident) count += r & 1;
  return count;
}

TEST_F(ArenaTest, RefusalNamesEveryNumber) {
  machine_.bytes = 50 * kMiB;
  const absl::Status status = arena_.Admit(100 * kMiB, "the window of job j");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  const std::string text(status.message());
  EXPECT_THAT(text, HasSubstr("the window of job j needs 100.0 MiB (104857600 bytes)"));
  EXPECT_THAT(text, HasSubstr("34.0 MiB (35651584 bytes) can be had"));
  EXPECT_THAT(text, HasSubstr("/fake/memory.max leaves 52428800 bytes"));
  EXPECT_THAT(text, HasSubstr("16777216 of which are kept"));
  EXPECT_TRUE(arena_.Admit(34 * kMiB, "x").ok());
  EXPECT_FALSE(arena_.Admit(34 * kMiB + 1, "x").ok());
}

TEST_F(ArenaTest, ReserveLargerThanMemoryRefusesEverything) {
  machine_.bytes = 8 * kMiB;
  EXPECT_TRUE(arena_.Admit(0, "nothing").ok());
  EXPECT_FALSE(arena_.Admit(1, "a byte").ok());
}

TEST_F(ArenaTest, UnreadableMachineIsAnError) {
  machine_.error = absl::FailedPreconditionError("no /proc");
  EXPECT_EQ(arena_.Admit(1, "x"), machine_.error);
  EXPECT_EQ(arena_.Allocate("x", kMiB, kMiB, Access::kClientReads).status(), machine_.error);
  EXPECT_EQ(arena_.reserved_bytes(), 0u);
}

TEST_F(ArenaTest, SillySizesAreRefused) {
  for (auto [bytes, populate] : std::vector<std::pair<uint64_t, uint64_t>>{
           {0, 0}, {1, 2}, {~uint64_t{0}, 0}, {uint64_t{1} << 63, 0}}) {
    EXPECT_EQ(arena_.Allocate("x", bytes, populate, Access::kPrivate).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

// Gigabytes of one job must not keep the loop of another waiting.
TEST_F(ArenaTest, WhatIsBeingPopulatedKeepsNobodyWaiting) {
  constexpr uint64_t kLarge = 768 * kMiB;
  std::atomic<bool> done{false};
  std::thread slow([&] {
    auto large = arena_.Allocate("large", kLarge, kLarge, Access::kPrivate);
    done = true;
    EXPECT_TRUE(large.ok()) << large.status();
  });
  while (arena_.reserved_bytes() == 0 && !done) std::this_thread::yield();
  bool meanwhile = false;
  while (!done) {
    auto small = arena_.Allocate("small", 4096, 4096, Access::kPrivate);
    ASSERT_TRUE(small.ok()) << small.status();
    meanwhile = meanwhile || !done;
  }
  slow.join();
  EXPECT_TRUE(meanwhile);
}

// A machine whose free memory is what the arena has not taken yet.
class ShrinkingSource : public MemorySource {
 public:
  ShrinkingSource(uint64_t bytes, Arena** arena) : bytes_(bytes), arena_(arena) {}
  absl::StatusOr<Available> Read() override {
    return Available{bytes_ - (*arena_)->reserved_bytes(), "/fake/memory.max"};
  }

 private:
  const uint64_t bytes_;
  Arena** const arena_;
};

TEST(ArenaThreadsTest, TheSameMemoryIsPromisedOnce) {
  constexpr uint64_t kCapacity = 80 * kMiB;
  constexpr uint64_t kEach = 32 * kMiB;
  for (int round = 0; round < 10; ++round) {
    Arena* arena = nullptr;
    Arena real(std::make_unique<ShrinkingSource>(kCapacity, &arena), /*reserve_bytes=*/0);
    arena = &real;
    std::atomic<int> waiting{4};
    std::vector<absl::StatusOr<Region>> regions(4);
    std::vector<std::thread> threads;
    for (auto& region : regions) {
      threads.emplace_back([&] {
        --waiting;
        while (waiting > 0) std::this_thread::yield();
        region = real.Allocate("each", kEach, kEach, Access::kPrivate);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_LE(real.reserved_bytes(), kCapacity);
    int admitted = 0;
    for (const auto& region : regions) {
      admitted += region.ok();
      if (!region.ok()) {
        EXPECT_EQ(region.status().code(), absl::StatusCode::kResourceExhausted);
      }
    }
    EXPECT_GE(admitted, 1);
    EXPECT_EQ(real.reserved_bytes(), admitted * kEach);
    // Whoever was refused left no claim behind.
    regions.clear();
    EXPECT_TRUE(real.Admit(kCapacity, "all of it").ok());
  }
}

class ArenaAccessTest : public ArenaTest, public ::testing::WithParamInterface<Access> {};

TEST_P(ArenaAccessTest, PopulatesWhatWasAskedAndNoMore) {
  auto region = arena_.Allocate("r", 8 * kMiB + 5, 2 * kMiB + 1, GetParam());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->bytes(), 8 * kMiB + 4096);
  EXPECT_EQ(region->populated_bytes(), 2 * kMiB + 4096);
  EXPECT_EQ(region->fd() >= 0, GetParam() != Access::kPrivate);
  EXPECT_EQ(ResidentPages(*region), region->populated_bytes() / 4096);
  EXPECT_EQ(arena_.reserved_bytes(), region->populated_bytes());
  for (size_t i = 0; i < region->populated_bytes(); ++i) {
    ASSERT_EQ(region->data()[i], std::byte{0});
  }
  region->data()[0] = std::byte{7};

  ASSERT_TRUE(region->Populate(4 * kMiB).ok());
  EXPECT_EQ(ResidentPages(*region), 1024u);
  EXPECT_EQ(region->data()[0], std::byte{7}) << "populating must not touch what was there";
  EXPECT_TRUE(region->Populate(kMiB).ok()) << "less than there is: nothing to do";
  EXPECT_EQ(region->populated_bytes(), 4 * kMiB);
  EXPECT_EQ(region->Populate(9 * kMiB).code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(ArenaAccessTest, RefusedGrowthLeavesTheRegionAsItWas) {
  auto region = arena_.Allocate("growing", 64 * kMiB, kMiB, GetParam());
  ASSERT_TRUE(region.ok()) << region.status();
  machine_.bytes = 16 * kMiB;
  EXPECT_EQ(region->Populate(2 * kMiB).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(region->populated_bytes(), kMiB);
  EXPECT_EQ(ResidentPages(*region), kMiB / 4096);
  EXPECT_EQ(arena_.reserved_bytes(), kMiB);
  machine_.bytes = 17 * kMiB;
  EXPECT_TRUE(region->Populate(2 * kMiB).ok());
  EXPECT_EQ(arena_.reserved_bytes(), 2 * kMiB);
}

TEST_P(ArenaAccessTest, NothingIsLeftBehind) {
  const size_t fds_before = OpenFds();
  for (int i = 0; i < 50; ++i) {
    auto region = arena_.Allocate("r", 4 * kMiB, kMiB, GetParam());
    ASSERT_TRUE(region.ok()) << region.status();
    Region moved = std::move(*region);
    EXPECT_FALSE(*region);
    EXPECT_EQ(arena_.reserved_bytes(), kMiB);
    auto other = arena_.Allocate("other", kMiB, kMiB, GetParam());
    ASSERT_TRUE(other.ok());
    moved = std::move(*other);  // frees the first at once
    EXPECT_EQ(arena_.reserved_bytes(), kMiB);
    EXPECT_EQ(moved.bytes(), kMiB);
    // A refusal gives back its fd and address space too.
    EXPECT_EQ(arena_.Allocate("huge", 2048 * kMiB, 2048 * kMiB, GetParam()).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(arena_.reserved_bytes(), 0u);
  EXPECT_EQ(OpenFds(), fds_before);
}

INSTANTIATE_TEST_SUITE_P(All, ArenaAccessTest,
                         ::testing::Values(Access::kClientReads, Access::kClientWrites,
                                           Access::kPrivate));

// What a client does with the fd that it was sent, as far as errno goes.
class SealTest : public ArenaTest {
 protected:
  void Make(Access access) {
    auto region = arena_.Allocate("sealed", kMiB, kMiB, access);
    ASSERT_TRUE(region.ok()) << region.status();
    region_ = std::move(*region);
    region_.data()[0] = std::byte{42};
  }
  int MapError(int protection) {
    void* map = mmap(nullptr, kMiB, protection, MAP_SHARED, region_.fd(), 0);
    if (map == MAP_FAILED) return errno;
    munmap(map, kMiB);
    return 0;
  }
  static int ErrorOf(int result) { return result == 0 ? 0 : errno; }

  Region region_;
};

TEST_F(SealTest, ClientsCannotWriteWhatTheyRead) {
  Make(Access::kClientReads);
  const int seals = fcntl(region_.fd(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | F_SEAL_FUTURE_WRITE),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | F_SEAL_FUTURE_WRITE);
  EXPECT_EQ(MapError(PROT_READ | PROT_WRITE), EPERM);

  auto* map = static_cast<std::byte*>(mmap(nullptr, kMiB, PROT_READ, MAP_SHARED, region_.fd(), 0));
  ASSERT_NE(map, MAP_FAILED);
  EXPECT_EQ(ErrorOf(mprotect(map, kMiB, PROT_READ | PROT_WRITE)), EACCES);
  EXPECT_NE(ErrorOf(madvise(map, kMiB, MADV_REMOVE)), 0);
  EXPECT_EQ(ErrorOf(fallocate(region_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096)),
            EPERM);
  EXPECT_EQ(pwrite(region_.fd(), "x", 1, 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(ErrorOf(ftruncate(region_.fd(), 0)), EPERM);
  EXPECT_EQ(ErrorOf(ftruncate(region_.fd(), 2 * kMiB)), EPERM);
  EXPECT_EQ(ErrorOf(fcntl(region_.fd(), F_ADD_SEALS, F_SEAL_WRITE)), EPERM);
  EXPECT_EQ(map[0], std::byte{42});

  region_.data()[0] = std::byte{43};
  EXPECT_EQ(map[0], std::byte{43}) << "the daemon's own map still writes";
  munmap(map, kMiB);
}

TEST_F(SealTest, OpeningTheFileAnewGivesNoWriteAccess) {
  Make(Access::kClientReads);
  const std::string path = "/proc/self/fd/" + std::to_string(region_.fd());
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0) << strerror(errno);
  EXPECT_EQ(mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  close(fd);
}

TEST_F(SealTest, ClientWritableFilesKeepTheirSize) {
  Make(Access::kClientWrites);
  EXPECT_EQ(MapError(PROT_READ | PROT_WRITE), 0);
  EXPECT_EQ(ErrorOf(ftruncate(region_.fd(), 0)), EPERM);
  EXPECT_EQ(ErrorOf(ftruncate(region_.fd(), 2 * kMiB)), EPERM);
  EXPECT_EQ(ErrorOf(fcntl(region_.fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE)), EPERM);
  // A hole may be punched by whoever may write; the daemon then reads zeros and never faults.
  EXPECT_EQ(ErrorOf(fallocate(region_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kMiB)),
            0);
  EXPECT_EQ(region_.data()[0], std::byte{0});
}

TEST_F(SealTest, FdsAreNotInherited) {
  Make(Access::kClientReads);
  EXPECT_NE(fcntl(region_.fd(), F_GETFD) & FD_CLOEXEC, 0);
}

}  // namespace
}  // namespace zerod::arena
