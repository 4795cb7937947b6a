// SPDX-License-Identifier: Apache-2.0
//
// Room in the node's window: which chunks stand behind which unit, which copies are valid, and
// who makes room for whom. Pure bookkeeping: the shared words themselves are behind WindowPort.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/core/layout.h"
#include "daemon/core/types.h"

namespace zerod::core {

// The shared memory that clients look at. Calls act at once and in order; each is a few memory
// operations (Grow: page population).
class WindowPort {
 public:
  virtual ~WindowPort() = default;
  // The unit's address space is now backed by `chunks` (Unit::chunks of them); its word becomes
  // kFilling under a new epoch. REQUIRES: the word is kAbsent.
  virtual void Map(UnitIndex u, const std::vector<uint32_t>& chunks) = 0;
  // kFilling (or any) -> kValid at `version`.
  virtual void Publish(UnitIndex u, Step version) = 0;
  // -> kFilling: the chunks stay, the bytes mean nothing.
  virtual void Retract(UnitIndex u) = 0;
  // kValid or kFilling -> kAbsent where no living client claims this copy (the daemon's half of
  // the hazard pointer): true. Else the word is as it was: false.
  virtual bool TryUnmap(UnitIndex u) = 0;
  // Reserves window memory up to `chunks` in all. RESOURCE_EXHAUSTED where it is not there.
  virtual absl::Status Grow(uint64_t chunks) = 0;
  // The clients that claim the unit's copy, for messages.
  virtual std::vector<SlotIndex> Holders(UnitIndex u) = 0;
};

struct WindowSpec {
  uint64_t base_chunks = 0;      // reserved at attach
  uint64_t max_chunks = 0;       // the window never grows beyond
  std::vector<bool> pinned;      // per unit: chunks of its own, for good
  std::vector<bool> resident;    // per unit: pinned, and valid when step() returns
};

class Window {
 public:
  // `port` and `layout` outlive the window. Pinned units get their chunks here.
  Window(const WindowSpec& spec, const Layout* layout, WindowPort* port);

  enum class Copy : uint8_t { kAbsent, kFilling, kValid };
  Copy copy(UnitIndex u) const { return units_[u].copy; }
  Step version(UnitIndex u) const { return units_[u].version; }
  bool Valid(UnitIndex u, Step version) const {
    return units_[u].copy == Copy::kValid && units_[u].version == version;
  }

  enum class Room {
    kReserved,   // the unit has chunks and is kFilling
    kLater,      // room is taken by copies on their way, which nobody holds yet: ask again when
                 // one of them has arrived
    kNone,       // held copies leave none; the error says which
  };
  // Chunks for a copy of `u`, evicting what no client holds, growing the window where
  // `demand`ed and allowed. A forecast never evicts a copy that `next_use` (smaller = sooner;
  // forecasts of the caller) says is needed before `u`. REQUIRES: the unit is not kValid at the
  // current version and not kFilling already.
  Room Reserve(UnitIndex u, bool demand, const std::function<uint64_t(UnitIndex)>& next_use,
               absl::Status* error);

  // The bytes are there. REQUIRES: kFilling.
  void Publish(UnitIndex u, Step version);
  // Rewritten in place or stale: kFilling where it has chunks and `refill`, else kept as a
  // worthless copy whose chunks go to whoever asks.
  void Retract(UnitIndex u, bool refill);
  bool pinned(UnitIndex u) const { return spec_.pinned[u]; }
  bool resident(UnitIndex u) const { return spec_.resident[u]; }
  uint64_t chunks() const { return chunks_; }
  uint64_t growths() const { return growths_; }
  const WindowSpec& spec() const { return spec_; }

 private:
  struct UnitCopy {
    Copy copy = Copy::kAbsent;
    Step version = 0;
    std::vector<uint32_t> chunks;
  };
  bool EvictFor(uint64_t needed, UnitIndex u, bool demand,
                const std::function<uint64_t(UnitIndex)>& next_use);
  bool TryEvict(UnitIndex u);
  void Take(UnitIndex u);
  absl::Status NoRoom(UnitIndex u) const;

  const WindowSpec spec_;
  const Layout* const layout_;
  WindowPort* const port_;
  std::vector<UnitCopy> units_;
  std::set<uint32_t> free_;
  std::vector<std::vector<uint32_t>> last_chunks_;  // what each unit had last: asked for first
  uint64_t chunks_ = 0;
  uint64_t growths_ = 0;
};

}  // namespace zerod::core
