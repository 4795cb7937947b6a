// SPDX-License-Identifier: Apache-2.0
//
// What clients ask: checks, answers, and the reports that follow from them. Gradients are in
// job_gradients.cc.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "daemon/core/job.h"
#include "daemon/core/sequencer.h"

namespace zerod::core {
namespace {

constexpr size_t kScalarsMax = 64;
constexpr size_t kGroupsMax = 64;

absl::Status CheckGroups(const Layout& layout, const HyperParameters& hyper) {
  std::vector<bool> checked(hyper.groups.size(), false);
  for (const Parameter& p : layout.parameters()) {
    if (!p.trainable) continue;
    if (p.group >= hyper.groups.size()) {
      return absl::InvalidArgumentError(absl::StrCat("the parameter '", p.name, "' is in group ",
                                                     p.group, ", but STEP has ",
                                                     hyper.groups.size(), " groups"));
    }
    if (checked[p.group]) continue;
    checked[p.group] = true;
    const absl::Status status = CheckGroup(layout.optimizer(p.group), hyper.groups[p.group]);
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(status.message(), " (parameter group ", p.group, ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

bool Job::Attached(SlotIndex slot) const {
  return slot < slots_.size() && slots_[slot].state == SlotState::kAttached;
}

void Job::Answer(Waiter waiter, absl::Status status, uint64_t result) {
  if (waiter.cookie == 0 || !Attached(waiter.slot)) return;
  Complete c;
  c.slot = waiter.slot;
  c.cookie = waiter.cookie;
  c.status = std::move(status);
  c.result = result;
  Emit(std::move(c));
}

void Job::AnswerAll(std::vector<Waiter>* waiters, const absl::Status& status, uint64_t result) {
  for (const Waiter& w : std::exchange(*waiters, {})) Answer(w, status, result);
}

absl::Status Job::CheckUnitAndStep(UnitIndex unit, Step step) const {
  if (unit >= units_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("there is no unit ", unit, ", the layout has ", units_.size()));
  }
  if (state_ != JobState::kRunning) {
    return absl::FailedPreconditionError(
        "the job has not started: wait for all ranks with a barrier after attaching");
  }
  if (step != committed_ + 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("a request for step ", step, ", but the step under way is ", committed_ + 1));
  }
  return absl::OkStatus();
}

absl::Status Job::CheckRange(UnitIndex unit, uint64_t begin, uint64_t count) const {
  const uint64_t elements = spec_.layout->units()[unit].elements;
  if (begin > elements || count > elements - begin) {
    return absl::InvalidArgumentError(absl::StrCat("elements [", begin, ", +", count,
                                                   ") of unit ", unit, ", which has ", elements));
  }
  return absl::OkStatus();
}

absl::Status Job::MissingRank() const {
  for (Rank r = 0; r < left_.size(); ++r) {
    if (left_[r]) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", r, " has left the job: what needs all ranks can't complete. All "
                       "ranks must take the same number of steps and barriers"));
    }
  }
  return absl::OkStatus();
}

// --- Gathers ---------------------------------------------------------------------------------

void Job::OnGather(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step) {
  if (!Attached(slot)) return;
  absl::Status status = CheckUnitAndStep(unit, step);
  if (status.ok() && slots_[slot].stepped) {
    status = absl::FailedPreconditionError("a gather after STEP and before its answer");
  }
  if (!status.ok()) return Answer({slot, cookie}, status);
  Saw(slot, unit);
  if (window_.Valid(unit, committed_)) {
    Answer({slot, cookie}, absl::OkStatus());
  } else {
    units_[unit].waiters.push_back({slot, cookie});
    RequestCopy(unit);
  }
  Forecast();
  Pump();
}

void Job::OnRelease(SlotIndex slot, UnitIndex unit) {
  if (!Attached(slot) || unit >= units_.size() || state_ != JobState::kRunning) return;
  Saw(slot, unit);
  RetryRoom();
  Forecast();
  Pump();
}

// Makes sure that a copy of the present version is on its way to somebody who waits for it, or will
// be when its turn for room has come. `first`: it is the first of room_queue_'s, taken from it.
void Job::RequestCopy(UnitIndex unit, bool first) {
  UnitState& u = units_[unit];
  if (window_.copy(unit) == Window::Copy::kFilling) {
    if (!u.forecast) return;
    u.forecast = false;
    forecast_elements_in_flight_ -= spec_.layout->units()[unit].elements;
    return Tell(Want{unit, committed_, /*demand=*/true, /*again=*/true});
  }
  // The queue moves on with every copy that arrives, and none of those waits for a client.
  const auto queue = [&] {
    if (std::find(room_queue_.begin(), room_queue_.end(), unit) == room_queue_.end()) {
      room_queue_.push_back(unit);
    }
  };
  if (!first && !room_queue_.empty()) return queue();
  absl::Status error;
  switch (window_.Reserve(unit, /*demand=*/true, [this](UnitIndex v) { return NextUse(v); },
                          &error)) {
    case Window::Room::kReserved:
      u.forecast = false;
      Tell(Want{unit, committed_, /*demand=*/true});
      break;
    case Window::Room::kLater:
      queue();
      break;
    case Window::Room::kNone:
      AnswerAll(&u.waiters, error);
      break;
  }
}

// First in, first out: a demand that still finds no room keeps the later ones waiting, so that
// small units cannot starve a large one.
void Job::RetryRoom() {
  for (size_t tries = room_queue_.size(); tries > 0 && !room_queue_.empty(); --tries) {
    UnitIndex unit = room_queue_.front();
    room_queue_.pop_front();
    if (units_[unit].waiters.empty() || window_.copy(unit) != Window::Copy::kAbsent) continue;
    RequestCopy(unit, /*first=*/true);
    if (!room_queue_.empty() && room_queue_.back() == unit) {
      room_queue_.pop_back();
      room_queue_.push_front(unit);
      return;
    }
  }
}

void Job::PublishCopy(UnitIndex unit, Step version) {
  UnitState& u = units_[unit];
  window_.Publish(unit, version);
  if (u.forecast) {
    u.forecast = false;
    forecast_elements_in_flight_ -= spec_.layout->units()[unit].elements;
  }
  AnswerAll(&u.waiters, absl::OkStatus());
}

// --- Forecast: what the last step gathered, in its order --------------------------------------

void Job::SetForecast(const std::vector<UnitIndex>& trace) {
  forecast_.clear();
  forecast_places_.assign(units_.size(), {});
  for (UnitIndex u : trace) {
    if (u >= units_.size()) continue;
    forecast_places_[u].push_back(forecast_.size());
    forecast_.push_back(u);
  }
}

// Moves the slot's cursor to where the forecast next expects this unit.
void Job::Saw(SlotIndex slot, UnitIndex unit) {
  const std::vector<size_t>& places = forecast_places_[unit];
  auto next = std::lower_bound(places.begin(), places.end(), slots_[slot].cursor);
  if (next != places.end()) slots_[slot].cursor = *next;
}

// How far ahead the unit's next use is, for the rank of this node that needs it soonest.
uint64_t Job::NextUse(UnitIndex unit) const {
  const std::vector<size_t>& places = forecast_places_[unit];
  uint64_t soonest = UINT64_MAX - 1;
  for (const Slot& s : slots_) {
    if (s.state != SlotState::kAttached) continue;
    auto next = std::lower_bound(places.begin(), places.end(), s.cursor);
    if (next != places.end()) soonest = std::min<uint64_t>(soonest, *next - s.cursor);
  }
  return soonest;
}

// Asks ahead for what will be needed, as far as the bucket and the window have room.
void Job::Forecast() {
  if (state_ != JobState::kRunning || spec_.prefetch_elements == 0 || !room_queue_.empty()) return;
  size_t front = 0;
  for (const Slot& s : slots_) {
    if (s.state == SlotState::kAttached) front = std::max(front, s.cursor);
  }
  for (forecast_next_ = std::max(forecast_next_, front); forecast_next_ < forecast_.size();
       ++forecast_next_) {
    const UnitIndex unit = forecast_[forecast_next_];
    if (window_.resident(unit) || window_.copy(unit) == Window::Copy::kFilling ||
        window_.Valid(unit, committed_)) {
      continue;
    }
    const uint64_t elements = spec_.layout->units()[unit].elements;
    if (forecast_elements_in_flight_ != 0 &&
        forecast_elements_in_flight_ + elements > spec_.prefetch_elements) {
      return;
    }
    absl::Status error;
    if (window_.Reserve(unit, /*demand=*/false, [this](UnitIndex v) { return NextUse(v); },
                        &error) != Window::Room::kReserved) {
      return;
    }
    units_[unit].forecast = true;
    forecast_elements_in_flight_ += elements;
    Tell(Want{unit, committed_});
  }
}

// --- STEP ------------------------------------------------------------------------------------

void Job::OnStep(SlotIndex slot, uint64_t cookie, Step step, const HyperParameters& hyper,
                 const std::vector<UnitIndex>& trace) {
  if (!Attached(slot)) return;
  Slot& s = slots_[slot];
  if (step <= committed_ && !s.stepped && state_ == JobState::kRunning) {
    // A client that did not hear the answer asks again: the step is there.
    Complete c;
    c.slot = slot;
    c.cookie = cookie;
    c.step = step == committed_ ? step_result_ : StepResult{};
    return Emit(std::move(c));
  }
  absl::Status status = CheckUnitAndStep(0, step);
  if (status.ok() && s.stepped) {
    status = absl::FailedPreconditionError("a second STEP before the answer to the first");
  } else if (status.ok() && hyper.groups.size() > kGroupsMax) {
    status = absl::InvalidArgumentError("too many parameter groups");
  } else if (status.ok()) {
    status = CheckGroups(*spec_.layout, hyper);
  }
  if (status.ok() && spec_.loss_scale.has_value() &&
      hyper.loss_scale != step_result_.next_loss_scale) {
    status = absl::InvalidArgumentError(
        absl::StrCat("this step's loss is to be multiplied by ", step_result_.next_loss_scale,
                     ", STEP says ", hyper.loss_scale));
  }
  if (status.ok()) status = MissingRank();
  if (!status.ok()) return Answer({slot, cookie}, status);
  s.stepped = true;
  s.step_cookie = cookie;
  s.hyper = hyper;
  s.cursor = 0;
  if (slot == 0 && !trace.empty()) SetForecast(trace);
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (s.unmarked[u]) {  // STEP is the mark
      ++s.marks[u];
      s.unmarked[u] = false;
    }
    // They would meet the norm of the step, or its gradients half used up.
    AnswerGradientRequests(&units_[u], GradientBehindStep(), slot);
    if (spec_.node_sum) PumpStaging(u);
    MaybeReportGradients(u);
  }
  PumpRoom();
  MaybeReportStep();
  Pump();
}

void Job::MaybeReportStep() {
  if (state_ != JobState::kRunning || step_reported_) return;
  StepReady ready;
  ready.step = committed_ + 1;
  for (const Slot& s : slots_) {
    if (s.state != SlotState::kAttached || !s.stepped) return;
    ready.ranks.push_back(s.rank);
  }
  for (const UnitState& u : units_) {
    if (!u.staged.empty()) return;
  }
  ready.hyper = slots_[0].hyper;
  for (const Slot& s : slots_) {
    ready.hyper.want_norm |= s.hyper.want_norm;
    if (ready.agree && !(s.hyper.Hash() == slots_[0].hyper.Hash())) {
      ready.agree = false;
      ready.disagreement = absl::StrCat(
          "the ranks ", s.rank, " and ", slots_[0].rank,
          " disagree about the hyper-parameters of this step (learning rate, betas, eps, weight "
          "decay, clipping or loss scale). Step the scheduler on every rank alike");
    }
  }
  step_reported_ = true;
  Tell(std::move(ready));
}

// --- State in and out, scalars, leaving --------------------------------------------------------

absl::Status Job::CheckState(UnitIndex unit, uint64_t begin, uint64_t count, StateKind kind,
                             bool put) const {
  absl::Status status = CheckUnitAndStep(unit, committed_ + 1);
  if (status.ok()) status = CheckRange(unit, begin, count);
  if (status.ok() && !spec_.layout->Has(kind)) {
    status = absl::InvalidArgumentError(absl::StrCat(
        "the job's optimizer keeps ", spec_.layout->state_tensors(), " tensors of state"));
  }
  // What moments are there for padding and frozen parameters? Zeros, to read; none, to write.
  const uint64_t trainable = status.ok() ? spec_.layout->units()[unit].trainable_elements : 0;
  const bool trained = kind == StateKind::kGradient || (put && kind != StateKind::kMaster);
  if (status.ok() && trained && begin + count > trainable) {
    status = absl::InvalidArgumentError(absl::StrCat(
        kind == StateKind::kGradient ? "the gradient" : "optimizer state", " of the elements [",
        begin, ", +", count, ") of unit ", unit, ", of which only the first ", trainable,
        " are trained"));
  }
  return status;
}

void Job::OnPut(SlotIndex slot, uint64_t cookie, UnitIndex unit, uint64_t begin, uint64_t count,
                StateKind kind) {
  if (!Attached(slot)) return;
  OnPutOrRead({slot, cookie}, {/*put=*/true, slot, unit, begin, count, kind});
}

void Job::OnRead(SlotIndex slot, uint64_t cookie, UnitIndex unit, uint64_t begin, uint64_t count,
                 StateKind kind) {
  OnPutOrRead({slot, cookie}, {/*put=*/false, slot, unit, begin, count, kind});
}

void Job::OnPutOrRead(Waiter waiter, const StateRequest& request) {
  const auto& [put, slot, unit, begin, count, kind] = request;
  if (!Attached(slot)) return;
  absl::Status status = CheckState(unit, begin, count, kind, put);
  const bool gradient = kind == StateKind::kGradient;
  if (status.ok() && gradient && slots_[slot].stepped) {
    status = absl::FailedPreconditionError(
        "a gradient is read and set before STEP, which uses it up");
  } else if (status.ok() && gradient && put && slots_[slot].marks[unit] == 0) {
    status = absl::FailedPreconditionError("a gradient is set after it was handed over for good");
  }
  if (status.ok() && gradient) status = MissingRank();
  if (!status.ok()) return Answer(waiter, status);
  if (gradient) {
    // A client may be ahead of its gradient: under node_sum it waits to be added before the other
    // members hear of it, and they would read what is there without it.
    units_[unit].gradient_requests.push_back({waiter, request});
    TellGradientRequests(unit);
  } else {
    requests_.push_back(waiter);
    Tell(request);
  }
  Pump();
}

absl::Status Job::GradientBehindStep() {
  return absl::CancelledError("STEP was sent before the gradient was read or set");
}

void Job::TellGradientRequests(UnitIndex unit) {
  UnitState& u = units_[unit];
  std::vector<GradientRequest> later;
  for (const GradientRequest& r : std::exchange(u.gradient_requests, {})) {
    if (!Attached(r.waiter.slot)) continue;
    if (u.reduced_round < slots_[r.waiter.slot].marks[unit]) {
      later.push_back(r);
      continue;
    }
    requests_.push_back(r.waiter);
    Tell(r.request);
  }
  u.gradient_requests = std::move(later);
}

// Of one slot alone, or of all.
void Job::AnswerGradientRequests(UnitState* u, const absl::Status& status,
                                 std::optional<SlotIndex> slot) {
  std::vector<GradientRequest> others;
  for (const GradientRequest& r : std::exchange(u->gradient_requests, {})) {
    if (slot.value_or(r.waiter.slot) == r.waiter.slot) {
      Answer(r.waiter, status);
    } else {
      others.push_back(r);
    }
  }
  u->gradient_requests = std::move(others);
}

void Job::OnScalar(SlotIndex slot, uint64_t cookie, const ScalarValues& values) {
  if (!Attached(slot)) return;
  absl::Status status = MissingRank();
  if (status.ok() && (values.values.size() > kScalarsMax || values.op > ScalarOp::kMax)) {
    status = absl::InvalidArgumentError("too many values, or no such operation");
  }
  if (!status.ok()) return Answer({slot, cookie}, status);
  PostScalar({slot, cookie}, values);
  MaybeReportScalars();
  Pump();
}

Job::ScalarWait& Job::PostScalar(Waiter waiter, const ScalarValues& values) {
  const uint64_t ordinal = ++slots_[waiter.slot].scalars;
  auto wait = std::find_if(scalars_.begin(), scalars_.end(),
                           [&](const ScalarWait& w) { return w.ordinal == ordinal; });
  if (wait == scalars_.end()) {
    scalars_.emplace_back();
    wait = std::prev(scalars_.end());
    wait->ordinal = ordinal;
    wait->values.resize(slots_.size());
  }
  wait->values[waiter.slot] = values;
  wait->waiters.push_back(waiter);
  if (spec_.node_sum) PassOn(&slots_[waiter.slot]);
  return *wait;
}

void Job::OnReadProgress(SlotIndex slot, uint64_t cookie) {
  if (!Attached(slot)) return;
  Complete c;
  c.slot = slot;
  c.cookie = cookie;
  c.progress = progress_;
  Emit(std::move(c));
}

absl::Status Job::CheckRestore(const OptimizerProgress& progress) const {
  absl::Status status = CheckProgress(progress, spec_.layout->parameters().size(),
                                      spec_.loss_scale.has_value());
  if (status.ok() && progress.loss_scaler.has_value()) {
    status = LossScaler::CheckRestore(*spec_.loss_scale, *progress.loss_scaler);
  }
  return status;
}

void Job::OnRestore(SlotIndex slot, uint64_t cookie, const OptimizerProgress& progress) {
  if (!Attached(slot)) return;
  const Slot& s = slots_[slot];
  absl::Status status = MissingRank();
  if (status.ok()) status = CheckRestore(progress);
  // They were made with the loss scale of now.
  const bool underway =
      s.stepped || std::any_of(s.marks.begin(), s.marks.end(), [](uint8_t m) { return m != 0; }) ||
      std::find(s.unmarked.begin(), s.unmarked.end(), true) != s.unmarked.end();
  if (status.ok() && underway) {
    status = absl::FailedPreconditionError(
        "RESTORE in the midst of a step: gradients have been handed over; restore after step()");
  }
  if (!status.ok()) return Answer({slot, cookie}, status);
  ScalarValues values;
  values.restore = progress.Hash();
  ScalarWait& wait = PostScalar({slot, cookie}, values);
  if (sequencer_ != nullptr) wait.restore = progress;
  MaybeReportScalars();
  Pump();
}

// Barriers may be posted while the generation still forms; they are reported once it runs.
void Job::MaybeReportScalars() {
  if (state_ != JobState::kRunning) return;
  for (ScalarWait& w : scalars_) {
    if (w.reported) continue;
    ScalarReady ready;
    ready.ordinal = w.ordinal;
    for (SlotIndex i = 0; i < slots_.size(); ++i) {
      if (!w.values[i].has_value()) return;
      ready.ranks.push_back(slots_[i].rank);
      ready.values.push_back(*w.values[i]);
    }
    w.reported = true;
    ready.restore = w.restore;
    Tell(std::move(ready));
  }
}

void Job::OnDetach(SlotIndex slot, uint64_t cookie) {
  if (!Attached(slot)) return;
  Answer({slot, cookie}, absl::OkStatus());
  Slot& s = slots_[slot];
  s.wants_room = false;
  const bool left = state_ != JobState::kForming;
  if (left) {
    s.state = SlotState::kLeft;
    Tell(ClientGone{s.rank, left, "it detached"});
  } else {
    // Like one that never came, and it may come again.
    s.state = SlotState::kDead;
    ForgetScalars(slot);
    Tell(ClientGone{s.rank, left, "it detached before all ranks had come"});
  }
  Pump();
}

}  // namespace zerod::core
