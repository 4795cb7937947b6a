// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/member.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/sim/process.h"
#include "tests/sim/world.h"

namespace zerod::sim {

Member::Member(World* world, MemberIndex index)
    : world_(world), s_(world->scenario()), index_(index), partition_(s_.layout(), s_.spec.members),
      slots_(s_.spec.local_world) {
  for (const std::vector<Cell>& cells : s_.cells) weights_.emplace_back(cells.size(), 0);
  states_ = weights_;
  accumulated_step_.assign(s_.cells.size(), 0);
  reduced_step_.assign(s_.cells.size(), 0);
  set_.resize(s_.cells.size());
  set_step_.assign(s_.cells.size(), 0);
  marks_.assign(slots_.size(), std::vector<Marks>(s_.cells.size()));
  for (const std::vector<Fragment>& fragments : s_.fragments) {
    accumulators_.emplace_back(fragments.size());
    reduced_.emplace_back(fragments.size());
  }
}

Member::~Member() = default;

void Member::Begin() {
  window_ = std::make_unique<SimWindow>(world_, this);
  job_ = std::make_unique<core::Job>(s_.Spec(index_), window_.get());
  Drain();
}

void Member::Drain() {
  for (core::Action& action : job_->TakeActions()) {
    if (ended_) Violate(absl::StrCat("member ", index_, " acts after the job's end"));
    std::visit([this](auto& a) { Do(a); }, action);
  }
}

void Member::Later(std::function<void()> what) {
  world_->After(world_->Delay(s_.work_delay_max), [this, what = std::move(what)] {
    if (!alive_ || ended_) return;
    what();
    Drain();
  });
}

void Member::EntryStarts(uint64_t seq) {
  if (seq <= last_seq_) {
    Violate(absl::StrCat("invariant 1: member ", index_, " starts entry ", seq, " after ",
                         last_seq_));
  }
  last_seq_ = seq;
}

void Member::EntryDone(uint64_t seq, bool ok) {
  job_->OnEntryDone(seq, ok ? absl::OkStatus() : absl::UnavailableError("a peer is gone"));
  Drain();
}

void Member::CheckExhausted(const core::Complete& a) const {
  const std::optional<UnitIndex> unit = slots_[a.slot]->GatherOf(a.cookie);
  if (!unit.has_value()) Violate("RESOURCE_EXHAUSTED for what is not a gather");
  const auto& units = s_.layout().units();
  uint64_t needed = units[*unit].chunks;
  for (UnitIndex u = 0; u < units.size(); ++u) {
    const bool held = window_->copy(u).state == SimWindow::State::kValid &&
                      !window_->Holders(u).empty();
    if (u != *unit && (s_.spec.window.pinned[u] || held)) needed += units[u].chunks;
  }
  if (needed <= s_.spec.window.max_chunks) {
    Violate(absl::StrCat("a gather of unit ", *unit, " is refused though ", needed,
                         " chunks would do: ", a.status.ToString()));
  }
}

void Member::Do(core::Complete& a) {
  if (a.slot >= slots_.size() || slots_[a.slot] == nullptr) Violate("an answer to nobody");
  if (absl::IsResourceExhausted(a.status)) CheckExhausted(a);
  if (a.step.has_value() && a.status.ok()) {
    CheckWeights(job_->committed(), true);
    CheckProgress(job_->committed());
    const Truth::Outcome& outcome = world_->truth().outcome(job_->committed());
    if (a.step->skipped != outcome.skip || a.step->next_loss_scale != outcome.next_loss_scale) {
      Violate("a client is told the wrong outcome");
    }
  }
  if (a.loss_scale.has_value()) world_->Happens(Moment::kRestore);
  slots_[a.slot]->Deliver(a);
}

void Member::Do(core::FailSlot& a) {
  world_->Trace("member ", index_, " fails slot ", a.slot, ": ", a.status.ToString());
  if (!absl::IsAborted(a.status) && !world_->job_lost()) {
    Violate(absl::StrCat("the job fails without need: ", a.status.ToString()));
  }
  slots_[a.slot]->DeliverFailure(a.status);
}

void Member::Do(core::Send& a) { world_->Send(index_, a.to, std::move(a.message)); }

void Member::Do(core::Connect&) {
  world_->StartConnect(index_, [this](bool ok) {
    if (!alive_ || ended_) return;
    job_->OnConnected(ok ? absl::OkStatus() : absl::UnavailableError("a peer is gone"));
    Drain();
  });
}

void Member::Do(core::StartAllGather& a) {
  world_->Trace("member ", index_, " starts ", a.seq, ": gather of unit ", a.unit,
                a.receive ? ", receives" : "");
  EntryStarts(a.seq);
  World::Wire& wire = world_->wire(a.seq);
  const std::vector<Cell>& cells = s_.cells[a.unit];
  wire.values.resize(cells.size());
  std::vector<uint64_t> sent = weights_[a.unit];
  for (size_t c = 0; c < cells.size(); ++c) {
    if (cells[c].owner == index_) wire.values[c] = sent[c];
  }
  if (a.receive) window_->Scramble(a.unit);
  world_->StartExchange(a.seq, index_, Hash(1, a.unit, a.wants), [=, this](bool ok) {
    if (!alive_ || ended_) return;
    if (weights_[a.unit] != sent) {
      Violate(absl::StrCat("unit ", a.unit, " is rewritten on member ", index_,
                           " while it is being sent"));
    }
    if (ok && a.receive) window_->Fill(a.unit, world_->wire(a.seq).values);
    EntryDone(a.seq, ok);
  });
}

// What this node's clients have for `round`, as daemon/engine's GradientBook finds it.
Member::Sums Member::NodeSum(UnitIndex unit, Step step, uint32_t round) const {
  Sums sums(s_.fragments[unit].size());
  if (s_.spec.node_sum) return accumulated_step_[unit] == step ? accumulators_[unit] : sums;
  for (SlotIndex slot = 0; slot < slots_.size(); ++slot) {
    const Marks& marks = marks_[slot][unit];
    if (marks.step != step || marks.round == 0) continue;
    if (round != 0 && marks.round != round) continue;
    const auto& gradients = slots_[slot]->gradients(unit);
    for (size_t i = 0; i < sums.size(); ++i) {
      if (marks.touched[i]) sums[i] = Add(sums[i], gradients.file[i]);
    }
  }
  return sums;
}

Member::Sums Member::PerFragment(UnitIndex unit, Step step) const {
  Sums sums(s_.fragments[unit].size());
  if (s_.spec.members == 1) {
    sums = set_step_[unit] == step ? set_[unit] : NodeSum(unit, step, 0);
  } else if (reduced_step_[unit] == step) {
    sums = reduced_[unit];
  }
  return sums;
}

std::vector<Gradient> Member::Final(UnitIndex unit, Step step) const {
  return s_.JoinFragments(unit, PerFragment(unit, step));
}

void Member::Do(core::StartReduce& a) {
  world_->Trace("member ", index_, " starts ", a.seq, ": reduce of unit ", a.unit, ", round ",
                a.round);
  world_->Happens(Moment::kReduce);
  EntryStarts(a.seq);
  const Sums mine = NodeSum(a.unit, a.step, a.round);
  World::Wire& wire = world_->wire(a.seq);
  wire.node_sums.resize(s_.spec.members);
  wire.node_sums[index_] = mine;
  world_->StartExchange(a.seq, index_, Hash(2, a.unit, a.step, a.round), [=, this](bool ok) {
    if (!alive_ || ended_) return;
    if (NodeSum(a.unit, a.step, a.round) != mine) {
      Violate(absl::StrCat("invariant 4: gradients of unit ", a.unit, " change on member ", index_,
                           " while they are being reduced"));
    }
    if (ok && s_.spec.members > 1) {
      Sums sums(mine.size());
      for (const Sums& node : world_->wire(a.seq).node_sums) {
        for (size_t i = 0; i < sums.size(); ++i) sums[i] = Add(sums[i], node[i]);
      }
      for (size_t i = 0; i < sums.size(); ++i) {
        Gradient& into = reduced_[a.unit][i];
        into = a.round == 1 ? sums[i] : Add(into, sums[i]);
      }
      reduced_step_[a.unit] = a.step;
      for (Gradient& g : accumulators_[a.unit]) g = Gradient{};
    }
    EntryDone(a.seq, ok);
  });
}

void Member::Do(core::StartAccumulate& a) {
  world_->Happens(Moment::kAccumulate);
  const auto process = slots_[a.slot];
  if (a.aside != 0 && !aside_[a.aside].there) Violate("what is added was not set aside yet");
  const Sums staged = a.aside != 0 ? aside_[a.aside].sums : process->staged(a.staging_offset);
  Later([=, this] {
    if (a.aside != 0) {
      aside_.erase(a.aside);
    } else if (process->staged(a.staging_offset) != staged) {
      Violate("staging is overwritten in use");
    }
    Sums& sums = accumulators_[a.unit];
    for (size_t i = 0; i < sums.size(); ++i) {
      sums[i] = a.first ? staged[i] : Add(sums[i], staged[i]);
    }
    accumulated_step_[a.unit] = job_->committed() + 1;
    job_->OnAccumulateDone(a.unit, a.slot);
  });
}

void Member::Do(core::StartSetAside& a) {
  world_->Happens(Moment::kSetAside);
  const auto process = slots_[a.slot];
  const Sums staged = process->staged(a.staging_offset);
  Aside& aside = aside_[a.aside];
  aside.sums = staged;
  aside.bytes = a.bytes;
  uint64_t bytes = 0;
  for (const auto& [number, other] : aside_) bytes += other.bytes;
  uint64_t most = 0;  // for each rank: a gradient, in whole pages for each fragment
  for (UnitIndex u = 0; u < s_.fragments.size(); ++u) {
    for (const Fragment& f : s_.fragments[u]) {
      const uint32_t parameter = s_.layout().units()[u].parameters[f.place];
      const uint64_t pages = (f.elements * sizeof(float) + 4095) / 4096;
      if (s_.layout().parameters()[parameter].trainable) most += pages * 4096;
    }
  }
  if (bytes > most * s_.spec.local_world) {
    Violate(absl::StrCat("member ", index_, " sets ", bytes, " bytes aside"));
  }
  Later([=, this] {
    if (process->staged(a.staging_offset) != staged) Violate("staging is overwritten in use");
    const bool done = world_->random().Below(100) >= s_.aside_refused_percent;
    if (done) aside_[a.aside].there = true;
    else aside_.erase(a.aside);
    job_->OnSetAsideDone(a.unit, a.aside, done);
  });
}

void Member::Do(core::DropAside& a) {
  if (aside_.erase(a.aside) != 1) Violate("what was never set aside is dropped");
}

// Between steps and between generations there is nothing.
void Member::CheckAside(const char* when) const {
  if (!aside_.empty()) Violate(absl::StrCat("gradients are still set aside ", when));
}

void Member::Do(core::ComputeNorm& a) {
  world_->Trace("member ", index_, " computes NORM ", a.step);
  world_->Happens(Moment::kNorm);
  Later([=, this] {
    core::NormPart part;
    for (UnitIndex u = 0; u < s_.cells.size() && a.needed; ++u) {
      const core::Range shard = partition_.TrainableShard(u, index_);
      std::vector<double> squares(s_.layout().Blocks(shard), 0.0);
      const std::vector<Gradient> sums = Final(u, a.step);
      for (const Cell& cell : s_.cells[u]) {
        if (cell.owner != index_ || !cell.trainable) continue;
        const uint64_t block =
            (cell.elements.begin - shard.begin) / s_.layout().block_elements();
        squares[block] += Square(sums[cell.place]);
        part.nonfinite |= sums[cell.place].nonfinite;
      }
      part.block_squares.insert(part.block_squares.end(), squares.begin(), squares.end());
    }
    job_->OnNormDone(a.step, std::move(part));
  });
}

// --- COMMIT and what follows ---------------------------------------------------------------------

void Member::Do(core::CommitBlobs& a) {
  world_->Trace("member ", index_, " commits step ", a.step);
  world_->Happens(Moment::kCommit);
  if (a.step != blobs_ + 1) {
    Violate(absl::StrCat("invariant 3: member ", index_, " commits step ", a.step, " after ",
                         blobs_));
  }
  blobs_ = a.step;
  CheckAside("when the step is committed");
  if (a.step != world_->truth().committed() + 1) return;
  world_->truth().Commit(a.step, world_->Attached());
}

void Member::CheckPlan(const core::ApplyPlan& plan) const {
  if (plan.step != job_->committed() || plan.step != blobs_) {
    Violate(absl::StrCat("invariant 3: step ", plan.step, " is applied before its COMMIT"));
  }
  const Truth::Outcome& outcome = world_->truth().outcome(plan.step);
  if (outcome.skip || plan.decision.kind != core::Decision::Kind::kApply) {
    Violate(absl::StrCat("step ", plan.step, " is applied, and ought to be skipped"));
  }
  if (plan.decision.touched != outcome.touched ||
      plan.parameter_steps != outcome.progress.parameter_steps) {
    Violate(absl::StrCat("step ", plan.step, ": touched bits or parameters' steps are wrong"));
  }
  const bool norm_wanted = s_.max_norm > 0 || s_.spec.skip_nonfinite || plan.step % 2 == 0;
  const double norm = plan.decision.grad_norm;
  if (norm_wanted ? !(std::fabs(norm - outcome.grad_norm) <= 1e-9 * outcome.grad_norm)
                  : !std::isnan(norm)) {
    Violate(absl::StrCat("step ", plan.step, ": the norm is ", norm, " and ought to be ",
                         outcome.grad_norm));
  }
  double scale = 1.0 / (s_.world() * outcome.loss_scale);
  if (s_.max_norm > 0) scale *= std::min(1.0, s_.max_norm / (outcome.grad_norm + 1e-6));
  if (std::fabs(plan.decision.grad_scale - scale) > 1e-9 * scale ||
      plan.decision.hyper.groups[0].lr != static_cast<double>(plan.step)) {
    Violate(absl::StrCat("step ", plan.step, ": another scale or learning rate than asked for"));
  }
}

void Member::Do(core::StartMeasure& a) {
  world_->Trace("member ", index_, " measures unit ", a.unit);
  world_->Happens(Moment::kMeasure);
  CheckPlan(*a.plan);
  const std::vector<Gradient> before = Final(a.unit, a.plan->step);
  const std::vector<uint64_t> weights = weights_[a.unit];
  Later([=, this] {
    if (Final(a.unit, a.plan->step) != before || weights_[a.unit] != weights) {
      Violate(absl::StrCat("unit ", a.unit, " changes while it is measured"));
    }
    job_->OnMeasured(a.unit, a.plan->step, MeasureUnit(a.unit, *a.plan));
  });
}

// In the order of the cells, which is the layout's.
std::vector<core::TensorSquares> Member::MeasureUnit(UnitIndex unit, const core::ApplyPlan& plan) {
  const std::vector<Gradient> sums = Final(unit, plan.step);
  std::vector<core::TensorSquares> squares;
  for (size_t c = 0; c < s_.cells[unit].size(); ++c) {
    const Cell& cell = s_.cells[unit][c];
    if (!s_.Keeps(index_, cell) || !s_.ByTensor(cell) || !plan.decision.touched[cell.parameter]) {
      continue;
    }
    uint64_t& state = states_[unit][c];
    state = ApplyState(state, sums[cell.place], plan.step);
    if (cell.owner != index_) continue;
    const uint64_t block = s_.layout().block_elements();
    for (uint64_t at = cell.elements.begin; at < cell.elements.end; at = (at / block + 1) * block) {
      squares.push_back({WeightSquare(weights_[unit][c], at), UpdateSquare(state, at)});
    }
  }
  return squares;
}

void Member::Do(core::StartApply& a) {
  world_->Happens(Moment::kApply);
  CheckPlan(*a.plan);
  const std::vector<Gradient> before = Final(a.unit, a.plan->step);
  // At stages 1 and 2 in fp32 the window is the master copy.
  if (s_.spec.window.resident[a.unit]) window_->Scramble(a.unit);
  Later([=, this] {
    if (Final(a.unit, a.plan->step) != before) {
      Violate(absl::StrCat("gradients of unit ", a.unit, " change while they are applied"));
    }
    ApplyUnit(a.unit, *a.plan);
    if (job_->ValidAfterApply(a.unit)) window_->Fill(a.unit, weights_[a.unit]);
    job_->OnApplyDone(a.unit, a.plan->step);
  });
}

void Member::ApplyUnit(UnitIndex unit, const core::ApplyPlan& plan) {
  const std::vector<Gradient> sums = Final(unit, plan.step);
  for (size_t c = 0; c < s_.cells[unit].size(); ++c) {
    const Cell& cell = s_.cells[unit][c];
    if (!s_.Keeps(index_, cell) || !cell.trainable || !plan.decision.touched[cell.parameter]) {
      continue;
    }
    const uint64_t steps = plan.parameter_steps[cell.parameter];
    uint64_t& weight = weights_[unit][c];
    uint64_t& state = states_[unit][c];
    if (!s_.ByTensor(cell)) {
      weight = Apply(weight, sums[cell.place], state, steps);
      state = ApplyState(state, sums[cell.place], plan.step);
      continue;
    }
    if (plan.squares.size() != plan.parameter_steps.size()) {
      Violate(absl::StrCat("unit ", unit, " is applied without the norms of its tensors"));
    }
    const core::TensorSquares& squares = plan.squares[cell.parameter];
    weight = ApplyByTensor(weight, state, squares.weight, squares.update, steps);
  }
}

void Member::CheckProgress(Step step) const {
  if (!(job_->progress() == world_->truth().outcome(step).progress)) {
    Violate(absl::StrCat("invariant 3: member ", index_, " counts other steps of the parameters, "
                         "or has another loss scale, after step ", step));
  }
}

void Member::CheckWeights(Step step, bool resident) const {
  const Truth::Weights& truth = world_->truth().After(step);
  for (UnitIndex u = 0; u < s_.cells.size(); ++u) {
    for (size_t c = 0; c < s_.cells[u].size(); ++c) {
      if (!s_.Keeps(index_, s_.cells[u][c]) || weights_[u][c] == truth[u][c]) continue;
      Violate(absl::StrCat("invariants 3, 4, 7: member ", index_, " has other weights of unit ", u,
                           ", cell ", c, " at step ", step));
    }
    if (!resident || !s_.spec.window.resident[u]) continue;
    const SimWindow::Copy& copy = window_->copy(u);
    if (copy.state != SimWindow::State::kValid || copy.version != step ||
        copy.values != truth[u]) {
      Violate(absl::StrCat("invariant 2: the resident unit ", u, " is not valid on member ",
                           index_, " after step ", step));
    }
  }
}

void Member::Do(core::StartPut& a) {
  world_->Happens(Moment::kPut);
  EntryStarts(a.seq);
  if (a.origin == index_) world_->wire(a.seq).values = slots_[a.slot]->transfer()[a.unit];
  if (a.kind == core::StateKind::kGradient) return PutGradient(a);
  const bool master = a.kind == core::StateKind::kMaster;
  if (master && s_.spec.window.resident[a.unit]) window_->Scramble(a.unit);
  world_->StartExchange(a.seq, index_, Hash(3, a.unit, a.origin, a.slot, a.begin, a.count, a.kind),
                        [=, this](bool ok) {
    if (!alive_ || ended_) return;
    const std::vector<uint64_t>& values = world_->wire(a.seq).values;
    for (size_t c = 0; c < values.size() && ok; ++c) {
      const Cell& cell = s_.cells[a.unit][c];
      if (!s_.Keeps(index_, cell) || (!master && !cell.trainable)) continue;
      (master ? weights_ : states_)[a.unit][c] = values[c];
    }
    if (ok && master && s_.spec.window.resident[a.unit]) window_->Fill(a.unit, values);
    EntryDone(a.seq, ok);
  });
}

// Nothing comes behind it: the scripts say so.
void Member::PutGradient(const core::StartPut& a) {
  const Step step = job_->committed() + 1;
  const Sums before = PerFragment(a.unit, step);
  world_->StartExchange(a.seq, index_, Hash(5, a.unit, a.origin, a.slot, a.begin, a.count),
                        [=, this](bool ok) {
    if (!alive_ || ended_) return;
    if (PerFragment(a.unit, step) != before) {
      Violate(absl::StrCat("the gradient of unit ", a.unit, " grows while it is set"));
    }
    Sums& sums = s_.spec.members == 1 ? set_[a.unit] : reduced_[a.unit];
    sums = before;
    if (s_.spec.members == 1) set_step_[a.unit] = step;
    for (size_t f = 0; f < sums.size() && ok; ++f) {
      if (sums[f].any) sums[f] = SetGradient(world_->wire(a.seq).values[0], f);
    }
    EntryDone(a.seq, ok);
  });
}

void Member::Do(core::StartRead& a) {
  EntryStarts(a.seq);
  World::Wire& wire = world_->wire(a.seq);
  const std::vector<Cell>& cells = s_.cells[a.unit];
  wire.values.resize(cells.size());
  for (size_t c = 0; c < cells.size(); ++c) {
    if (cells[c].owner != index_) continue;
    if (a.kind == core::StateKind::kGradient) {
      wire.values[c] = Read(Final(a.unit, job_->committed() + 1)[cells[c].place]);
    } else {
      const bool master = a.kind == core::StateKind::kMaster;
      wire.values[c] = (master ? weights_ : states_)[a.unit][c];
    }
  }
  const auto process = a.origin == index_ ? slots_[a.slot] : nullptr;
  world_->StartExchange(a.seq, index_, Hash(4, a.unit, a.origin, a.slot, a.begin, a.count, a.kind),
                        [=, this](bool ok) {
    if (!alive_ || ended_) return;
    if (ok && process != nullptr) {
      process->transfer()[a.unit] = world_->wire(a.seq).values;
    }
    EntryDone(a.seq, ok);
  });
}

void Member::Mark(SlotIndex slot, UnitIndex unit, Step step, bool last,
                  const std::vector<bool>& touched) {
  Marks& marks = marks_[slot][unit];
  if (marks.step != step) marks = Marks{step, 0, {}};
  if (last) marks.round = job_->NextRound(slot, unit);
  marks.touched = touched;
}

void Member::Do(core::DropGradients&) {
  for (const auto& [number, aside] : aside_) {
    if (!aside.there) Violate("a gradient is being set aside while all are dropped");
  }
  aside_.clear();
  for (auto& slot : marks_) {
    for (Marks& marks : slot) marks = Marks{};
  }
  std::fill(set_step_.begin(), set_step_.end(), 0);
  for (Sums& sums : accumulators_) std::fill(sums.begin(), sums.end(), Gradient{});
  for (Sums& sums : reduced_) std::fill(sums.begin(), sums.end(), Gradient{});
}

void Member::Do(core::End& a) {
  world_->Trace("member ", index_, " ends: ", a.status.ToString());
  ended_ = true;
  if (a.status.ok()) CheckAside("at the job's end");
  if (!a.status.ok() && !world_->job_lost()) {
    Violate(absl::StrCat("the job fails without need: ", a.status.ToString()));
  }
}

}  // namespace zerod::sim
