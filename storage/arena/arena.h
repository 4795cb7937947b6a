// SPDX-License-Identifier: Apache-2.0
//
// The daemon's memory: shared files (memfds) and private regions, each admitted against what the
// machine and the cgroup have before a page is touched, then reserved for real. Beyond a cgroup's
// limit the kernel kills instead of refusing, so asking first is the only way to an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace zerod::arena {

// What can still be taken, in bytes. `limited_by` names the file that said so
// ("/proc/meminfo MemAvailable", "<cgroup>/memory.max", ...).
struct Available {
  uint64_t bytes = 0;
  std::string limited_by;
};

// The seam to the world: a test substitutes its own numbers.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual absl::StatusOr<Available> Read() = 0;
};
// MemAvailable, and limit minus current of this process's cgroup and all above it (v1 and v2).
// Page cache that the cgroup could drop counts as available.
std::unique_ptr<MemorySource> MakeSystemMemorySource(std::string proc_root = "/proc",
                                                     std::string cgroup_root = "/sys/fs/cgroup");

enum class Access {
  kClientReads,   // sealed SHRINK|GROW|FUTURE_WRITE|SEAL: only the daemon's own map writes
  kClientWrites,  // sealed SHRINK|GROW|SEAL
  kPrivate,       // anonymous memory, no fd
};

class Arena;

// A mapping and, unless private, the memfd behind it. Movable; frees both when destroyed.
// Copies of the fd that clients hold keep their pages alive until those processes end.
class Region {
 public:
  Region() = default;
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  ~Region();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }          // of the file and the mapping
  size_t populated_bytes() const { return populated_; }
  int fd() const { return fd_; }                   // -1: private. Owned by the region; O_CLOEXEC.
  explicit operator bool() const { return data_ != nullptr; }

  // Reserves [populated_bytes(), to_bytes) for real, which takes about a second per GiB; the
  // arena's other callers need not wait for that. RESOURCE_EXHAUSTED with the numbers, the region
  // unchanged, where it is not there.
  absl::Status Populate(size_t to_bytes);

 private:
  friend class Arena;
  Arena* arena_ = nullptr;
  std::string name_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  size_t populated_ = 0;
  int fd_ = -1;
};

// Thread-safe. Outlives its regions.
class Arena {
 public:
  // `reserve_bytes`: what is left to the rest of the machine whatever is asked.
  Arena(std::unique_ptr<MemorySource> source, uint64_t reserve_bytes);
  ~Arena();

  // OK where `bytes` more can be had now; else RESOURCE_EXHAUSTED: what was asked, what there is,
  // which limit, and what to do. `what` begins the sentence ("the window of job x").
  absl::Status Admit(uint64_t bytes, absl::string_view what);

  // A region of `bytes` (rounded up to pages) whose first `populate_bytes` are admitted, reserved
  // and zero; the rest costs nothing until Populate().
  absl::StatusOr<Region> Allocate(absl::string_view name, uint64_t bytes, uint64_t populate_bytes,
                                  Access access);

  // Sum of populated bytes of the living regions, what Populate() has done so far included.
  uint64_t reserved_bytes() const;

 private:
  friend class Region;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace zerod::arena
