// SPDX-License-Identifier: Apache-2.0
//
// Who waits for whom, in words: for status pages and for the message of a time limit. Only what one
// rank waits for because another has not come; what the daemons have under way is not a wait.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "daemon/core/job.h"
#include "daemon/core/sequencer.h"

namespace zerod::core {
namespace {

constexpr size_t kNamesMax = 8;

// "rank 3", "ranks 1, 2 and 5 more".
std::string Listed(const char* kind, const std::vector<uint32_t>& numbers) {
  const size_t shown = std::min(numbers.size(), kNamesMax);
  std::string text = absl::StrCat(kind, numbers.size() > 1 ? "s " : " ",
                                  absl::StrJoin(numbers.begin(), numbers.begin() + shown, ", "));
  if (numbers.size() > shown) absl::StrAppend(&text, " and ", numbers.size() - shown, " more");
  return text;
}

std::string Waiting(const std::vector<Rank>& who, const std::string& what) {
  return absl::StrCat(Listed("rank", who), who.size() > 1 ? " wait " : " waits ", what);
}

}  // namespace

std::string Job::WaitingFor() const {
  if (state_ == JobState::kForming) return WaitingForStart();
  if (state_ != JobState::kRunning) return "";
  std::vector<std::string> waits;
  for (const std::string& text : {WaitingForStep(), WaitingForScalar(), WaitingForReduce(),
                                  WaitingForRoom()}) {
    if (!text.empty()) waits.push_back(text);
  }
  return absl::StrJoin(waits, "; ");
}

std::string Job::WaitingForStart() const {
  std::vector<std::string> missing;
  if (sequencer_ != nullptr) {
    for (MemberIndex m = 0; m < spec_.members; ++m) {
      if (!sequencer_->joined(m)) missing.push_back(absl::StrCat("node ", m));
    }
    const std::vector<bool>& attached = sequencer_->attached();
    for (Rank r = 0; r < attached.size(); ++r) {
      if (!attached[r]) missing.push_back(absl::StrCat("rank ", r));
    }
    return missing.empty() ? "" : absl::StrCat(absl::StrJoin(missing, ", "), " has not come");
  }
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state != SlotState::kAttached) {
      missing.push_back(absl::StrCat("local rank ", i));
    }
  }
  return missing.empty() ? "the other nodes have not come"
                         : absl::StrCat(absl::StrJoin(missing, ", "), " has not come");
}

// The nodes of which member 0 does not have it, or where this is not member 0, all others.
std::string Job::MissingNodes(const std::function<bool(MemberIndex)>& has) const {
  if (sequencer_ == nullptr) return "the other nodes";
  std::vector<MemberIndex> missing;
  for (MemberIndex m = 0; m < spec_.members; ++m) {
    if (!has(m)) missing.push_back(m);
  }
  return missing.empty() ? "" : Listed("node", missing);
}

std::string Job::WaitingForStep() const {
  if (finishing_step_ || norm_started_) return "";
  std::vector<Rank> stepped;
  std::vector<Rank> others;
  for (const Slot& s : slots_) {
    if (s.state == SlotState::kAttached) (s.stepped ? stepped : others).push_back(s.rank);
  }
  if (stepped.empty()) return "";
  const std::string step = absl::StrCat(" to call step() for step ", committed_ + 1);
  if (!others.empty()) return Waiting(stepped, absl::StrCat("for ", Listed("rank", others), step));
  if (!step_reported_ || spec_.members == 1) return "";
  const std::string nodes = MissingNodes([&](MemberIndex m) { return sequencer_->has_step(m); });
  return nodes.empty() ? "" : Waiting(stepped, absl::StrCat("for ", nodes, step));
}

std::string Job::WaitingForScalar() const {
  for (const ScalarWait& w : scalars_) {
    std::vector<Rank> here;
    for (const Waiter& waiter : w.waiters) here.push_back(slots_[waiter.slot].rank);
    if (here.empty()) continue;
    std::vector<Rank> others;
    for (SlotIndex i = 0; i < slots_.size(); ++i) {
      if (Attached(i) && !w.values[i].has_value()) others.push_back(slots_[i].rank);
    }
    const std::string come = " to come to a barrier, an all_reduce or a restore";
    if (!others.empty()) return Waiting(here, absl::StrCat("for ", Listed("rank", others), come));
    if (!w.reported || spec_.members == 1) continue;
    const std::string nodes =
        MissingNodes([&](MemberIndex m) { return sequencer_->has_scalar(m, w.ordinal); });
    if (!nodes.empty()) return Waiting(here, absl::StrCat("for ", nodes, come));
  }
  return "";
}

// RECLAIM, and READ and PUT of a gradient.
std::string Job::WaitingForReduce() const {
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    std::vector<Rank> here;
    uint32_t round = 0;
    const auto add = [&](SlotIndex slot) {
      here.push_back(slots_[slot].rank);
      round = std::max<uint32_t>(round, slots_[slot].marks[u]);
    };
    for (const Waiter& w : units_[u].reclaims) add(w.slot);
    for (const GradientRequest& r : units_[u].gradient_requests) add(r.waiter.slot);
    if (here.empty()) continue;
    std::vector<Rank> others;
    for (const Slot& s : slots_) {
      const bool has = s.stepped || s.marks[u] >= round;
      if (s.state == SlotState::kAttached && !has) others.push_back(s.rank);
    }
    const std::string hand = absl::StrCat(" to hand over the gradients of unit '",
                                          spec_.layout->units()[u].name, "' for good");
    if (!others.empty()) return Waiting(here, absl::StrCat("for ", Listed("rank", others), hand));
    if (units_[u].reported_round < round || units_[u].reduced_round >= round) continue;
    if (spec_.members == 1 || units_[u].reducing > 0) continue;
    const std::string nodes =
        MissingNodes([&](MemberIndex m) { return sequencer_->has_gradients(m, u, round); });
    if (!nodes.empty()) return Waiting(here, absl::StrCat("for ", nodes, hand));
  }
  return "";
}

std::string Job::WaitingForRoom() const {
  std::vector<Rank> waiting;
  std::vector<bool> waited(slots_.size(), false);
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].wants_room) continue;
    bool moving = false;  // room is being made
    for (UnitIndex u = 0; u < units_.size(); ++u) {
      for (const Staged& s : units_[u].staged) {
        if (s.slot != i) continue;
        moving |= s.moving;
        for (SlotIndex j = 0; j < slots_.size() && s.aside == 0; ++j) {
          if (!Passed(j, u, s)) waited[j] = true;
        }
      }
    }
    if (!moving) waiting.push_back(slots_[i].rank);
  }
  std::vector<Rank> others;
  for (SlotIndex j = 0; j < slots_.size(); ++j) {
    if (waited[j]) others.push_back(slots_[j].rank);
  }
  if (waiting.empty()) return "";
  // Of another round than the first: until that before is reduced.
  const std::string until =
      others.empty() ? "a reduction is done"
                     : absl::StrCat("the micro-step of ", Listed("rank", others), " comes to it");
  return Waiting(waiting, absl::StrCat("for room in the gradient staging memory, until ", until,
                                       " (zerod.staging_bytes makes room, and the gradient plan "
                                       "\"per_rank\" waits for nobody)"));
}

}  // namespace zerod::core
