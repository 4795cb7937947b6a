// SPDX-License-Identifier: Apache-2.0
//
// One member: a real core::Job, and in place of the engine a model of it whose work takes random
// time and whose bytes are hashes.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "daemon/core/job.h"
#include "tests/sim/scenario.h"

namespace zerod::sim {

class Process;
class World;
class Member;

// The window as clients see it. Checks at each change that nobody reads what changes.
class SimWindow : public core::WindowPort {
 public:
  enum class State : uint8_t { kAbsent, kFilling, kValid };
  struct Copy {
    State state = State::kAbsent;
    Step version = 0;
    uint32_t epoch = 0;
    std::vector<uint32_t> chunks;
    std::vector<uint64_t> values;  // per cell
  };

  SimWindow(World* world, Member* member);
  void Map(UnitIndex u, const std::vector<uint32_t>& chunks) override;
  void Publish(UnitIndex u, core::Step version) override;
  void Retract(UnitIndex u) override;
  bool TryUnmap(UnitIndex u) override;
  absl::Status Grow(uint64_t chunks) override;
  std::vector<SlotIndex> Holders(UnitIndex u) override;

  const Copy& copy(UnitIndex u) const { return copies_[u]; }
  // The engine has written the whole copy.
  void Fill(UnitIndex u, const std::vector<uint64_t>& values);
  // The engine may write from here on: what was there is gone.
  void Scramble(UnitIndex u);

 private:
  void CheckUnread(UnitIndex u, const char* what) const;

  World* const world_;
  Member* const member_;
  std::vector<Copy> copies_;
  std::vector<int64_t> chunk_user_;
  uint64_t chunks_;
};

class Member {
 public:
  Member(World* world, MemberIndex index);
  ~Member();

  MemberIndex index() const { return index_; }
  core::Job& job() { return *job_; }
  SimWindow& window() { return *window_; }
  // Creates the job: not before its node is told to.
  void Begin();
  bool begun() const { return job_ != nullptr; }
  bool alive() const { return alive_; }
  bool ended() const { return ended_; }
  std::vector<std::shared_ptr<Process>>& slots() { return slots_; }
  void Die() { alive_ = false; }
  // Carries out what the job asked for. After every call into the job.
  void Drain();
  // A client's SCATTER is about to reach the job.
  void Mark(SlotIndex slot, UnitIndex unit, Step step, bool last,
            const std::vector<bool>& touched);
  void CheckWeights(Step step, bool resident) const;
  // What the optimizer counts behind `step`, before anything is restored for the next.
  void CheckProgress(Step step) const;

 private:
  struct Marks {
    Step step = 0;
    uint32_t round = 0;
    std::vector<bool> touched;
  };
  using Sums = std::vector<Gradient>;  // per fragment of a unit
  struct Aside {
    Sums sums;
    uint64_t bytes = 0;
    bool there = false;  // the copy is done
  };

  void Do(core::Complete& a);
  void Do(core::FailSlot& a);
  void Do(core::Send& a);
  void Do(core::Connect& a);
  void Do(core::StartAllGather& a);
  void Do(core::StartReduce& a);
  void Do(core::StartAccumulate& a);
  void Do(core::StartSetAside& a);
  void Do(core::DropAside& a);
  void Do(core::ComputeNorm& a);
  void Do(core::CommitBlobs& a);
  void Do(core::StartApply& a);
  void Do(core::StartMeasure& a);
  void Do(core::StartPut& a);
  void Do(core::StartRead& a);
  void Do(core::DropGradients& a);
  void Do(core::End& a);

  // Runs `what` after some work, unless the member is dead or the job over by then.
  void Later(std::function<void()> what);
  void EntryStarts(uint64_t seq);
  void EntryDone(uint64_t seq, bool ok);
  Sums NodeSum(UnitIndex unit, Step step, uint32_t round) const;
  Sums PerFragment(UnitIndex unit, Step step) const;
  // Per place of the unit.
  std::vector<Gradient> Final(UnitIndex unit, Step step) const;
  void PutGradient(const core::StartPut& a);
  void CheckPlan(const core::ApplyPlan& plan) const;
  void ApplyUnit(UnitIndex unit, const core::ApplyPlan& plan);
  std::vector<core::TensorSquares> MeasureUnit(UnitIndex unit, const core::ApplyPlan& plan);
  void CheckExhausted(const core::Complete& a) const;
  void CheckAside(const char* when) const;

  World* const world_;
  const Scenario& s_;
  const MemberIndex index_;
  bool alive_ = true;
  bool ended_ = false;
  std::unique_ptr<SimWindow> window_;
  std::unique_ptr<core::Job> job_;
  const core::Partition partition_;
  std::vector<std::shared_ptr<Process>> slots_;
  std::vector<std::vector<uint64_t>> weights_;  // [unit][cell], of the cells that it keeps
  std::vector<std::vector<uint64_t>> states_;   // likewise, of the optimizer
  std::vector<std::vector<Marks>> marks_;       // [slot][unit]
  std::vector<Sums> accumulators_;              // [unit]
  std::vector<Step> accumulated_step_;
  std::map<uint64_t, Aside> aside_;             // by number
  std::vector<Sums> reduced_;                   // [unit], several members
  std::vector<Step> reduced_step_;
  std::vector<Sums> set_;                       // [unit], one member: in place of all that came
  std::vector<Step> set_step_;
  uint64_t last_seq_ = 0;
  Step blobs_ = 0;
  bool draining_ = false;
};

}  // namespace zerod::sim
