// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/sequencer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status.h"

namespace zerod::core {

absl::Status Sequencer::BadMessage(MemberIndex from, const std::string& what) {
  return absl::InternalError(absl::StrCat("member ", from, " sent a message that makes no sense: ",
                                          what, ". Please report this; the job cannot go on"));
}

Sequencer::Sequencer(const JobSpec* spec, std::vector<bool> gather_after_commit)
    : spec_(spec), partition_(*spec->layout, spec->members),
      gather_after_commit_(std::move(gather_after_commit)), members_(spec->members),
      attached_(spec->world, false), attached_at_(spec->world, 0),
      wants_(spec->layout.get(), spec->in_flight_elements),
      reduced_round_(spec->layout->units().size(), 0) {
  if (spec->loss_scale.has_value()) loss_scaler_.emplace(*spec->loss_scale);
  ResetStep();
}

Entry& Sequencer::Add(EntryKind kind, std::vector<Entry>* out) {
  Entry& e = out->emplace_back();
  e.seq = next_seq_++;
  e.generation = generation_;
  e.kind = kind;
  return e;
}

void Sequencer::ResetStep() {
  for (MemberState& m : members_) {
    m.step.reset();
    m.norm.reset();
    m.ready_round.assign(spec_->layout->units().size(), 0);
  }
  std::fill(reduced_round_.begin(), reduced_round_.end(), 0);
  norm_appended_ = false;
}

absl::Status Sequencer::OnReport(MemberIndex from, const Report& report, std::vector<Entry>* out,
                                 absl::Status* refused) {
  if (from >= members_.size()) return BadMessage(from, "there is no such member");
  for (const ReportItem& item : report.items) {
    if (const auto* j = std::get_if<Joined>(&item)) {
      absl::Status status = OnJoined(from, *j);
      members_[from].refused = !status.ok();
      if (!status.ok()) {
        *refused = status;
        return absl::OkStatus();
      }
      members_[from].joined = true;
      MaybeStart(out);
      continue;
    }
    // It goes on reporting until it hears that it was refused.
    if (members_[from].refused) continue;
    if (!members_[from].joined) return BadMessage(from, "it has not joined");
    if (const auto* f = std::get_if<Failed>(&item)) {
      discarded_ = f->discard;
      return f->status;
    }
    // Stale generations change nothing.
    if (report.generation != generation_) continue;
    RETURN_IF_ERROR(OnItem(from, item, out));
  }
  AppendGathers(out);
  return absl::OkStatus();
}

absl::Status Sequencer::OnJoined(MemberIndex from, const Joined& j) const {
  if (j.world != spec_->world || j.members != spec_->members) {
    return absl::FailedPreconditionError(
        absl::StrCat("node ", from, " says the job has ", j.world, " ranks on ", j.members,
                     " nodes, node 0 says ", spec_->world, " on ", spec_->members,
                     ". Start all nodes with the same world size"));
  }
  if (!(j.layout == spec_->layout->hash())) {
    return absl::FailedPreconditionError(
        absl::StrCat("node ", from, "'s model has another layout (hash ", j.layout.Hex(),
                     ") than node 0's (", spec_->layout->hash().Hex(),
                     "): names, shapes, dtype, trainable flags and groups of all parameters must "
                     "be equal on all ranks"));
  }
  if (!(j.config == spec_->config_hash)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "node ", from, "'s configuration or gradient plan differs from node 0's. Give all ranks "
        "the same configuration, and set zerod.gradient_plan where the nodes' memory differs"));
  }
  return absl::OkStatus();
}

absl::Status Sequencer::OnItem(MemberIndex from, const ReportItem& item, std::vector<Entry>* out) {
  if (measuring_.has_value()) {
    if (const auto* t = std::get_if<TensorsMeasured>(&item)) return OnMeasured(from, *t, out);
    held_.emplace_back(from, item);
    return absl::OkStatus();
  }
  if (const auto* a = std::get_if<ClientAttached>(&item)) {
    if (a->rank >= spec_->world) return BadMessage(from, "a rank beyond the world");
    OnAttached(from, a->rank, out);
    return absl::OkStatus();
  }
  if (const auto* g = std::get_if<ClientGone>(&item)) {
    if (g->rank >= spec_->world) return BadMessage(from, "a rank beyond the world");
    OnGone(*g, out);
    return absl::OkStatus();
  }
  if (!running_) return BadMessage(from, "the generation has not started");
  if (const auto* w = std::get_if<Want>(&item)) return OnWant(from, *w);
  if (const auto* f = std::get_if<Forecasted>(&item)) {
    if (f->version == committed_) wants_.Announced(from);
    return absl::OkStatus();
  }
  if (const auto* g = std::get_if<GradientsReady>(&item)) return OnGradients(from, *g, out);
  if (const auto* s = std::get_if<StepReady>(&item)) return OnStep(from, *s, out);
  if (const auto* n = std::get_if<NormReady>(&item)) return OnNorm(from, *n, out);
  if (const auto* s = std::get_if<ScalarReady>(&item)) return OnScalar(from, *s, out);
  if (std::holds_alternative<TensorsMeasured>(item)) {
    return BadMessage(from, "squares of tensors that nobody waits for");
  }
  const StateRequest& r = std::get<StateRequest>(item);
  RETURN_IF_ERROR(CheckRange(r.unit, r.begin, r.count));
  if (!spec_->layout->Has(r.kind)) {
    return BadMessage(from, "a tensor of state beyond the layout's");
  }
  Entry& e = Add(r.put ? EntryKind::kPut : EntryKind::kRead, out);
  e.origin = from;
  e.slot = r.slot;
  e.unit = r.unit;
  e.begin = r.begin;
  e.count = r.count;
  e.state_kind = r.kind;
  return absl::OkStatus();
}

absl::Status Sequencer::CheckRange(UnitIndex unit, uint64_t begin, uint64_t count) const {
  if (unit >= spec_->layout->units().size() || begin > spec_->layout->units()[unit].elements ||
      count > spec_->layout->units()[unit].elements - begin) {
    return BadMessage(0, "a range outside the layout");
  }
  return absl::OkStatus();
}

void Sequencer::MaybeStart(std::vector<Entry>* out) {
  if (running_) return;
  for (const MemberState& m : members_) {
    if (!m.joined) return;
  }
  if (!std::all_of(attached_.begin(), attached_.end(), [](bool a) { return a; })) return;
  running_ = true;
  wants_.Restart(AllMembers(spec_->members));
  Add(EntryKind::kStart, out).step = committed_;
}

void Sequencer::OnAttached(MemberIndex from, Rank rank, std::vector<Entry>* out) {
  // Else the generation would wait forever for the rank that one of the two should have been.
  if (attached_[rank] && attached_at_[rank] != from) {
    return EndGeneration({rank, /*left=*/false,
                          absl::StrCat("the nodes ", attached_at_[rank], " and ", from,
                                       " each have a process of this rank: give every process a "
                                       "RANK of its own")},
                         out);
  }
  attached_[rank] = true;
  attached_at_[rank] = from;
  MaybeStart(out);
}

void Sequencer::OnGone(const ClientGone& g, std::vector<Entry>* out) {
  if (!running_) {
    // The generation still forms: it goes on waiting for this rank, as for one that never came.
    attached_[g.rank] = false;
    return;
  }
  if (g.left) {
    // Not between NORM and COMMIT: that step completes, and its clients must not be told that it
    // does not.
    if (norm_appended_) return pending_leaves_.push_back(g.rank);
    Leave(g.rank, out);
    return;
  }
  EndGeneration(g, out);
}

void Sequencer::EndGeneration(ClientGone why, std::vector<Entry>* out) {
  pending_death_ = std::move(why);
  // Once all clients have sent their STEP the members finish it by themselves, then the generation
  // ends. No step is half done when clients attach anew.
  if (!norm_appended_) NewGeneration(out);
}

void Sequencer::Leave(Rank rank, std::vector<Entry>* out) {
  Add(EntryKind::kLeave, out).rank = rank;
  some_left_ = true;
}

void Sequencer::NewGeneration(std::vector<Entry>* out) {
  Entry& e = Add(EntryKind::kGeneration, out);
  e.rank = pending_death_->rank;
  e.reason = pending_death_->reason;
  e.step = committed_;
  pending_death_.reset();
  pending_leaves_.clear();
  some_left_ = false;
  wants_.Restart(0);
  ++generation_;
  running_ = false;
  std::fill(attached_.begin(), attached_.end(), false);
  for (MemberState& m : members_) m.scalars.clear();
  scalars_done_ = 0;
  ResetStep();
}

absl::Status Sequencer::OnWant(MemberIndex from, const Want& w) {
  if (w.unit >= reduced_round_.size()) return BadMessage(from, "a unit beyond the layout");
  // Asked before it saw the COMMIT: it asks again for what it needs then.
  if (w.version != committed_) return absl::OkStatus();
  if (w.again) {
    wants_.Promote(w.unit);
  } else {
    wants_.Add(w.unit, from, w.demand);
  }
  return absl::OkStatus();
}

// Not between NORM and COMMIT, which would wait for what nobody needs any more.
void Sequencer::AppendGathers(std::vector<Entry>* out) {
  if (!running_ || norm_appended_ || measuring_.has_value()) return;
  while (const std::optional<WantQueue::Gather> next = wants_.Next()) {
    AddGather(next->unit, next->wants, out);
  }
}

void Sequencer::AddGather(UnitIndex unit, MemberSet wants, std::vector<Entry>* out) {
  Entry& e = Add(EntryKind::kAllGather, out);
  e.unit = unit;
  e.step = committed_;
  e.wants = wants;
  wants_.Begun(unit);
}

void Sequencer::OnGathered(UnitIndex unit, std::vector<Entry>* out) {
  wants_.Ended(unit);
  AppendGathers(out);
}

absl::Status Sequencer::OnGradients(MemberIndex from, const GradientsReady& g,
                                    std::vector<Entry>* out) {
  MemberState& m = members_[from];
  if (g.unit >= reduced_round_.size() || g.step != committed_ + 1 || m.step.has_value() ||
      g.round != m.ready_round[g.unit] + 1u || g.round > kRoundsMax) {
    return BadMessage(from, absl::StrCat("gradients of unit ", g.unit, ", step ", g.step,
                                         ", round ", g.round));
  }
  m.ready_round[g.unit] = static_cast<uint8_t>(g.round);
  AppendReduces(g.unit, out);
  return absl::OkStatus();
}

// REDUCE_SCATTER round r of a unit: some member has gradients for it, and each member either has
// handed over its own or has sent STEP, after which nothing follows.
void Sequencer::AppendReduces(UnitIndex unit, std::vector<Entry>* out) {
  for (;;) {
    const uint32_t round = reduced_round_[unit] + 1u;
    if (round > kRoundsMax) return;
    bool any = false;
    for (const MemberState& m : members_) {
      if (m.ready_round[unit] >= round) {
        any = true;
      } else if (!m.step.has_value()) {
        return;
      }
    }
    if (!any) return;
    reduced_round_[unit] = static_cast<uint8_t>(round);
    Entry& e = Add(EntryKind::kReduceScatter, out);
    e.unit = unit;
    e.step = committed_ + 1;
    e.round = round;
  }
}

absl::Status Sequencer::OnStep(MemberIndex from, const StepReady& s, std::vector<Entry>* out) {
  MemberState& m = members_[from];
  if (s.step != committed_ + 1 || m.step.has_value()) {
    return BadMessage(from, absl::StrCat("STEP ", s.step));
  }
  m.step = s;
  for (UnitIndex u = 0; u < reduced_round_.size(); ++u) AppendReduces(u, out);
  // Once a rank has left the others' STEPs are being answered with an error.
  if (some_left_) return absl::OkStatus();
  for (const MemberState& other : members_) {
    if (!other.step.has_value()) return absl::OkStatus();
  }
  std::string disagreement = Disagreement();
  if (!disagreement.empty()) {
    Decision refuse;
    refuse.kind = Decision::Kind::kRefuse;
    refuse.reason = disagreement;
    refuse.touched.assign(spec_->layout->parameters().size(), false);
    Commit(std::move(refuse), out);
    return absl::OkStatus();
  }
  norm_needed_ = spec_->skip_nonfinite || s.hyper.max_norm > 0;
  for (const MemberState& other : members_) norm_needed_ |= other.step->hyper.want_norm;
  norm_appended_ = true;
  Entry& e = Add(EntryKind::kNorm, out);
  e.step = s.step;
  e.norm_needed = norm_needed_;
  return absl::OkStatus();
}

std::string Sequencer::Disagreement() const {
  const StepReady& first = *members_[0].step;
  for (MemberIndex m = 0; m < members_.size(); ++m) {
    const StepReady& s = *members_[m].step;
    if (!s.agree) return s.disagreement;
    if (!(s.hyper.Hash() == first.hyper.Hash())) {
      return absl::StrCat(
          "the ranks ", absl::StrJoin(s.ranks, ", "), " and ", absl::StrJoin(first.ranks, ", "),
          " disagree about the hyper-parameters of this step (learning rate, betas, eps, weight "
          "decay, clipping or loss scale). Step the scheduler on every rank alike");
    }
  }
  return "";
}

absl::Status Sequencer::OnNorm(MemberIndex from, const NormReady& n, std::vector<Entry>* out) {
  MemberState& m = members_[from];
  if (!norm_appended_ || n.step != committed_ + 1 || m.norm.has_value()) {
    return BadMessage(from, absl::StrCat("NORM ", n.step));
  }
  uint64_t blocks = 0;
  for (UnitIndex u = 0; norm_needed_ && u < reduced_round_.size(); ++u) {
    blocks += spec_->layout->Blocks(partition_.TrainableShard(u, from));
  }
  if (n.part.touched.size() != spec_->layout->parameters().size() ||
      n.part.block_squares.size() != blocks) {
    return BadMessage(from, absl::StrCat("NORM with ", n.part.block_squares.size(), " squares for ",
                                         blocks, " blocks and ", n.part.touched.size(),
                                         " touched bits"));
  }
  m.norm = n.part;
  MaybeDecide(out);
  return absl::OkStatus();
}

void Sequencer::MaybeDecide(std::vector<Entry>* out) {
  Decision d;
  d.hyper = members_[0].step->hyper;
  d.touched.assign(spec_->layout->parameters().size(), false);
  bool nonfinite = false;
  for (const MemberState& m : members_) {
    if (!m.norm.has_value()) return;
    nonfinite |= m.norm->nonfinite;
    for (size_t p = 0; p < d.touched.size(); ++p) {
      if (m.norm->touched[p]) d.touched[p] = true;
    }
  }
  if (spec_->refuse_untouched) {
    d.reason = Untouched(d.touched);
    if (!d.reason.empty()) {
      d.kind = Decision::Kind::kRefuse;
      return Commit(std::move(d), out);
    }
  }
  for (size_t p = 0; spec_->untouched_as_zero && p < d.touched.size(); ++p) {
    d.touched[p] = spec_->layout->parameters()[p].trainable;
  }

  d.grad_norm = std::numeric_limits<double>::quiet_NaN();
  const double divisor = spec_->sum_gradients ? 1.0 : static_cast<double>(spec_->world);
  d.grad_scale = 1.0 / (divisor * d.hyper.loss_scale);
  if (norm_needed_) {
    // Partial sums are combined in layout order, whoever owns the blocks.
    double sum = 0;
    std::vector<size_t> next(members_.size(), 0);
    for (UnitIndex u = 0; u < reduced_round_.size(); ++u) {
      for (MemberIndex m = 0; m < members_.size(); ++m) {
        uint64_t blocks = spec_->layout->Blocks(partition_.TrainableShard(u, m));
        for (uint64_t b = 0; b < blocks; ++b) sum += members_[m].norm->block_squares[next[m]++];
      }
    }
    d.grad_norm = std::sqrt(sum) * d.grad_scale;
    if (spec_->skip_nonfinite && (nonfinite || !std::isfinite(sum))) {
      d.kind = Decision::Kind::kSkip;
      d.grad_norm = std::numeric_limits<double>::infinity();
    } else if (d.hyper.max_norm > 0) {
      // torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1.
      double coefficient = d.hyper.max_norm / (d.grad_norm + 1e-6);
      if (!(coefficient >= 1.0)) d.grad_scale *= coefficient;
    }
  }
  SetLossScale(&d);
  Commit(std::move(d), out);
}

// The scale moves with what was decided. Where it cannot, the step is refused on every rank.
void Sequencer::SetLossScale(Decision* decision) {
  decision->next_loss_scale = decision->hyper.loss_scale;
  if (!loss_scaler_.has_value()) return;
  const absl::Status status = loss_scaler_->Update(decision->kind == Decision::Kind::kSkip);
  decision->next_loss_scale = loss_scaler_->scale();
  if (status.ok()) return;
  decision->kind = Decision::Kind::kRefuse;
  decision->reason = std::string(status.message());
}

// What to say of the trainable parameters that no rank touched; empty where there are none.
std::string Sequencer::Untouched(const std::vector<bool>& touched) const {
  constexpr size_t kNamesMax = 10;
  std::vector<absl::string_view> names;
  size_t count = 0;
  for (size_t p = 0; p < touched.size(); ++p) {
    const Parameter& parameter = spec_->layout->parameters()[p];
    if (touched[p] || !parameter.trainable) continue;
    if (++count <= kNamesMax) names.push_back(parameter.name);
  }
  if (count == 0) return "";
  return absl::StrCat("no rank has a gradient in this step for ", absl::StrJoin(names, ", "),
                      count > names.size() ? absl::StrCat(" and ", count - names.size(), " more")
                                           : std::string(),
                      ": use them in the forward pass, freeze them, or set "
                      "zero_optimization.ignore_unused_parameters to true");
}

void Sequencer::Commit(Decision decision, std::vector<Entry>* out) {
  const Decision::Kind kind = decision.kind;
  if (loss_scaler_.has_value()) decision.loss_scaler = loss_scaler_->state();
  const std::vector<bool> touched = decision.touched;
  Entry& e = Add(EntryKind::kCommit, out);
  e.step = committed_ + 1;
  e.decision = std::move(decision);
  ResetStep();
  if (kind == Decision::Kind::kRefuse) return AfterCommit(out);
  ++committed_;
  wants_.Restart(AllMembers(spec_->members));
  if (kind == Decision::Kind::kApply) {
    if (spec_->layout->AnyByTensor(touched)) {
      measuring_ = touched;
      return;
    }
    GatherResident(touched, out);
  }
  AfterCommit(out);
}

void Sequencer::GatherResident(const std::vector<bool>& touched, std::vector<Entry>* out) {
  std::vector<bool> units(reduced_round_.size(), false);
  for (size_t p = 0; p < touched.size(); ++p) {
    if (touched[p]) units[spec_->layout->parameters()[p].unit] = true;
  }
  for (UnitIndex u = 0; u < units.size(); ++u) {
    if (gather_after_commit_[u] && units[u]) AddGather(u, AllMembers(spec_->members), out);
  }
}

absl::Status Sequencer::OnMeasured(MemberIndex from, const TensorsMeasured& t,
                                   std::vector<Entry>* out) {
  MemberState& m = members_[from];
  size_t pieces = 0;
  for (UnitIndex u = 0; u < reduced_round_.size(); ++u) {
    pieces += spec_->layout->TensorPieces(u, partition_.Shard(u, from), *measuring_).size();
  }
  if (t.step != committed_ || t.squares.size() != pieces || m.squares.has_value()) {
    return BadMessage(from, absl::StrCat(t.squares.size(), " squares for ", pieces,
                                         " pieces of tensors"));
  }
  m.squares = t.squares;
  for (const MemberState& other : members_) {
    if (!other.squares.has_value()) return absl::OkStatus();
  }
  Entry& e = Add(EntryKind::kTensorNorms, out);
  e.step = committed_;
  e.squares = CombineSquares();
  for (MemberState& other : members_) other.squares.reset();
  const std::vector<bool> touched = *std::exchange(measuring_, std::nullopt);
  GatherResident(touched, out);
  const uint64_t generation = generation_;
  AfterCommit(out);
  for (const auto& [member, item] : std::exchange(held_, {})) {
    if (generation_ != generation) break;  // stale
    RETURN_IF_ERROR(OnItem(member, item, out));
  }
  return absl::OkStatus();
}

// Partial sums are combined in layout order, whoever owns the pieces.
std::vector<TensorSquares> Sequencer::CombineSquares() const {
  std::vector<TensorSquares> sums(spec_->layout->parameters().size());
  std::vector<size_t> next(members_.size(), 0);
  for (UnitIndex u = 0; u < reduced_round_.size(); ++u) {
    for (MemberIndex m = 0; m < members_.size(); ++m) {
      for (const TensorPiece& piece :
           spec_->layout->TensorPieces(u, partition_.Shard(u, m), *measuring_)) {
        const TensorSquares& of = (*members_[m].squares)[next[m]++];
        sums[piece.parameter].weight += of.weight;
        sums[piece.parameter].update += of.update;
      }
    }
  }
  return sums;
}

// Who left or died while the step was being decided.
void Sequencer::AfterCommit(std::vector<Entry>* out) {
  for (const Rank rank : std::exchange(pending_leaves_, {})) Leave(rank, out);
  if (pending_death_.has_value()) NewGeneration(out);
}

}  // namespace zerod::core
