// SPDX-License-Identifier: Apache-2.0
//
// The window of a job and the table of its units, as clients map them: core::WindowPort over the
// files of proto/shm/format.h.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/core/layout.h"
#include "daemon/core/window.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

// Where the daemon finds the copy of one unit: a snapshot of its chunks, good while core keeps the
// unit's chunks (from a StartAllGather, StartApply or StartPut to its answer). Any thread.
class UnitCopy {
 public:
  UnitCopy() = default;
  UnitCopy(std::byte* window, std::vector<uint32_t> chunks, uint64_t element_bytes)
      : window_(window), chunks_(std::move(chunks)), element_bytes_(element_bytes) {}

  // False: the unit has no chunks.
  bool mapped() const { return !chunks_.empty(); }
  // Where elements [range) lie if in one piece, else null.
  std::byte* Contiguous(core::Range range) const;
  // Calls `visit` with the longest contiguous pieces of `range`, in order.
  void ForEach(core::Range range,
               const std::function<void(std::byte* data, core::Range piece)>& visit) const;
  // Copies `range` to or from a dense buffer.
  void Store(core::Range range, const void* from) const;
  void Load(core::Range range, void* to) const;

 private:
  std::byte* At(uint64_t element) const;
  uint64_t ContiguousEnd(core::Range range) const;

  std::byte* window_ = nullptr;
  std::vector<uint32_t> chunks_;
  uint64_t element_bytes_ = 4;
};

// One thread (the loop), but for what UnitCopy hands out.
class WindowFiles : public core::WindowPort {
 public:
  // The hold words of every client that may still read: (slot, word of unit 0).
  struct Holder {
    core::SlotIndex slot;
    const std::atomic<uint32_t>* holds;
  };
  using HolderList = std::function<std::vector<Holder>()>;

  // Reserves spec.base_chunks. RESOURCE_EXHAUSTED where they are not there.
  static absl::StatusOr<std::unique_ptr<WindowFiles>> Create(
      arena::Arena* arena, const std::string& job, std::shared_ptr<const core::Layout> layout,
      const core::WindowSpec& spec);

  // Must be set before the first TryUnmap.
  void set_holders(HolderList holders) { holders_ = std::move(holders); }

  void Map(core::UnitIndex u, const std::vector<uint32_t>& chunks) override;
  void Publish(core::UnitIndex u, core::Step version) override;
  void Retract(core::UnitIndex u) override;
  bool TryUnmap(core::UnitIndex u) override;
  absl::Status Grow(uint64_t chunks) override;
  std::vector<core::SlotIndex> Holders(core::UnitIndex u) override;

  UnitCopy Copy(core::UnitIndex u) const;
  int units_fd() const { return units_.fd(); }
  int window_fd() const { return window_.fd(); }
  uint64_t units_bytes() const { return units_.populated_bytes(); }
  uint64_t window_bytes() const { return window_.populated_bytes(); }
  uint64_t growths() const { return growths_; }

 private:
  WindowFiles(std::shared_ptr<const core::Layout> layout, arena::Region units,
              arena::Region window);
  void SetState(core::UnitIndex u, uint8_t state, uint32_t version);

  const std::shared_ptr<const core::Layout> layout_;
  arena::Region units_;
  arena::Region window_;
  std::atomic<uint64_t>* words_ = nullptr;
  uint32_t* table_ = nullptr;
  std::vector<std::vector<uint32_t>> chunks_;  // per unit: what its table says
  HolderList holders_;
  uint64_t growths_ = 0;
};

}  // namespace zerod::engine
