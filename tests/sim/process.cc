// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/process.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/sim/member.h"
#include "tests/sim/world.h"

namespace zerod::sim {

Process::Process(World* world, Rank rank, uint64_t incarnation)
    : world_(world), s_(world->scenario()), rank_(rank), member_(rank / s_.spec.local_world),
      slot_(rank % s_.spec.local_world), incarnation_(incarnation) {
  const size_t units = s_.cells.size();
  holds_.assign(units, Hold::kNone);
  hold_words_.assign(units, 0);
  rounds_.assign(units, 0);
  landings_.resize(units);
  for (UnitIndex u = 0; u < units; ++u) {
    indices_.emplace_back(s_.Parts(u));
    UnitGradients& g = gradients_.emplace_back();
    g.file.resize(s_.fragments[u].size());
    g.touched.assign(g.file.size(), false);
  }
  for (const std::vector<Cell>& cells : s_.cells) transfer_.emplace_back(cells.size(), 0);
}

// --- Life ----------------------------------------------------------------------------------------

void Process::TryAttach() {
  if (!alive_ || exiting_) return;
  Member& m = world_->member(member_);
  auto again = [self = shared_from_this()] { self->TryAttach(); };
  if (!m.alive()) return Exit(false);
  if (!m.begun()) return world_->After(world_->Delay(20), again);
  if (m.job().state() == core::JobState::kEnded) {
    done_ = true;
    return Exit(true);
  }
  const absl::Status status = m.job().OnAttach(slot_, rank_);
  if (absl::IsUnavailable(status) || absl::IsAlreadyExists(status)) {
    // A client of the generation before may stand still for long.
    attach_pause_ = std::min<uint64_t>(attach_pause_ * 2, 500);
    world_->After(world_->Delay(attach_pause_), again);
    return m.Drain();
  }
  if (!status.ok()) {
    if (!world_->job_lost()) Violate(absl::StrCat("rank ", rank_, ": ", status.ToString()));
    return Exit(false);
  }
  world_->Trace("rank ", rank_, " attached, generation ", m.job().generation(), ", step ",
                m.job().committed() + 1);
  attached_ = true;
  generation_ = m.job().generation();
  step_ = m.job().committed() + 1;
  loss_scale_ = m.job().last_step().next_loss_scale;
  m.slots()[slot_] = shared_from_this();
  m.Drain();
  world_->Happens(Moment::kAttach);
  // Not for ever: who detaches while its member has not heard of the start ends the generation.
  const bool may = s_.hesitates && incarnation_ <= 2 * s_.world();
  if (may && !std::exchange(hesitated_, true) && world_->Delay(100) > 50) {
    return world_->After(world_->Delay(40), [self = shared_from_this()] { self->Hesitate(); });
  }
  Begin();
}

// Gives its place up again, unless the others have come meanwhile.
void Process::Hesitate() {
  if (!alive_ || exiting_) return;
  if (failed_) return Exit(false);
  Member& m = world_->member(member_);
  const core::Job& job = m.job();
  if (job.state() != core::JobState::kForming || job.generation() != generation_) return Begin();
  world_->Trace("rank ", rank_, " detaches before the start");
  attached_ = false;
  generation_ = 0;
  m.slots()[slot_] = nullptr;
  m.job().OnDetach(slot_, 0);
  m.Drain();
  world_->After(world_->Delay(40), [self = shared_from_this()] { self->TryAttach(); });
}

void Process::Begin() {
  BeginStep();
  const bool puts = program_[0].kind == OpKind::kQuiet;
  program_.insert(program_.begin(), {Op{OpKind::kQuiet}, Op{OpKind::kScalar}});
  if (!puts) program_.insert(program_.begin() + 2, Op{OpKind::kReading});
  reading_ = false;
  Continue();
}

void Process::Die(const std::string& why) {
  if (!alive_ || done_) return;
  world_->Trace("rank ", rank_, " dies: ", why);
  alive_ = false;
  if (attached_) {
    world_->After(world_->Delay(20), [self = shared_from_this(), why] { self->Reap(why); });
  }
  world_->OnExit(this, false);
}

void Process::Exit(bool ok) {
  if (exiting_ || !alive_) return;
  exiting_ = true;
  world_->After(world_->Delay(ok ? 5 : 60), [self = shared_from_this(), ok] {
    if (!self->alive_) return;
    if (!ok) return self->Die("it failed");
    self->world_->Trace("rank ", self->rank_, " ends");
    self->alive_ = false;
    if (self->attached_) self->Reap("it ended");
    self->world_->OnExit(self.get(), true);
  });
}

// The daemon learns by the pidfd.
void Process::Reap(const std::string& why) {
  reaped_ = true;
  std::fill(hold_words_.begin(), hold_words_.end(), 0);
  Member& m = world_->member(member_);
  if (!m.alive() || m.slots()[slot_].get() != this) return;
  m.job().OnClientGone(slot_, why);
  m.Drain();
}

void Process::LoseDaemon() {
  lost_daemon_ = true;
  if (!alive_ || done_) return;
  failed_ = true;
  if (waiting_ || !attached_) {
    waiting_ = false;
    Exit(false);
  }
}

void Process::DeliverFailure(const absl::Status& status) {
  answers_free_ = std::max(answers_free_, world_->now() + world_->Delay(s_.ring_delay_max));
  world_->After(answers_free_ - world_->now(), [self = shared_from_this(), status] {
    if (!self->alive_ || self->failed_) return;
    self->failed_ = true;
    if (!self->waiting_) return;
    self->waiting_ = false;
    self->Exit(false);
  });
}

void Process::CollectiveDone(bool ok) {
  in_collective_ = false;
  if (!alive_ || exiting_) return;
  if (!ok) return Exit(false);
  Continue();
}

std::string Process::Waiting() const {
  std::string text = absl::StrCat("rank ", rank_, " generation ", generation_, " step ", step_,
                                  alive_ ? "" : " dead", attached_ ? "" : " not attached",
                                  in_collective_ ? " in a collective of its own" : "",
                                  waiting_ ? " waits" : "", blocked_ ? " for staging" : "");
  for (const auto& [cookie, request] : outstanding_) {
    absl::StrAppend(&text, " for op ", static_cast<int>(request.kind), " unit ", request.unit);
  }
  return text;
}

bool Process::WaitsForDaemonAlone() const {
  if (!alive_ || !waiting_ || failed_) return false;
  return std::any_of(outstanding_.begin(), outstanding_.end(), [](const auto& r) {
    return r.second.kind == OpKind::kGather || r.second.kind == OpKind::kPut ||
           r.second.kind == OpKind::kRead || r.second.kind == OpKind::kReadProgress ||
           r.second.kind == OpKind::kDetach;
  });
}

// --- Rings ---------------------------------------------------------------------------------------

uint64_t Process::RingTime() {
  ring_free_ = std::max(ring_free_, world_->now() + world_->Delay(s_.ring_delay_max));
  return ring_free_ - world_->now();
}

void Process::Hint(std::function<void(core::Job&)> call) {
  world_->After(RingTime(), [self = shared_from_this(), call = std::move(call)] {
    Member& m = self->world_->member(self->member_);
    // What a dead client has published is served until its death is known.
    if (!m.alive() || m.ended() || self->reaped_ || m.slots()[self->slot_] != self) return;
    call(m.job());
    m.Drain();
  });
}

uint64_t Process::Post(Request request, std::function<void(core::Job&, uint64_t)> call) {
  const uint64_t cookie = next_cookie_++;
  outstanding_[cookie] = request;
  Hint([call = std::move(call), cookie](core::Job& job) { call(job, cookie); });
  return cookie;
}

std::optional<UnitIndex> Process::GatherOf(uint64_t cookie) const {
  const auto it = outstanding_.find(cookie);
  if (it == outstanding_.end() || it->second.kind != OpKind::kGather) return std::nullopt;
  return it->second.unit;
}

void Process::Deliver(const core::Complete& complete) {
  answers_free_ = std::max(answers_free_, world_->now() + world_->Delay(s_.ring_delay_max));
  world_->After(answers_free_ - world_->now(), [self = shared_from_this(), complete] {
    Process& p = *self;
    if (!p.alive_ || p.exiting_ || p.failed_) return;
    const auto it = p.outstanding_.find(complete.cookie);
    if (it == p.outstanding_.end()) Violate("a request is answered twice, or was never made");
    const Request request = it->second;
    p.outstanding_.erase(it);
    if (request.kind == OpKind::kScatter) {
      --p.scatters_;
      p.staging_.erase(request.offset);
    } else {
      p.waiting_ = false;
    }
    if (!complete.status.ok()) return p.OnError(request, complete.status);
    p.OnAnswer(request, complete);
  });
}

void Process::OnAnswer(const Request& request, const core::Complete& complete) {
  switch (request.kind) {
    case OpKind::kScatter:
      if (blocked_) {
        waiting_ = false;
        std::exchange(blocked_, nullptr)();
      }
      return;
    case OpKind::kGather:
      Held(request.unit);
      break;
    case OpKind::kReclaim: {
      UnitGradients& g = gradients_[request.unit];
      if (!s_.spec.node_sum && complete.result == 1) {
        std::fill(g.touched.begin(), g.touched.end(), false);
        g.landed = false;
      }
      g.last = g.posted = false;
      break;
    }
    case OpKind::kRead:
      CheckRead(request);
      break;
    case OpKind::kReadProgress:
      CheckProgress(*complete.progress);
      break;
    case OpKind::kRestore:
      loss_scale_ = *complete.loss_scale;
      break;
    case OpKind::kRestoreOther:
      Violate("the ranks restore different values, and nobody says so");
    case OpKind::kStep:
      return OnStepAnswer(complete);
    case OpKind::kDetach:
      done_ = true;
      return Exit(true);
    default:
      break;
  }
  Continue();
}

void Process::OnError(const Request& request, const absl::Status& status) {
  world_->Trace("rank ", rank_, ": ", status.ToString());
  if (request.kind == OpKind::kGather && absl::IsResourceExhausted(status)) {
    Unhold(request.unit);
    return Continue();  // the script does without
  }
  if (absl::IsFailedPrecondition(status) && overrun_) {
    if (request.kind == OpKind::kScatter && !blocked_) return;
    if (request.kind == OpKind::kScatter) {
      waiting_ = false;
      return std::exchange(blocked_, nullptr)();
    }
    if (request.kind == OpKind::kReclaim) gradients_[request.unit].last = false;
    return Continue();
  }
  if (request.kind == OpKind::kRestoreOther && absl::IsInvalidArgument(status)) return Continue();
  bool refused = false;
  for (Rank r = 0; r < s_.world(); ++r) refused |= Disagrees(s_, r, step_, attempt_);
  refused |= s_.spec.refuse_untouched && LacksGradients(s_, step_, attempt_);
  if (request.kind == OpKind::kStep && refused && absl::IsFailedPrecondition(status)) {
    // Its gradients are gone with it; the script computes the step once more.
    ++attempt_;
    EndStep();
    BeginStep();
    return Continue();
  }
  Violate(absl::StrCat("rank ", rank_, ", op ", static_cast<int>(request.kind), " of unit ",
                       request.unit, " fails: ", status.ToString()));
}

// --- The script ----------------------------------------------------------------------------------

void Process::BeginStep() {
  overrun_ = s_.overrun && step_ > s_.steps;
  program_ = step_ > s_.steps ? FinalProgram(s_, rank_) : StepProgram(s_, rank_, step_, attempt_);
  next_ = 0;
  if (program_[0].kind != OpKind::kQuiet && attached_ && !step_sent_) reading_ = true;
}

void Process::StartReading() {
  reading_ = true;
  for (UnitIndex u = 0; u < s_.cells.size(); ++u) {
    if (s_.spec.window.resident[u]) CheckCopy(u);
  }
}

void Process::Continue() {
  world_->After(world_->Delay(s_.client_delay_max),
                [self = shared_from_this()] { self->Next(); });
}

void Process::Next() {
  if (!alive_ || done_ || exiting_) return;
  if (failed_) return Exit(false);
  Perform(program_[next_++]);
}

void Process::Perform(const Op& op) {
  switch (op.kind) {
    case OpKind::kGather: return Gather(op.unit);
    case OpKind::kRelease:
      if (holds_[op.unit] != Hold::kNone) {
        Unhold(op.unit);
        Hint([slot = slot_, u = op.unit](core::Job& job) { job.OnRelease(slot, u); });
      }
      break;
    case OpKind::kCompute: break;
    case OpKind::kLand: return Land(op);
    case OpKind::kScatter: return Scatter(op);
    case OpKind::kMicroStep: return EndMicroStep();
    case OpKind::kReclaim: {
      const UnitGradients& g = gradients_[op.unit];
      if (!g.last) break;
      if (!g.posted) {
        gradients_[op.unit].last = false;
        break;
      }
      waiting_ = true;
      // It waits for so many rounds, and takes no part in those of other units any more.
      for (UnitIndex u = 0; u < rounds_.size(); ++u) {
        if (rounds_[u] >= rounds_[op.unit]) continue;
        rounds_[u] = rounds_[op.unit];
        std::fill(indices_[u].begin(), indices_[u].end(), 0);
      }
      Post({OpKind::kReclaim, op.unit}, [slot = slot_, u = op.unit, step = step_](
                                             core::Job& job, uint64_t cookie) {
        job.OnReclaim(slot, cookie, u, step);
      });
      return;
    }
    case OpKind::kScalar:
      waiting_ = true;
      ++scalars_;
      PassOn();
      Post({OpKind::kScalar}, [slot = slot_](core::Job& job, uint64_t cookie) {
        job.OnScalar(slot, cookie, core::ScalarValues{});
      });
      return;
    case OpKind::kCollective:
      in_collective_ = true;
      return world_->Arrive(generation_, collectives_++, shared_from_this());
    case OpKind::kPut: return Put(op.unit, op.state);
    case OpKind::kRead: return Read(op);
    case OpKind::kReadProgress:
      waiting_ = true;
      Post({OpKind::kReadProgress},
           [slot = slot_](core::Job& job, uint64_t cookie) { job.OnReadProgress(slot, cookie); });
      return;
    case OpKind::kRestore:
    case OpKind::kRestoreOther:
      return Restore(op.kind == OpKind::kRestoreOther);
    case OpKind::kQuiet: reading_ = false; break;
    case OpKind::kReading: StartReading(); break;
    case OpKind::kStall: return world_->Stall(shared_from_this());
    case OpKind::kStep: return ScatterRest();
    case OpKind::kDetach:
      waiting_ = true;
      reading_ = false;
      for (UnitIndex u = 0; u < holds_.size(); ++u) Unhold(u);
      world_->Happens(Moment::kLeave);
      Post({OpKind::kDetach}, [slot = slot_](core::Job& job, uint64_t cookie) {
        job.OnDetach(slot, cookie);
      });
      return;
  }
  Continue();
}

// --- Parameters ----------------------------------------------------------------------------------

void Process::Gather(UnitIndex u) {
  if (holds_[u] != Hold::kNone) return Continue();
  holds_[u] = Hold::kClaiming;
  hold_words_[u] = step_;  // version + 1
  // The daemon may do anything between this store and the load.
  world_->After(world_->Delay(2), [self = shared_from_this(), u] {
    if (!self->alive_ || self->exiting_) return;
    if (self->failed_) return self->Exit(false);
    const SimWindow::Copy& copy = self->world_->member(self->member_).window().copy(u);
    if (copy.state == SimWindow::State::kValid && copy.version + 1 == self->step_) {
      self->Held(u);
      return self->Continue();
    }
    self->waiting_ = true;
    self->Post({OpKind::kGather, u}, [slot = self->slot_, u, step = self->step_](
                                         core::Job& job, uint64_t cookie) {
      job.OnGather(slot, cookie, u, step);
    });
  });
}

void Process::CheckCopy(UnitIndex u) const {
  const SimWindow::Copy& copy = world_->member(member_).window().copy(u);
  if (copy.state != SimWindow::State::kValid || copy.version + 1 != step_) {
    Violate(absl::StrCat("invariant 2: rank ", rank_, " reads unit ", u, " in step ", step_,
                         ", but its copy is of version ", copy.version, ", state ",
                         static_cast<int>(copy.state)));
  }
  if (copy.values != world_->truth().Before(step_)[u]) {
    Violate(absl::StrCat("invariant 2: rank ", rank_, " reads other weights of unit ", u,
                         " than those of step ", step_));
  }
}

void Process::Held(UnitIndex u) {
  holds_[u] = Hold::kHeld;
  trace_.push_back(u);
  CheckCopy(u);
}

void Process::Unhold(UnitIndex u) {
  holds_[u] = Hold::kNone;
  hold_words_[u] = 0;
}

void Process::Put(UnitIndex u, core::StateKind state) {
  waiting_ = true;
  for (size_t c = 0; c < transfer_[u].size(); ++c) transfer_[u][c] = PutValue(s_, step_, u, c);
  const core::Unit& unit = s_.layout().units()[u];
  const uint64_t elements =
      state == core::StateKind::kMaster ? unit.elements : unit.trainable_elements;
  Post({OpKind::kPut, u, 0, state},
       [slot = slot_, u, elements, state](core::Job& job, uint64_t cookie) {
         job.OnPut(slot, cookie, u, 0, elements, state);
       });
}

void Process::Read(const Op& op) {
  waiting_ = true;
  const core::Unit& unit = s_.layout().units()[op.unit];
  const uint64_t elements =
      op.state == core::StateKind::kGradient ? unit.trainable_elements : unit.elements;
  Post({OpKind::kRead, op.unit, 0, op.state},
       [slot = slot_, op, elements](core::Job& job, uint64_t cookie) {
         job.OnRead(slot, cookie, op.unit, 0, elements, op.state);
       });
}

void Process::Restore(bool other) {
  waiting_ = true;
  ++scalars_;
  PassOn();
  core::OptimizerProgress progress = *RestoreOf(s_, step_);
  if (other && rank_ + 1 == s_.world()) ++progress.parameter_steps[0];
  Post({other ? OpKind::kRestoreOther : OpKind::kRestore},
       [slot = slot_, progress](core::Job& job, uint64_t cookie) {
         job.OnRestore(slot, cookie, progress);
       });
}

void Process::CheckRead(const Request& request) const {
  if (request.state == core::StateKind::kGradient) {
    world_->CheckGradient(request.unit, generation_, transfer_[request.unit]);
    return;
  }
  const Truth& truth = world_->truth();
  const bool master = request.state == core::StateKind::kMaster;
  const Truth::Weights& expected = master ? truth.Before(step_) : truth.StateBefore(step_);
  if (transfer_[request.unit] == expected[request.unit]) return;
  Violate(absl::StrCat("rank ", rank_, " reads other values of unit ", request.unit, ", state ",
                       static_cast<int>(request.state), ", in step ", step_));
}

void Process::CheckProgress(const core::OptimizerProgress& progress) const {
  if (progress == world_->truth().Progress(step_)) return;
  Violate(absl::StrCat("rank ", rank_, " is told of other steps of the parameters, or of another "
                       "loss scale, in step ", step_));
}

// --- STEP ----------------------------------------------------------------------------------------

void Process::SendStep() {
  for (UnitIndex u = 0; u < holds_.size(); ++u) Unhold(u);
  reading_ = false;
  step_sent_ = true;
  waiting_ = true;
  world_->Happens(Moment::kStepSent);
  core::HyperParameters hyper = Hyper(s_, rank_, step_, attempt_);
  hyper.loss_scale = loss_scale_;
  Post({OpKind::kStep}, [slot = slot_, step = step_, hyper,
                         trace = std::exchange(trace_, {})](core::Job& job, uint64_t cookie) {
    job.OnStep(slot, cookie, step, hyper, trace);
  });
}

void Process::EndStep() {
  for (UnitGradients& g : gradients_) {
    std::fill(g.touched.begin(), g.touched.end(), false);
    g.landed = g.last = g.posted = g.unmarked = false;
  }
  for (auto& landings : landings_) landings.clear();
  std::fill(rounds_.begin(), rounds_.end(), 0);
  for (auto& parts : indices_) std::fill(parts.begin(), parts.end(), 0);
  micro_steps_ = 0;
  handed_.clear();
  step_sent_ = false;
}

void Process::OnStepAnswer(const core::Complete& complete) {
  if (!complete.step.has_value()) Violate("STEP is answered without a result");
  if (overrun_) Violate("a step completes though ranks have left");
  world_->Trace("rank ", rank_, " has finished step ", step_);
  loss_scale_ = complete.step->next_loss_scale;
  EndStep();
  ++step_;
  attempt_ = 0;
  BeginStep();
  if (reading_) StartReading();
  Continue();
}

}  // namespace zerod::sim
