// SPDX-License-Identifier: Apache-2.0
//
// Carrying out the log. Entries start in order; one that must wait for this member's own work (an
// optimizer pass, a transfer) keeps the later ones waiting. None waits for a client.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "daemon/core/job.h"
#include "daemon/core/sequencer.h"

namespace zerod::core {

// False where the entry speaks of what is not there.
bool Job::Names(const Entry& e) const {
  if (e.kind < EntryKind::kStart || e.kind > kEntryKindLast || e.unit >= units_.size() ||
      e.rank >= spec_.world || e.origin >= spec_.members ||
      !CheckRange(e.unit, e.begin, e.count).ok() ||
      !spec_.layout->Has(e.state_kind)) {
    return false;
  }
  if (e.kind == EntryKind::kCommit) {
    return e.decision.touched.size() == progress_.parameter_steps.size();
  }
  if (e.kind == EntryKind::kTensorNorms) {
    return measured_plan_ != nullptr && measuring_ == 0 && e.step == committed_ &&
           e.squares.size() == progress_.parameter_steps.size();
  }
  return e.kind != EntryKind::kRestore || CheckRestore(e.restore).ok();
}

absl::Status Job::AppendEntries(const std::vector<Entry>& entries) {
  for (const Entry& e : entries) {
    if (e.seq != next_seq_ || !Names(e)) {
      return absl::InternalError(absl::StrCat("the log has entry ", e.seq, " where ", next_seq_,
                                              " is next, or names what is not there"));
    }
    ++next_seq_;
    log_.push_back(e);
  }
  Advance();
  return absl::OkStatus();
}

void Job::Advance() {
  while (!log_.empty() && CanStart(log_.front())) {
    Entry e = std::move(log_.front());
    log_.pop_front();
    Start(e);
  }
}

// True unless `e` is about a gradient that is being written.
bool Job::GradientFree(const Entry& e) const {
  const UnitState& u = units_[e.unit];
  return e.state_kind != StateKind::kGradient || (u.reducing == 0 && !u.accumulating);
}

bool Job::CanStart(const Entry& e) const {
  const UnitState& u = units_[e.unit];
  switch (e.kind) {
    case EntryKind::kStart:
      return true;
    case EntryKind::kScalar:
    case EntryKind::kRestore:
      // Behind a barrier everyone reads what was PUT before it, resident units without asking.
      return std::none_of(running_.begin(), running_.end(),
                          [](const auto& r) { return r.second.kind == EntryKind::kPut; });
    case EntryKind::kAllGather:
      return connected_ && !u.writing && !u.applying && u.applied >= e.step;
    case EntryKind::kRead:
      if (!GradientFree(e)) return false;
      return connected_ && !u.writing && !u.applying && u.applied == committed_;
    case EntryKind::kPut:
      if (!GradientFree(e)) return false;
      return connected_ && u.exchanges == 0 && !u.applying && u.applied == committed_;
    case EntryKind::kReduceScatter:
      return connected_ && u.reducing == 0 && !u.accumulating && !finishing_step_ &&
             u.gradient_exchanges == 0;
    case EntryKind::kNorm:
      return running_.empty();
    case EntryKind::kCommit:
      // What is being sent must not be rewritten under the sender.
      return running_.empty() && !norm_running_;
    case EntryKind::kTensorNorms:
      return true;  // it comes when every member has measured, and nothing comes before it
    case EntryKind::kLeave:
      return !finishing_step_;
    case EntryKind::kGeneration:
      return running_.empty() && !norm_running_ && applying_ == 0 && !finishing_step_ &&
             setting_aside_ == 0 &&
             std::none_of(units_.begin(), units_.end(),
                          [](const UnitState& s) { return s.accumulating; });
  }
  return true;
}

void Job::Start(const Entry& e) {
  switch (e.kind) {
    case EntryKind::kStart: return StartFirst(e);
    case EntryKind::kAllGather: return StartGather(e);
    case EntryKind::kReduceScatter: return StartReduceScatter(e);
    case EntryKind::kNorm:
      norm_running_ = norm_started_ = true;
      return Emit(ComputeNorm{e.step, e.norm_needed});
    case EntryKind::kCommit: return StartCommit(e);
    case EntryKind::kTensorNorms: return StartTensorNorms(e);
    case EntryKind::kScalar: return StartScalar(e);
    case EntryKind::kRestore: return StartRestore(e);
    case EntryKind::kLeave: return StartLeave(e);
    case EntryKind::kGeneration: return StartGeneration(e);
    case EntryKind::kPut:
    case EntryKind::kRead: return StartPutOrRead(e);
  }
}

void Job::StartPutOrRead(const Entry& e) {
  UnitState& u = units_[e.unit];
  running_.emplace(e.seq, e);
  ++u.exchanges;
  if (e.origin == spec_.self && !requests_.empty()) {
    exchange_waiters_.emplace(e.seq, requests_.front());
    requests_.pop_front();
  }
  if (e.state_kind == StateKind::kGradient) ++u.gradient_exchanges;
  if (e.kind == EntryKind::kRead) {
    return Emit(StartRead{e.seq, e.unit, e.origin, e.slot, e.begin, e.count, e.state_kind});
  }
  u.writing = true;
  if (e.state_kind != StateKind::kMaster) {
    // The weights' copies stay as they are.
  } else if (window_.resident(e.unit)) {
    window_.Retract(e.unit, /*refill=*/true);
  } else if (window_.copy(e.unit) == Window::Copy::kValid) {
    window_.Retract(e.unit, /*refill=*/false);
  }
  Emit(StartPut{e.seq, e.unit, e.origin, e.slot, e.begin, e.count, e.state_kind});
}

void Job::StartFirst(const Entry&) {
  state_ = JobState::kRunning;
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    // The first time: zeros, until rank 0 has PUT the weights.
    if (window_.resident(u) && !window_.Valid(u, committed_)) PublishCopy(u, committed_);
  }
  if (!connect_asked_) {
    connect_asked_ = true;
    Emit(Connect{generation_});
  }
  MaybeReportScalars();
  Forecast();
  Tell(Forecasted{committed_});
}

void Job::StartGather(const Entry& e) {
  running_.emplace(e.seq, e);
  ++units_[e.unit].exchanges;
  const bool receive = ((e.wants >> spec_.self) & 1) != 0 && e.step == committed_ &&
                       window_.copy(e.unit) == Window::Copy::kFilling;
  if (receive) receiving_.insert(e.seq);
  Emit(StartAllGather{e.seq, e.unit, e.wants, receive});
}

void Job::StartReduceScatter(const Entry& e) {
  running_.emplace(e.seq, e);
  ++units_[e.unit].reducing;
  Emit(StartReduce{e.seq, e.unit, e.step, e.round});
}

void Job::OnEntryDone(uint64_t seq, const absl::Status& status) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded) return;
  auto it = running_.find(seq);
  if (it == running_.end()) return;
  if (!status.ok()) {
    return Fail(absl::FailedPreconditionError(absl::StrCat(
        "a transfer between the members of the job failed: ", status.message(),
        ". Its state is lost; the last committed step was ", committed_, ". Start the job anew "
        "under another job id, or after 'zerodctl jobs delete ", spec_.id, "' on each node")));
  }
  const Entry e = std::move(it->second);
  running_.erase(it);
  FinishEntry(e);
  Advance();
  MaybeFinishStep();
  Pump();
}

void Job::FinishEntry(const Entry& e) {
  UnitState& u = units_[e.unit];
  if (e.kind == EntryKind::kReduceScatter) {
    --u.reducing;
    u.reduced_round = e.round;
    if (spec_.members > 1) u.accumulated = false;
    AnswerReclaims(e.unit);
    TellGradientRequests(e.unit);
    if (spec_.node_sum) PumpStaging(e.unit);
    return;
  }
  --u.exchanges;
  if (e.kind == EntryKind::kAllGather) {
    if (receiving_.erase(e.seq) != 0) PublishCopy(e.unit, e.step);
    RetryRoom();
    Forecast();
    if (sequencer_ != nullptr) {
      std::vector<Entry> next;
      sequencer_->OnGathered(e.unit, &next);
      absl::Status status = Distribute(next);
      if (!status.ok()) Fail(status);
    }
    return;
  }
  if (e.state_kind == StateKind::kGradient) {
    --u.gradient_exchanges;
    if (spec_.node_sum) PumpStaging(e.unit);
  }
  if (e.kind == EntryKind::kPut) {
    u.writing = false;
    if (e.state_kind == StateKind::kMaster && window_.resident(e.unit)) {
      PublishCopy(e.unit, committed_);
    }
  }
  auto waiter = exchange_waiters_.find(e.seq);
  if (waiter == exchange_waiters_.end()) return;
  Answer(waiter->second, absl::OkStatus());
  exchange_waiters_.erase(waiter);
}

void Job::OnNormDone(Step step, NormPart part) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded || !norm_running_) return;
  norm_running_ = false;
  part.touched.assign(progress_.parameter_steps.size(), false);
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    const std::vector<uint32_t>& parameters = spec_.layout->units()[u].parameters;
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (units_[u].touched[i] && spec_.layout->parameters()[parameters[i]].trainable) {
        part.touched[parameters[i]] = true;
      }
    }
  }
  Tell(NormReady{step, std::move(part)});
  Advance();
  Pump();
}

// --- The step --------------------------------------------------------------------------------

void Job::StartCommit(const Entry& e) {
  const Decision& d = e.decision;
  if (spec_.loss_scale.has_value()) progress_.loss_scaler = d.loss_scaler;
  if (d.kind == Decision::Kind::kRefuse) {
    for (SlotIndex i = 0; i < slots_.size(); ++i) {
      if (slots_[i].stepped) {
        Answer({i, slots_[i].step_cookie}, absl::FailedPreconditionError(d.reason));
      }
    }
    Emit(DropGradients{});
    return ResetStep();
  }
  // A client that sent STEP without waiting for its gathers gets none of them.
  for (UnitState& u : units_) {
    AnswerAll(&u.waiters, absl::CancelledError("STEP was sent before the gather was answered"));
  }
  committed_ = e.step;
  step_result_ = {d.grad_norm, d.kind == Decision::Kind::kSkip, d.next_loss_scale};
  if (d.kind == Decision::Kind::kApply) ++applied_;
  finishing_step_ = true;
  Emit(CommitBlobs{e.step});
  ApplyCommitted(e);
  room_queue_.clear();
  forecast_next_ = 0;
  for (Slot& s : slots_) s.cursor = 0;
  Forecast();
  Tell(Forecasted{committed_});
  MaybeFinishStep();
}

// Starts the optimizer on every unit that has a gradient; the others are of the new version as
// they are, and so are their copies.
void Job::ApplyCommitted(const Entry& e) {
  auto plan = std::make_shared<ApplyPlan>();
  plan->step = e.step;
  plan->decision = e.decision;
  std::vector<bool> touched(units_.size(), false);
  std::vector<uint64_t>& steps = progress_.parameter_steps;
  const size_t parameters = e.decision.kind == Decision::Kind::kApply ? steps.size() : 0;
  for (size_t p = 0; p < parameters; ++p) {
    if (!e.decision.touched[p]) continue;
    ++steps[p];
    const Parameter& parameter = spec_.layout->parameters()[p];
    touched[parameter.unit] = true;
    if (!ByTensor(spec_.layout->optimizer(parameter.group))) continue;
    units_[parameter.unit].by_tensor = true;
    measured_plan_ = plan;
  }
  plan->parameter_steps = steps;
  for (UnitIndex i = 0; i < units_.size(); ++i) {
    UnitState& u = units_[i];
    u.forecast = false;
    if (touched[i]) {
      window_.Retract(i, /*refill=*/window_.resident(i));
      u.applying = true;
      ++applying_;
      if (u.by_tensor) {
        ++measuring_;
        Emit(StartMeasure{i, plan});
        continue;
      }
      Emit(StartApply{i, plan});
      continue;
    }
    u.applied = e.step;
    if (window_.Valid(i, e.step - 1)) {
      window_.Publish(i, e.step);
    } else if (!window_.resident(i)) {
      window_.Retract(i, /*refill=*/false);
    }
  }
  forecast_elements_in_flight_ = 0;
}

void Job::OnMeasured(UnitIndex unit, Step step, std::vector<TensorSquares> squares) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded || unit >= units_.size()) return;
  CHECK(units_[unit].by_tensor);
  CHECK_EQ(step, committed_);
  units_[unit].squares = std::move(squares);
  if (--measuring_ != 0) return;
  TensorsMeasured measured;
  measured.step = step;
  for (UnitState& u : units_) {
    measured.squares.insert(measured.squares.end(), u.squares.begin(), u.squares.end());
    u.squares.clear();
  }
  Tell(std::move(measured));
  Advance();
  Pump();
}

// The second pass. The first one's plan, and what it had to know of whole tensors.
void Job::StartTensorNorms(const Entry& e) {
  if (measured_plan_ == nullptr) return;
  auto plan = std::make_shared<ApplyPlan>(*std::exchange(measured_plan_, nullptr));
  plan->squares = e.squares;
  for (UnitIndex i = 0; i < units_.size(); ++i) {
    if (!std::exchange(units_[i].by_tensor, false)) continue;
    Emit(StartApply{i, plan});
  }
}

void Job::OnApplyDone(UnitIndex unit, Step step) {
  if (state_ == JobState::kFailed || state_ == JobState::kEnded || unit >= units_.size()) return;
  UnitState& u = units_[unit];
  CHECK(u.applying);
  CHECK_EQ(step, committed_);
  u.applying = false;
  --applying_;
  u.applied = step;
  if (ValidAfterApply(unit)) PublishCopy(unit, step);
  Advance();
  MaybeFinishStep();
  Pump();
}

// step() returns when what this node keeps resident is valid for the next one.
void Job::MaybeFinishStep() {
  if (!finishing_step_ || applying_ != 0) return;
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (window_.resident(u) && !window_.Valid(u, committed_)) return;
  }
  finishing_step_ = false;
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].stepped || !Attached(i)) continue;
    Complete c;
    c.slot = i;
    c.cookie = slots_[i].step_cookie;
    c.step = step_result_;
    Emit(std::move(c));
  }
  ResetStep();
  Advance();
}

void Job::ResetStep() {
  for (Slot& s : slots_) {
    s.stepped = false;
    std::fill(s.marks.begin(), s.marks.end(), 0);
    std::fill(s.unmarked.begin(), s.unmarked.end(), false);
    for (auto& parts : s.indices) std::fill(parts.begin(), parts.end(), 0);
    s.micro_steps = 0;
    s.wants_room = false;
  }
  norm_started_ = false;
  aside_bytes_ = 0;
  for (UnitIndex i = 0; i < units_.size(); ++i) {
    UnitState& u = units_[i];
    u.reduced_round = u.reported_round = 0;
    u.accumulated = false;
    u.staged.clear();
    AnswerAll(&u.reclaims, absl::CancelledError("STEP was sent before the reclaim was answered"));
    AnswerGradientRequests(&u, GradientBehindStep());
    u.touched.assign(spec_.layout->units()[i].parameters.size(), false);
  }
  step_reported_ = false;
}

// --- Scalars and membership --------------------------------------------------------------------

void Job::StartScalar(const Entry& e) {
  auto wait = std::find_if(scalars_.begin(), scalars_.end(),
                           [&](const ScalarWait& w) { return w.ordinal == e.ordinal; });
  if (wait == scalars_.end()) return;
  for (const Waiter& w : wait->waiters) {
    if (!Attached(w.slot)) continue;
    Complete c;
    c.slot = w.slot;
    c.cookie = w.cookie;
    if (!e.reason.empty()) {
      c.status = absl::InvalidArgumentError(e.reason);
    } else {
      c.scalar = e.scalar;
    }
    Emit(std::move(c));
  }
  scalars_.erase(wait);
}

// All members do it at the same place of the log, so that they agree, whatever follows.
void Job::StartRestore(const Entry& e) {
  progress_.parameter_steps = e.restore.parameter_steps;
  if (e.restore.loss_scaler.has_value()) {
    progress_.loss_scaler = e.restore.loss_scaler;
    step_result_.next_loss_scale = e.restore.loss_scaler->scale;
  }
  auto wait = std::find_if(scalars_.begin(), scalars_.end(),
                           [&](const ScalarWait& w) { return w.ordinal == e.ordinal; });
  if (wait == scalars_.end()) return;
  for (const Waiter& w : wait->waiters) {
    if (!Attached(w.slot)) continue;
    Complete c;
    c.slot = w.slot;
    c.cookie = w.cookie;
    c.loss_scale = step_result_.next_loss_scale;
    Emit(std::move(c));
  }
  scalars_.erase(wait);
}

void Job::StartLeave(const Entry& e) {
  left_[e.rank] = true;
  if (std::all_of(left_.begin(), left_.end(), [](bool l) { return l; })) {
    return EndWith(absl::OkStatus());
  }
  const absl::Status missing = MissingRank();
  for (ScalarWait& w : scalars_) AnswerAll(&w.waiters, missing);
  // The step under way cannot complete: what waits for another rank's part of it never ends.
  for (UnitState& u : units_) {
    AnswerAll(&u.reclaims, missing);
    AnswerGradientRequests(&u, missing);
    ForgetStaged(&u, missing);
  }
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].stepped) continue;
    Answer({i, slots_[i].step_cookie}, missing);
    slots_[i].stepped = false;
  }
}

// A client died. Everything before this entry is finished, so all members stand at the same step;
// what was gathered for the next one is dropped, and the clients attach anew.
void Job::StartGeneration(const Entry& e) {
  const absl::Status aborted = absl::AbortedError(absl::StrCat(
      "rank ", e.rank, " of job '", spec_.id, "' is gone (", e.reason, "): generation ",
      generation_, " is over. Nothing is lost: the state is that of step ", committed_,
      ", restart the ranks and they resume there"));
  generation_ = e.generation + 1;
  state_ = JobState::kForming;
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state != SlotState::kAttached) continue;
    Emit(FailSlot{i, aborted});
    slots_[i].state = SlotState::kZombie;
  }
  for (SlotIndex i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state == SlotState::kLeft) slots_[i].state = SlotState::kDead;
  }
  std::fill(left_.begin(), left_.end(), false);
  Emit(DropGradients{});
  ResetStep();
  scalars_.clear();
  requests_.clear();
  room_queue_.clear();
  outbox_.clear();  // of the old generation
  forecast_elements_in_flight_ = 0;
  forecast_next_ = 0;
  for (UnitIndex i = 0; i < units_.size(); ++i) {
    units_[i].waiters.clear();
    units_[i].forecast = false;
    if (!window_.resident(i) && window_.copy(i) == Window::Copy::kFilling) {
      window_.Retract(i, /*refill=*/false);
    }
  }
}

}  // namespace zerod::core
