// SPDX-License-Identifier: Apache-2.0
//
// Life of the job: members, attachments, failure, and the pump that carries reports to the
// sequencer and entries back. Requests are in job_clients.cc and job_gradients.cc, the log in
// job_log.cc.
#include "daemon/core/job.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "daemon/core/sequencer.h"

namespace zerod::core {

Job::Job(JobSpec spec, WindowPort* window)
    : spec_(std::move(spec)), window_(spec_.window, spec_.layout.get(), window) {
  const size_t units = spec_.layout->units().size();
  CHECK(spec_.members >= 1 && spec_.members <= kMembersMax && spec_.self < spec_.members);
  slots_.resize(spec_.local_world);
  units_.resize(units);
  if (spec_.node_sum) aside_of_one_ = AsideBytesMax(*spec_.layout, spec_.staged_part_elements);
  progress_.parameter_steps.resize(spec_.layout->parameters().size(), 0);
  left_.resize(spec_.world, false);
  if (spec_.loss_scale.has_value()) {
    progress_.loss_scaler = LossScaler(*spec_.loss_scale).state();
    step_result_.next_loss_scale = progress_.loss_scaler->scale;
  }
  sent_seq_.resize(spec_.members, 0);
  if (spec_.self == 0) {
    std::vector<bool> gather_after_commit(units);
    for (UnitIndex u = 0; u < units; ++u) {
      gather_after_commit[u] = spec_.window.resident[u] && !ValidAfterApply(u);
    }
    sequencer_ = std::make_unique<Sequencer>(&spec_, std::move(gather_after_commit));
  }
  // Before there is a trace, units are expected in the order in which the model lists them.
  std::vector<UnitIndex> order(units);
  std::iota(order.begin(), order.end(), 0);
  SetForecast(order);
  ResetStep();
  Tell(Joined{spec_.layout->hash(), spec_.config_hash, spec_.world, spec_.members});
  Pump();
}

Job::~Job() = default;

bool Job::ValidAfterApply(UnitIndex u) const {
  return spec_.window.resident[u] && (spec_.members == 1 || spec_.stage == 0);
}

absl::Status Job::OnAttach(SlotIndex slot, Rank rank) {
  if (state_ == JobState::kFailed) return failure_;
  if (state_ == JobState::kEnded) {
    return absl::UnavailableError("the job of this name is just ending: ask again");
  }
  if (slot >= slots_.size() || rank >= spec_.world) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rank ", rank, " of ", spec_.world, ", local rank ", slot, " of ", spec_.local_world,
        ": outside the job's world. Check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"));
  }
  Slot& s = slots_[slot];
  if (s.state == SlotState::kAttached || s.state == SlotState::kZombie) {
    return absl::AlreadyExistsError(
        absl::StrCat("a living process is attached as local rank ", slot, " of job '", spec_.id,
                     "'"));
  }
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (i != slot && slots_[i].state == SlotState::kAttached && slots_[i].rank == rank) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", rank, " is attached already as local rank ", i));
    }
  }
  if (state_ == JobState::kRunning || s.state == SlotState::kLeft || left_[rank]) {
    return absl::UnavailableError(
        "the job's present generation is still ending: ask again in a moment");
  }
  s = Slot{};
  s.state = SlotState::kAttached;
  s.rank = rank;
  s.marks.assign(units_.size(), 0);
  s.unmarked.assign(units_.size(), false);
  s.indices.clear();
  for (const Unit& unit : spec_.layout->units()) {
    s.indices.emplace_back(StagedParts(unit, spec_.staged_part_elements));
  }
  Tell(ClientAttached{rank});
  Pump();
  return absl::OkStatus();
}

void Job::OnClientGone(SlotIndex slot, const std::string& reason) {
  if (slot >= slots_.size()) return;
  Slot& s = slots_[slot];
  s.wants_room = false;
  if (s.state == SlotState::kAttached) {
    s.state = SlotState::kDead;
    ForgetScalars(slot);
    if (state_ == JobState::kForming || state_ == JobState::kRunning) {
      Tell(ClientGone{s.rank, /*left=*/false, reason});
    }
  } else if (s.state == SlotState::kZombie) {
    s.state = SlotState::kDead;
  }
  Pump();
}

// Its successor may join the same generation.
void Job::ForgetScalars(SlotIndex slot) {
  for (ScalarWait& w : scalars_) {
    w.values[slot].reset();
    std::erase_if(w.waiters, [slot](const Waiter& waiter) { return waiter.slot == slot; });
  }
}

// --- Members ---------------------------------------------------------------------------------

void Job::Tell(ReportItem item) { outbox_.push_back(std::move(item)); }

void Job::OnMessage(MemberIndex from, const Message& message) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded) return;
  if (const auto* report = std::get_if<Report>(&message)) {
    if (sequencer_ == nullptr || from == 0 || from >= spec_.members) {
      return Fail(absl::InternalError(absl::StrCat("an unexpected report from member ", from)));
    }
    absl::Status status = Sequence(from, *report);
    if (!status.ok()) return Fail(status, sequencer_->discarded());
  } else if (from != 0) {
    return Fail(absl::InternalError(absl::StrCat("member ", from, " is not the sequencer")));
  } else if (const auto* append = std::get_if<Append>(&message)) {
    absl::Status status = AppendEntries(append->entries);
    if (!status.ok()) return Fail(status);
  } else {
    // It told the others itself.
    outbox_.clear();
    discarded_ = std::get<FailJob>(message).discard;
    return EndWith(std::get<FailJob>(message).status);
  }
  Pump();
}

void Job::OnMemberDown(MemberIndex member, const absl::Status& why) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded || member == spec_.self) return;
  // Every member of the job holds shards that nobody else has.
  Fail(absl::FailedPreconditionError(absl::StrCat(
      "lost the shards of member ", member, " (node ", member, "): ", why.message(),
      "; the last committed step was ", committed_, ". There is no snapshot to load. Start the job "
      "anew under another job id, or after 'zerodctl jobs delete ", spec_.id, "' on each node")));
}

void Job::OnConnected(const absl::Status& status) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded) return;
  if (!status.ok()) return Fail(status);
  connected_ = true;
  Advance();
  Pump();
}

void Job::OnFail(const absl::Status& status, bool discard) { Fail(status, discard); }

// Ends the job here and tells the others.
void Job::Fail(const absl::Status& status, bool discard) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded) return;
  // Where every client has left, nobody comes back: the others were only quicker to end.
  discarded_ = discard || std::all_of(slots_.begin(), slots_.end(), [](const Slot& s) {
                 return s.state == SlotState::kLeft;
               });
  if (spec_.self == 0) {
    for (MemberIndex m = 1; m < spec_.members; ++m) Emit(Send{m, FailJob{status, discarded_}});
  } else {
    Emit(Send{0, Report{generation_, {Failed{status, discarded_}}}});
  }
  EndWith(status);
}

void Job::EndWith(const absl::Status& status) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded) return;
  state_ = status.ok() ? JobState::kEnded : JobState::kFailed;
  failure_ = status;
  if (!status.ok()) {
    for (SlotIndex i = 0; i < slots_.size(); ++i) {
      if (slots_[i].state == SlotState::kAttached) Emit(FailSlot{i, status});
    }
  }
  outbox_.clear();
  log_.clear();
  Emit(End{status});
}

// Member 0: lets the sequencer see a report.
absl::Status Job::Sequence(MemberIndex from, const Report& report) {
  std::vector<Entry> entries;
  absl::Status refused;
  absl::Status status = sequencer_->OnReport(from, report, &entries, &refused);
  if (!refused.ok()) {
    CHECK_NE(from, spec_.self) << refused.ToString();
    Emit(Send{from, FailJob{refused}});
  }
  if (!status.ok()) return status;
  return Distribute(entries);
}

// Sends every member the entries that it has not got yet (one that joins late gets those from
// before).
absl::Status Job::Distribute(const std::vector<Entry>& entries) {
  unsent_.insert(unsent_.end(), entries.begin(), entries.end());
  bool all_joined = true;
  const uint64_t first_seq = unsent_.empty() ? 0 : unsent_.front().seq;
  for (MemberIndex m = 1; m < spec_.members; ++m) {
    if (!sequencer_->joined(m)) {
      all_joined = false;
      continue;
    }
    if (unsent_.empty() || sent_seq_[m] >= unsent_.back().seq) continue;
    const size_t skip = sent_seq_[m] >= first_seq ? sent_seq_[m] - first_seq + 1 : 0;
    Emit(Send{m, Append{std::vector<Entry>(unsent_.begin() + skip, unsent_.end())}});
    sent_seq_[m] = unsent_.back().seq;
  }
  if (all_joined) unsent_.clear();
  return AppendEntries(entries);
}

// Reports go out in batches: one per event, whatever happened in it.
void Job::Pump() {
  if (pumping_) return;
  pumping_ = true;
  while (!outbox_.empty() && state_ != JobState::kFailed && state_ != JobState::kEnded) {
    Report report{generation_, std::move(outbox_)};
    outbox_.clear();
    if (sequencer_ == nullptr) {
      Emit(Send{0, std::move(report)});
      break;
    }
    absl::Status status = Sequence(0, report);
    if (!status.ok()) Fail(status);
  }
  pumping_ = false;
}

std::vector<Action> Job::TakeActions() { return std::exchange(actions_, {}); }

}  // namespace zerod::core
