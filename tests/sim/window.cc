// SPDX-License-Identifier: Apache-2.0
//
// The window as clients of the simulation see it.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tests/sim/member.h"
#include "tests/sim/process.h"
#include "tests/sim/world.h"

namespace zerod::sim {

SimWindow::SimWindow(World* world, Member* member)
    : world_(world), member_(member), copies_(world->scenario().cells.size()),
      chunk_user_(world->scenario().spec.window.max_chunks, -1),
      chunks_(world->scenario().spec.window.base_chunks) {}

void SimWindow::CheckUnread(UnitIndex u, const char* what) const {
  const bool resident = world_->scenario().spec.window.resident[u];
  for (const auto& p : member_->slots()) {
    if (p == nullptr || !p->Reads(u, resident)) continue;
    Violate(absl::StrCat("invariant 2: member ", member_->index(), " ", what, " the copy of unit ",
                         u, " that rank ", p->rank(), " reads in step ", p->step()));
  }
}

void SimWindow::Map(UnitIndex u, const std::vector<uint32_t>& chunks) {
  Copy& copy = copies_[u];
  if (copy.state != State::kAbsent) Violate(absl::StrCat("unit ", u, " is mapped twice"));
  CheckUnread(u, "remaps");
  if (chunks.size() != world_->scenario().layout().units()[u].chunks) {
    Violate(absl::StrCat("unit ", u, " gets ", chunks.size(), " chunks"));
  }
  for (uint32_t c : chunks) {
    if (c >= chunks_) Violate(absl::StrCat("chunk ", c, " is outside the window"));
    const int64_t user = chunk_user_[c];
    if (user >= 0 && user != u) {
      Violate(absl::StrCat("chunk ", c, " stands behind the units ", user, " and ", u));
    }
    chunk_user_[c] = u;
  }
  if (copy.chunks != chunks) ++copy.epoch;
  copy.chunks = chunks;
  copy.state = State::kFilling;
  copy.values.assign(world_->scenario().cells[u].size(), 0);
}

void SimWindow::Publish(UnitIndex u, core::Step version) {
  Copy& copy = copies_[u];
  if (copy.state == State::kAbsent) Violate(absl::StrCat("unit ", u, " is published unmapped"));
  CheckUnread(u, "publishes");
  copy.state = State::kValid;
  copy.version = version;
}

void SimWindow::Retract(UnitIndex u) {
  CheckUnread(u, "retracts");
  if (copies_[u].state == State::kAbsent) Violate(absl::StrCat("unit ", u, " is not mapped"));
  copies_[u].state = State::kFilling;
}

bool SimWindow::TryUnmap(UnitIndex u) {
  Copy& copy = copies_[u];
  if (copy.state == State::kValid && !Holders(u).empty()) return false;
  CheckUnread(u, "evicts");
  copy.state = State::kAbsent;
  for (uint32_t c : copy.chunks) chunk_user_[c] = -1;
  return true;
}

absl::Status SimWindow::Grow(uint64_t chunks) {
  if (chunks > world_->scenario().spec.window.max_chunks) Violate("the window grows too far");
  chunks_ = chunks;
  return absl::OkStatus();
}

std::vector<SlotIndex> SimWindow::Holders(UnitIndex u) {
  std::vector<SlotIndex> slots;
  for (const auto& p : member_->slots()) {
    if (p != nullptr && !p->reaped() && p->claim(u) == copies_[u].version + 1) {
      slots.push_back(p->slot());
    }
  }
  return slots;
}

void SimWindow::Scramble(UnitIndex u) {
  CheckUnread(u, "rewrites");
  for (uint64_t& v : copies_[u].values) v = Hash(v, 0xbad);
}

void SimWindow::Fill(UnitIndex u, const std::vector<uint64_t>& values) {
  CheckUnread(u, "rewrites");
  if (copies_[u].state == State::kAbsent) Violate(absl::StrCat("unit ", u, " has no chunks"));
  copies_[u].values = values;
}

}  // namespace zerod::sim
