// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/window.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace zerod::core {

Window::Window(const WindowSpec& spec, const Layout* layout, WindowPort* port)
    : spec_(spec), layout_(layout), port_(port), units_(layout->units().size()),
      last_chunks_(layout->units().size()) {
  CHECK_EQ(spec_.pinned.size(), units_.size());
  CHECK_EQ(spec_.resident.size(), units_.size());
  chunks_ = spec_.base_chunks;
  for (uint32_t c = 0; c < chunks_; ++c) free_.insert(free_.end(), c);
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (spec_.pinned[u]) Take(u);
  }
}

// Gives free chunks to `u`: those that it had last where they are free, so that in the steady
// state nothing is remapped, then the lowest.
void Window::Take(UnitIndex u) {
  const uint64_t needed = layout_->units()[u].chunks;
  CHECK_GE(free_.size(), needed);
  UnitCopy& unit = units_[u];
  CHECK(unit.chunks.empty());
  for (uint32_t c : last_chunks_[u]) {
    if (free_.erase(c)) unit.chunks.push_back(c);
  }
  if (unit.chunks.size() != needed) {
    // A partial match would scatter the unit; one contiguous run maps with one call.
    for (uint32_t c : unit.chunks) free_.insert(c);
    unit.chunks.clear();
    while (unit.chunks.size() < needed) {
      unit.chunks.push_back(*free_.begin());
      free_.erase(free_.begin());
    }
  }
  last_chunks_[u] = unit.chunks;
  port_->Map(u, unit.chunks);
}

bool Window::TryEvict(UnitIndex u) {
  UnitCopy& unit = units_[u];
  if (unit.chunks.empty() || spec_.pinned[u] || unit.copy == Copy::kFilling) return false;
  if (!port_->TryUnmap(u)) return false;
  free_.insert(unit.chunks.begin(), unit.chunks.end());
  unit.chunks.clear();
  unit.copy = Copy::kAbsent;
  return true;
}

// Evicts until `needed` chunks are free: worthless copies first, then what is needed last.
bool Window::EvictFor(uint64_t needed, UnitIndex u, bool demand,
                      const std::function<uint64_t(UnitIndex)>& next_use) {
  std::vector<std::pair<uint64_t, UnitIndex>> victims;
  const uint64_t own_use = next_use(u);
  for (UnitIndex v = 0; v < units_.size(); ++v) {
    const UnitCopy& unit = units_[v];
    if (v == u || unit.chunks.empty() || spec_.pinned[v] || unit.copy == Copy::kFilling) continue;
    uint64_t use = unit.copy == Copy::kValid ? next_use(v) : UINT64_MAX;
    if (!demand && use <= own_use) continue;
    victims.emplace_back(use, v);
  }
  std::sort(victims.begin(), victims.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  for (const auto& [use, v] : victims) {
    if (free_.size() >= needed) break;
    TryEvict(v);
  }
  return free_.size() >= needed;
}

Window::Room Window::Reserve(UnitIndex u, bool demand,
                             const std::function<uint64_t(UnitIndex)>& next_use,
                             absl::Status* error) {
  UnitCopy& unit = units_[u];
  CHECK(unit.copy == Copy::kAbsent);
  if (unit.chunks.empty()) {
    const uint64_t needed = layout_->units()[u].chunks;
    if (free_.size() < needed && !EvictFor(needed, u, demand, next_use)) {
      if (!demand) return Room::kLater;
      for (UnitIndex v = 0; v < units_.size(); ++v) {
        // Its arrival waits for no client; once there it is evictable unless somebody holds it.
        if (units_[v].copy == Copy::kFilling && !spec_.pinned[v]) return Room::kLater;
      }
      const uint64_t grown = chunks_ + needed - free_.size();
      if (grown > spec_.max_chunks) {
        *error = NoRoom(u);
        return Room::kNone;
      }
      absl::Status status = port_->Grow(grown);
      if (!status.ok()) {
        *error = status;
        return Room::kNone;
      }
      while (chunks_ < grown) free_.insert(free_.end(), static_cast<uint32_t>(chunks_++));
      ++growths_;
    }
    Take(u);
  } else {
    port_->Retract(u);
  }
  unit.copy = Copy::kFilling;
  return Room::kReserved;
}

void Window::Publish(UnitIndex u, Step version) {
  CHECK(!units_[u].chunks.empty());
  units_[u].copy = Copy::kValid;
  units_[u].version = version;
  port_->Publish(u, version);
}

void Window::Retract(UnitIndex u, bool refill) {
  UnitCopy& unit = units_[u];
  if (unit.chunks.empty()) return;
  port_->Retract(u);
  unit.copy = refill ? Copy::kFilling : Copy::kAbsent;
}

absl::Status Window::NoRoom(UnitIndex u) const {
  const uint64_t needed = layout_->units()[u].chunks;
  uint64_t held_chunks = 0;
  std::vector<std::string> held;
  for (UnitIndex v = 0; v < units_.size(); ++v) {
    if (units_[v].chunks.empty() || spec_.pinned[v]) continue;
    std::vector<SlotIndex> holders = port_->Holders(v);
    if (holders.empty()) continue;
    held_chunks += units_[v].chunks.size();
    if (held.size() < 8) {
      held.push_back(absl::StrCat("'", layout_->units()[v].name, "' (local rank ",
                                  absl::StrJoin(holders, ", "), ")"));
    }
  }
  uint64_t pinned_chunks = 0;
  for (UnitIndex v = 0; v < units_.size(); ++v) {
    if (spec_.pinned[v]) pinned_chunks += layout_->units()[v].chunks;
  }
  const uint64_t chunk_bytes = 64 * 1024;
  const uint64_t wanted = held_chunks + needed;
  return absl::ResourceExhaustedError(absl::StrCat(
      "no room in the window for the unit '", layout_->units()[u].name, "' (", needed * chunk_bytes,
      " bytes): the window may have ", spec_.max_chunks * chunk_bytes, " bytes, of which ",
      pinned_chunks * chunk_bytes, " are persistent units and ", held_chunks * chunk_bytes,
      " are held: ", absl::StrJoin(held, ", "), ". A window of ",
      (pinned_chunks + wanted) * chunk_bytes,
      " bytes would do: raise zerod.window_bytes_max to it, or stage3_max_live_parameters to ",
      wanted * chunk_bytes / DTypeBytes(layout_->dtype())));
}

}  // namespace zerod::core
