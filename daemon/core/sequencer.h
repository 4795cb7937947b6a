// SPDX-License-Identifier: Apache-2.0
//
// Member 0's second job: turn the reports of all members into one ordered log. It waits only for
// what a rule of the log needs from every member, never for a client. Pure, like Job.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/core/job.h"
#include "daemon/core/layout.h"
#include "daemon/core/loss_scaler.h"
#include "daemon/core/types.h"
#include "daemon/core/want_queue.h"

namespace zerod::core {

class Sequencer {
 public:
  // `spec` outlives it. `gather_after_commit[u]`: the unit is resident and its copy does not become
  // valid by the optimizer alone, so that a gather for all members follows each COMMIT.
  Sequencer(const JobSpec* spec, std::vector<bool> gather_after_commit);

  // Appends to `out` what the report makes possible. A status that is not OK ends the job
  // everywhere, except that a member that may not join is refused alone: `*refused` is then set.
  absl::Status OnReport(MemberIndex from, const Report& report, std::vector<Entry>* out,
                        absl::Status* refused);

  // An ALL_GATHER is done as far as member 0 takes part in it.
  void OnGathered(UnitIndex unit, std::vector<Entry>* out);

  // The failure that OnReport returned gives the job's state up on purpose.
  bool discarded() const { return discarded_; }
  bool joined(MemberIndex m) const { return members_[m].joined; }
  // It has reported the step under way, that scalar, or that round of the unit's gradients.
  bool has_step(MemberIndex m) const { return members_[m].step.has_value(); }
  bool has_scalar(MemberIndex m, uint64_t ordinal) const {
    return ordinal <= scalars_done_ || members_[m].scalars.count(ordinal) != 0;
  }
  bool has_gradients(MemberIndex m, UnitIndex unit, uint32_t round) const {
    return members_[m].ready_round[unit] >= round;
  }
  // Ranks that are attached, in the generation under way.
  const std::vector<bool>& attached() const { return attached_; }

 private:
  struct MemberState {
    bool joined = false;
    bool refused = false;  // another layout, configuration or world
    std::optional<StepReady> step;
    std::optional<NormPart> norm;
    std::optional<std::vector<TensorSquares>> squares;
    std::vector<uint8_t> ready_round;  // per unit
    std::map<uint64_t, ScalarReady> scalars;
  };

  static absl::Status BadMessage(MemberIndex from, const std::string& what);
  absl::Status OnItem(MemberIndex from, const ReportItem& item, std::vector<Entry>* out);
  absl::Status OnJoined(MemberIndex from, const Joined& j) const;
  absl::Status OnWant(MemberIndex from, const Want& w);
  absl::Status OnGradients(MemberIndex from, const GradientsReady& g, std::vector<Entry>* out);
  absl::Status OnStep(MemberIndex from, const StepReady& s, std::vector<Entry>* out);
  absl::Status OnNorm(MemberIndex from, const NormReady& n, std::vector<Entry>* out);
  absl::Status OnMeasured(MemberIndex from, const TensorsMeasured& t, std::vector<Entry>* out);
  absl::Status OnScalar(MemberIndex from, const ScalarReady& s, std::vector<Entry>* out);
  void Reduce(const std::map<Rank, ScalarValues>& by_rank, Entry* e) const;
  void OnAttached(MemberIndex from, Rank rank, std::vector<Entry>* out);
  void OnGone(const ClientGone& g, std::vector<Entry>* out);
  absl::Status CheckRange(UnitIndex unit, uint64_t begin, uint64_t count) const;

  void MaybeStart(std::vector<Entry>* out);
  void AppendGathers(std::vector<Entry>* out);
  void AddGather(UnitIndex unit, MemberSet wants, std::vector<Entry>* out);
  void AppendReduces(UnitIndex unit, std::vector<Entry>* out);
  void MaybeDecide(std::vector<Entry>* out);
  void SetLossScale(Decision* decision);
  void Commit(Decision decision, std::vector<Entry>* out);
  std::vector<TensorSquares> CombineSquares() const;
  void GatherResident(const std::vector<bool>& touched, std::vector<Entry>* out);
  void AfterCommit(std::vector<Entry>* out);
  void Leave(Rank rank, std::vector<Entry>* out);
  void EndGeneration(ClientGone why, std::vector<Entry>* out);
  void NewGeneration(std::vector<Entry>* out);
  std::string Disagreement() const;
  std::string Untouched(const std::vector<bool>& touched) const;
  Entry& Add(EntryKind kind, std::vector<Entry>* out);
  void ResetStep();

  const JobSpec* const spec_;
  const Partition partition_;
  const std::vector<bool> gather_after_commit_;
  std::vector<MemberState> members_;
  std::vector<bool> attached_;
  std::vector<MemberIndex> attached_at_;  // where attached_
  uint64_t generation_ = 1;
  bool running_ = false;
  uint64_t next_seq_ = 1;
  Step committed_ = 0;
  std::optional<LossScaler> loss_scaler_;
  WantQueue wants_;
  std::vector<uint8_t> reduced_round_;  // per unit: appended in this step
  bool norm_appended_ = false;
  // From a COMMIT to its TENSOR_NORMS: the parameters touched. Nothing is appended between them,
  // because the log would wait there for units that wait for TENSOR_NORMS.
  std::optional<std::vector<bool>> measuring_;
  std::vector<std::pair<MemberIndex, ReportItem>> held_;  // what was reported meanwhile
  bool discarded_ = false;
  bool norm_needed_ = false;
  uint64_t scalars_done_ = 0;
  bool some_left_ = false;                   // in this generation
  std::optional<ClientGone> pending_death_;  // seen while a step was being decided
  std::vector<Rank> pending_leaves_;         // likewise
};

}  // namespace zerod::core
