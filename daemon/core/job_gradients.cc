// SPDX-License-Identifier: Apache-2.0
//
// Gradients: rounds and what becomes of them, and under node_sum the order in which they reach the
// node's accumulator.
//
// node_sum. Staging is bounded, and the order of each sum is fixed: round, scalars posted before,
// micro-step, index within that, rank, for each part of a unit by itself. So a gradient may have to
// wait for another rank: until that one has handed over what comes before, or cannot any more. It
// cannot once its micro-step is over, so ranks that take different paths wait for each other's
// micro-step at most; nor once it has posted a scalar that this rank has not, so that it is not
// waited for by those that it waits for. And where a client has no room left, what waits is set
// aside, so that it goes on: a rank that others wait for (in a collective of the script's own) is
// not kept waiting itself.
#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "daemon/core/job.h"

namespace zerod::core {
namespace {

// What memory of so many bytes takes: it is mapped in pages, one at least.
uint64_t Pages(uint64_t bytes) {
  constexpr uint64_t kPage = 4096;
  return std::max<uint64_t>(1, (bytes + kPage - 1) / kPage) * kPage;
}

}  // namespace

uint64_t AsideBytesMax(const Layout& layout, uint64_t part_elements) {
  uint64_t bytes = 0;
  for (const Parameter& p : layout.parameters()) {
    if (!p.trainable) continue;
    uint64_t begin = p.offset;
    do {
      const uint64_t end = std::min((begin / part_elements + 1) * part_elements,
                                    p.offset + p.elements);
      bytes += Pages((end - begin) * sizeof(float));
      begin = end;
    } while (begin < p.offset + p.elements);
  }
  return bytes;
}

void Job::OnScatter(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step, bool last,
                    uint64_t staging_offset, const std::vector<bool>& touched, uint32_t part) {
  if (!Attached(slot)) return;
  absl::Status status = CheckUnitAndStep(unit, step);
  Slot& s = slots_[slot];
  if (status.ok() && s.stepped) {
    status = absl::FailedPreconditionError("a scatter after STEP and before its answer");
  } else if (status.ok() && (s.marks[unit] >= kRoundsMax ||
                             touched.size() != units_[unit].touched.size() ||
                             part >= s.indices[unit].size())) {
    status = absl::InvalidArgumentError(
        "too many scatters, no such part, or touched bits of another size");
  }
  if (status.ok()) status = MissingRank();
  if (!status.ok()) return Answer({slot, cookie}, status);
  s.wants_room = false;  // it has found some
  UnitState& u = units_[unit];
  for (size_t i = 0; i < touched.size(); ++i) {
    if (touched[i]) u.touched[i] = true;
  }
  const bool something = std::find(touched.begin(), touched.end(), true) != touched.end();
  if (spec_.node_sum && something) {
    Staged staged{slot, cookie, staging_offset, s.marks[unit] + 1u, s.scalars, s.micro_steps,
                  part, s.indices[unit][part]++, TouchedBytes(unit, part, touched), ++scatters_};
    // The first may be on its way to the accumulator already; it stays the first.
    const auto place = std::upper_bound(
        u.staged.begin() + (u.accumulating ? 1 : 0), u.staged.end(), staged,
        [](const Staged& a, const Staged& b) { return a.Key() < b.Key(); });
    u.staged.insert(place, staged);
    s.unmarked[unit] = true;
  } else {
    if (spec_.node_sum) ++s.indices[unit][part];
    Answer({slot, cookie}, absl::OkStatus());
  }
  if (last) {
    ++s.marks[unit];
    s.unmarked[unit] = false;
    std::fill(s.indices[unit].begin(), s.indices[unit].end(), 0);
  }
  if (spec_.node_sum) PumpStaging(unit);
  MaybeReportGradients(unit);
  Pump();
}

void Job::OnMicroStep(SlotIndex slot, Step step) {
  if (!Attached(slot) || !spec_.node_sum || !CheckUnitAndStep(0, step).ok()) return;
  Slot& s = slots_[slot];
  if (s.stepped) return;
  s.wants_room = false;
  ++s.micro_steps;
  PassOn(&s);
  Pump();
}

// --- node_sum: the order ---------------------------------------------------------------------

// It has ended a micro-step or posted a scalar: others may have waited for that.
void Job::PassOn(Slot* slot) {
  for (auto& parts : slot->indices) std::fill(parts.begin(), parts.end(), 0);
  for (UnitIndex u = 0; u < units_.size(); ++u) PumpStaging(u);
  PumpRoom();
}

// True when the slot will hand over nothing more of this part of `unit` that comes before `s`.
bool Job::Passed(SlotIndex i, UnitIndex unit, const Staged& s) const {
  const Slot& slot = slots_[i];
  if (i == s.slot || slot.stepped || slot.marks[unit] >= s.round) return true;
  const uint32_t index = i < s.slot ? s.index + 1 : s.index;
  return slot.marks[unit] + 1u == s.round &&
         std::make_tuple(slot.scalars, slot.micro_steps, slot.indices[unit][s.part]) >=
             std::make_tuple(s.scalars, s.micro_step, index);
}

// True when nothing more can come that must be added before `s`.
bool Job::Ready(UnitIndex unit, const Staged& s) const {
  // A later round goes to the accumulator only when the round before has left it.
  if (s.round > units_[unit].reduced_round + 1) return false;
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (!Passed(i, unit, s)) return false;
  }
  return true;
}

// Nothing of its part comes before `s` in the unit's queue.
bool Job::FirstOfItsPart(UnitIndex unit, const Staged& s) const {
  for (const Staged& before : units_[unit].staged) {
    if (&before == &s) return true;
    if (before.part == s.part) return false;
  }
  return true;
}

// Adds what is next of any part, if it is there: parts do not wait for each other.
void Job::PumpStaging(UnitIndex unit) {
  UnitState& u = units_[unit];
  if (u.accumulating || u.reducing != 0 || u.gradient_exchanges != 0) return;
  const auto next = std::find_if(u.staged.begin(), u.staged.end(), [&](const Staged& s) {
    return !s.moving && Ready(unit, s) && FirstOfItsPart(unit, s);
  });
  if (next == u.staged.end()) return;
  std::rotate(u.staged.begin(), next, next + 1);  // what is being added is the first
  const Staged& s = u.staged.front();
  u.accumulating = true;
  Emit(StartAccumulate{unit, s.slot, s.cookie, s.offset, /*first=*/!u.accumulated, s.aside});
  u.accumulated = true;
}

void Job::OnAccumulateDone(UnitIndex unit, SlotIndex slot) {
  if (state_ != JobState::kRunning || unit >= units_.size()) return;
  UnitState& u = units_[unit];
  if (!u.accumulating) return;
  CHECK(!u.staged.empty() && u.staged.front().slot == slot);
  u.accumulating = false;
  const Staged done = u.staged.front();
  u.staged.erase(u.staged.begin());
  if (done.aside != 0) {
    aside_bytes_ -= done.bytes;
  } else {
    slots_[slot].wants_room = false;
    Answer({slot, done.cookie}, absl::OkStatus());
  }
  PumpStaging(unit);
  PumpRoom();
  MaybeReportGradients(unit);
  MaybeReportStep();
  Advance();  // a new generation waits for the accumulators
  Pump();
}

// --- node_sum: room --------------------------------------------------------------------------

void Job::OnMakeRoom(SlotIndex slot) {
  if (!Attached(slot) || !spec_.node_sum || state_ != JobState::kRunning) return;
  slots_[slot].wants_room = true;
  PumpRoom();
  Pump();
}

uint64_t Job::TouchedBytes(UnitIndex u, uint32_t part, const std::vector<bool>& touched) const {
  const Unit& unit = spec_.layout->units()[u];
  const Range range = StagedPart(unit, spec_.staged_part_elements, part);
  uint64_t elements = 0;
  for (size_t i = 0; i < unit.parameters.size(); ++i) {
    const Parameter& p = spec_.layout->parameters()[unit.parameters[i]];
    if (touched[i]) elements += Intersect(range, {p.offset, p.offset + p.elements}).size();
  }
  return Pages(elements * sizeof(float));
}

// True when `s` waits for another rank, itself or behind one of its part that does; else it is
// added as soon as the accumulator gets to it.
bool Job::Waits(UnitIndex unit, const Staged& s) const {
  for (const Staged& before : units_[unit].staged) {
    if (before.part == s.part && !Ready(unit, before)) return true;
    if (&before == &s) break;
  }
  return false;
}

// The slot's gradient that has lain longest in its staging, null where there is none.
Job::Staged* Job::OldestInStaging(SlotIndex slot, UnitIndex* unit) {
  Staged* oldest = nullptr;
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    for (Staged& s : units_[u].staged) {
      if (s.slot != slot || (s.aside != 0 && !s.moving)) continue;
      if (oldest != nullptr && oldest->order < s.order) continue;
      oldest = &s;
      *unit = u;
    }
  }
  return oldest;
}

// How much may be set aside, in all, for a client to get room. Of ranks in the same micro-step one
// has handed over least of a unit and the others wait for it, so a gradient for each of these is
// enough, whatever their paths; one more is for rounds that wait for a reduction. A rank that is
// ahead leaves what they need to those it waits for, who may have to get on before it can; they do
// not wait for it.
uint64_t Job::AsideMax(const Slot& slot) const {
  const auto behind = std::count_if(slots_.begin(), slots_.end(), [&](const Slot& other) {
    return !other.stepped && std::tie(other.scalars, other.micro_steps) <
                                 std::tie(slot.scalars, slot.micro_steps);
  });
  const uint64_t left = behind == 0 ? 0 : static_cast<uint64_t>(behind) - 1;
  return (slots_.size() - left) * aside_of_one_;
}

// Something has changed.
void Job::PumpRoom() {
  for (Slot& s : slots_) s.room_refused = false;
  TryRoom();
}

// Sets aside what waits in the staging of clients that have no room left, oldest first and no more
// than they need: the answer lets the client look again.
void Job::TryRoom() {
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].wants_room || slots_[i].room_refused) continue;
    UnitIndex unit = 0;
    Staged* const oldest = OldestInStaging(i, &unit);
    if (oldest == nullptr || oldest->moving) {
      slots_[i].wants_room = oldest != nullptr;  // its answer comes
      continue;
    }
    const bool leaves = units_[unit].accumulating && oldest == &units_[unit].staged.front();
    if (leaves || !Waits(unit, *oldest)) continue;
    if (aside_bytes_ + oldest->bytes > AsideMax(slots_[i])) continue;
    oldest->aside = ++asides_;
    oldest->moving = true;
    aside_bytes_ += oldest->bytes;
    ++setting_aside_;
    Emit(StartSetAside{unit, i, oldest->cookie, oldest->offset, oldest->aside, oldest->bytes});
  }
}

void Job::OnSetAsideDone(UnitIndex unit, uint64_t aside, bool done) {
  if (state_ != JobState::kRunning || unit >= units_.size() || aside == 0) return;
  UnitState& u = units_[unit];
  const auto it = std::find_if(u.staged.begin(), u.staged.end(),
                               [&](const Staged& s) { return s.aside == aside; });
  if (it == u.staged.end() || !it->moving) return;
  it->moving = false;
  --setting_aside_;
  const absl::Status missing = MissingRank();
  if (!done) {
    // Asked again when something has changed. Another's may be smaller.
    aside_bytes_ -= it->bytes;
    it->aside = 0;
    slots_[it->slot].room_refused = true;
  } else if (missing.ok()) {
    slots_[it->slot].wants_room = false;
    Answer({it->slot, std::exchange(it->cookie, 0)}, absl::OkStatus());
  }
  if (!missing.ok()) ForgetStaged(&u, missing);
  PumpStaging(unit);
  if (done) {
    PumpRoom();
  } else {
    TryRoom();
  }
  Advance();  // a new generation waits for it
  Pump();
}

// The step under way cannot complete. What a worker reads at this moment stays until it is done.
void Job::ForgetStaged(UnitState* u, const absl::Status& why) {
  std::vector<Staged> kept;
  for (size_t i = 0; i < u->staged.size(); ++i) {
    const Staged& s = u->staged[i];
    if (s.moving || (i == 0 && u->accumulating)) {
      kept.push_back(s);
      continue;
    }
    Answer({s.slot, s.cookie}, why);
    if (s.aside == 0) {
      slots_[s.slot].wants_room = false;
      continue;
    }
    aside_bytes_ -= s.bytes;
    Emit(DropAside{s.aside});
  }
  u->staged = std::move(kept);
}

// --- Rounds ----------------------------------------------------------------------------------

// A round is this node's when each of its clients has marked it or sent STEP.
void Job::MaybeReportGradients(UnitIndex unit) {
  if (state_ != JobState::kRunning || step_reported_) return;
  UnitState& u = units_[unit];
  for (;;) {
    const uint32_t round = u.reported_round + 1;
    bool any = false;
    for (const Slot& s : slots_) {
      if (s.state != SlotState::kAttached) return;
      if (s.marks[unit] >= round) {
        any = true;
      } else if (!s.stepped) {
        return;
      }
    }
    if (!any) return;
    if (!u.staged.empty() && u.staged.front().round <= round) return;
    u.reported_round = round;
    Tell(GradientsReady{unit, committed_ + 1, round});
  }
}

void Job::OnReclaim(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step) {
  if (!Attached(slot)) return;
  absl::Status status = CheckUnitAndStep(unit, step);
  if (status.ok() && (slots_[slot].stepped || slots_[slot].marks[unit] == 0)) {
    status = absl::FailedPreconditionError("a reclaim of a unit that was not scattered");
  }
  if (status.ok()) status = MissingRank();
  if (!status.ok()) return Answer({slot, cookie}, status);
  units_[unit].reclaims.push_back({slot, cookie});
  CloseRounds(slot, slots_[slot].marks[unit]);
  AnswerReclaims(unit);
  Pump();
}

uint32_t Job::NextRound(SlotIndex slot, UnitIndex unit) const {
  if (!Attached(slot) || unit >= units_.size()) return 1;
  return slots_[slot].marks[unit] + 1u;
}

// The client waits until `rounds` rounds of a unit are reduced, so it adds nothing to those rounds
// of any other unit: what it scatters later belongs to the next one. Else two ranks that take
// different paths would wait for each other's mark, each in its own RECLAIM.
void Job::CloseRounds(SlotIndex slot, uint32_t rounds) {
  Slot& s = slots_[slot];
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (s.marks[u] >= rounds) continue;
    s.marks[u] = static_cast<uint8_t>(rounds);
    s.unmarked[u] = false;
    std::fill(s.indices[u].begin(), s.indices[u].end(), 0);
    if (spec_.node_sum) PumpStaging(u);
    MaybeReportGradients(u);
  }
}

void Job::AnswerReclaims(UnitIndex unit) {
  UnitState& u = units_[unit];
  std::vector<Waiter> later;
  for (const Waiter& w : std::exchange(u.reclaims, {})) {
    if (u.reducing == 0 && u.reduced_round >= slots_[w.slot].marks[unit]) {
      // One member: nothing was moved, the sum is taken again over all that lies there.
      Answer(w, absl::OkStatus(), spec_.members > 1 || spec_.node_sum ? 1 : 0);
    } else {
      later.push_back(w);
    }
  }
  u.reclaims = std::move(later);
}

}  // namespace zerod::core
