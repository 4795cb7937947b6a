// SPDX-License-Identifier: Apache-2.0
//
// The address for life of every parameter: one reservation for the whole layout, in which window
// chunks are mapped read-only where the daemon put the units; and plain mappings of whole files.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cpp/attachment.h"
#include "client/cpp/faults.h"
#include "client/cpp/fork_guard.h"

namespace zerod::client {

// A whole file, shared. Children of a fork do not get it (MADV_DONTFORK).
class FileMapping {
 public:
  FileMapping() = default;
  FileMapping(FileMapping&& other) noexcept;
  FileMapping& operator=(FileMapping&& other) noexcept;
  ~FileMapping();

  enum class Mode { kRead, kReadWrite };
  // INTERNAL where the file is shorter than `bytes`: reading beyond its end would be SIGBUS.
  // `populate`: fills the page tables now, where every page will be used.
  static absl::StatusOr<FileMapping> Map(int fd, uint64_t bytes, Mode mode, bool populate,
                                         absl::string_view what);

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  std::unique_ptr<ForkGuard> guard_;
};

// One thread at a time, except for what says otherwise. The reservation outlives the attachment:
// tensors point into it.
class AddressSpace {
  struct Private {};  // makes the constructor Create()'s own

 public:
  explicit AddressSpace(Private) {}
  // `window_fd` and `chunk_table` (the units file's) are used until Close().
  static absl::StatusOr<std::shared_ptr<AddressSpace>> Create(const AttachPlan& plan,
                                                              int window_fd,
                                                              const uint32_t* chunk_table);
  ~AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  // Maps what the chunk table says for the unit and lets it be read. The unit is held, so the
  // table's part does not change meanwhile. Chunks that stayed where they were cost nothing.
  absl::Status Map(uint32_t unit);
  // Nothing may be read until Unguard or Map. Does nothing for a unit that is guarded.
  absl::Status Guard(uint32_t unit);
  absl::Status Unguard(uint32_t unit);
  // Forgets the window and the table; everything stays mapped as it is.
  void Close();

  const std::byte* UnitData(uint32_t unit) const;
  const std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  uint64_t remaps() const { return remaps_.load(std::memory_order_relaxed); }  // any thread

  // For the fault handler's message. Any thread.
  void SetStep(uint64_t step) { step_.store(step, std::memory_order_relaxed); }
  void SetHeld(uint32_t unit, bool held) {
    held_[unit].store(held ? 1 : 0, std::memory_order_relaxed);
  }

 private:
  struct UnitPages {
    uint64_t first_chunk = 0;
    uint64_t chunks = 0;
    bool readable = false;
  };
  absl::Status Protect(uint32_t unit, int protection);

  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
  int window_fd_ = -1;
  const uint32_t* chunk_table_ = nullptr;
  uint64_t window_chunks_ = 0;
  std::vector<UnitPages> units_;
  std::vector<uint32_t> mapped_;   // per chunk of the range: the window chunk mapped there
  std::vector<uint32_t> wanted_;   // scratch of Map
  std::atomic<uint64_t> remaps_{0};
  std::atomic<uint64_t> step_{0};
  std::unique_ptr<std::atomic<uint8_t>[]> held_;
  FaultTable faults_;
  ForkGuard guard_;
};

}  // namespace zerod::client
