// SPDX-License-Identifier: Apache-2.0
//
// A training process: runs its script against the daemon as client/cpp does (hold words, gradient
// memory, rings), and may die between any two of its doings.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/core/job.h"
#include "tests/sim/scenario.h"

namespace zerod::sim {

class World;

class Process : public std::enable_shared_from_this<Process> {
 public:
  enum class Hold : uint8_t { kNone, kClaiming, kHeld };
  // Gradients of one unit on their way, as client/cpp keeps them.
  struct UnitGradients {
    std::vector<Gradient> file;   // per_rank: per fragment
    std::vector<bool> touched;    // per fragment; node_sum: and not handed over
    bool landed = false;
    bool last = false;
    bool posted = false;
    bool unmarked = false;        // node_sum: some of it left without a mark
  };
  // What was handed over, for Truth: per scatter, in order.
  struct Handed {
    UnitIndex unit = 0;
    uint32_t part = 0;
    uint32_t round = 0;
    uint64_t scalars = 0;
    uint32_t micro_step = 0;
    uint32_t index = 0;  // in all that, of this part
    std::vector<Gradient> gradients;  // per fragment
  };

  Process(World* world, Rank rank, uint64_t incarnation);
  void Start() { TryAttach(); }
  void Die(const std::string& why);

  // --- The daemon's side.
  void Deliver(const core::Complete& complete);
  void DeliverFailure(const absl::Status& status);
  Step claim(UnitIndex u) const { return hold_words_[u]; }  // 0 none, else version + 1
  bool reaped() const { return reaped_; }
  const UnitGradients& gradients(UnitIndex u) const { return gradients_[u]; }
  const std::vector<Gradient>& staged(uint64_t offset) const { return staging_.at(offset); }
  std::vector<std::vector<uint64_t>>& transfer() { return transfer_; }
  // The unit that it asked for with this request.
  std::optional<UnitIndex> GatherOf(uint64_t cookie) const;

  // --- The checks' side.
  bool alive() const { return alive_; }
  bool done() const { return done_; }
  bool attached() const { return attached_; }
  bool failed() const { return failed_; }
  bool lost_daemon() const { return lost_daemon_; }
  bool Reads(UnitIndex u, bool resident) const {
    return alive_ && (holds_[u] == Hold::kHeld || (resident && reading_));
  }
  Rank rank() const { return rank_; }
  uint64_t incarnation() const { return incarnation_; }
  MemberIndex member() const { return member_; }
  SlotIndex slot() const { return slot_; }
  uint64_t generation() const { return generation_; }
  Step step() const { return step_; }
  bool step_sent() const { return step_sent_; }
  uint32_t attempt() const { return attempt_; }
  const std::vector<Handed>& handed() const { return handed_; }
  std::string Waiting() const;
  bool WaitsForDaemonAlone() const;
  void Resume() { Continue(); }
  // The peers of its collective are there, or one of them is gone.
  void CollectiveDone(bool ok);
  // Its daemon died.
  void LoseDaemon();

 private:
  struct Request {
    OpKind kind;
    UnitIndex unit = 0;
    uint64_t offset = 0;
    core::StateKind state = core::StateKind::kMaster;  // of PUT and READ
  };

  void TryAttach();
  void Hesitate();
  void Begin();
  void Exit(bool ok);
  void Continue();  // after some time, the next operation
  void Next();
  void Perform(const Op& op);
  void Gather(UnitIndex u);
  void Ask(UnitIndex u);
  void Held(UnitIndex u);
  void Unhold(UnitIndex u);
  void Land(const Op& op);
  void Scatter(const Op& op);
  void EndMicroStep();
  void ScatterRest();
  void WithRoom(std::function<bool()> post, std::function<void()> then);
  bool HandOver(UnitIndex u, bool last, bool mark);
  void PostFile(UnitIndex u);
  bool PostOpen(UnitIndex u, bool last, bool mark);
  bool PostWholeParts(UnitIndex u);
  bool PostPart(UnitIndex u, uint32_t part, bool last);
  std::vector<uint32_t> OpenParts(UnitIndex u, bool whole_parts) const;
  void SendStep();
  void EndStep();
  void OnAnswer(const Request& request, const core::Complete& complete);
  void OnStepAnswer(const core::Complete& complete);
  void BeginStep();
  void OnError(const Request& request, const absl::Status& status);
  void CheckCopy(UnitIndex u) const;
  void StartReading();
  void Put(UnitIndex u, core::StateKind state);
  void Read(const Op& op);
  void Restore(bool other);
  void PassOn();
  void CheckRead(const Request& request) const;
  void CheckProgress(const core::OptimizerProgress& progress) const;
  // Pushes a request into the ring; it reaches the job later, in order.
  uint64_t Post(Request request, std::function<void(core::Job&, uint64_t cookie)> call);
  void Hint(std::function<void(core::Job&)> call);
  void Reap(const std::string& why);
  uint64_t RingTime();

  World* const world_;
  const Scenario& s_;
  const Rank rank_;
  const MemberIndex member_;
  const SlotIndex slot_;
  const uint64_t incarnation_;
  bool alive_ = true;
  bool attached_ = false;
  bool reaped_ = false;
  bool failed_ = false;
  bool done_ = false;
  bool lost_daemon_ = false;
  bool exiting_ = false;
  bool in_collective_ = false;
  bool reading_ = false;   // looks at resident parameters
  bool overrun_ = false;   // past the job's last step
  uint64_t generation_ = 0;
  Step step_ = 0;
  double loss_scale_ = 1;  // of step_
  bool step_sent_ = false;
  uint32_t attempt_ = 0;
  std::vector<Op> program_;
  size_t next_ = 0;
  bool waiting_ = false;   // for the answer to the operation
  std::vector<Hold> holds_;
  std::vector<Step> hold_words_;
  std::vector<UnitIndex> trace_;
  std::vector<UnitGradients> gradients_;
  // Per unit, in order, per fragment; node_sum: what was not handed over yet.
  std::vector<std::vector<std::vector<Gradient>>> landings_;
  std::vector<Handed> handed_;
  std::vector<uint32_t> rounds_;   // per unit, marked in this step
  // Per unit and part of it, of scatters in this round since the last scalar or micro-step.
  std::vector<std::vector<uint32_t>> indices_;
  uint64_t scalars_ = 0;           // posted
  uint32_t micro_steps_ = 0;       // ended in this step
  std::map<uint64_t, std::vector<Gradient>> staging_;
  uint64_t next_offset_ = 0;
  std::vector<std::vector<uint64_t>> transfer_;  // per unit, values of its cells
  uint64_t next_cookie_ = 1;
  std::map<uint64_t, Request> outstanding_;
  uint64_t ring_free_ = 0;
  uint64_t answers_free_ = 0;
  uint64_t collectives_ = 0;
  uint64_t scatters_ = 0;          // node_sum: in flight
  std::function<void()> blocked_;  // node_sum: what waits for room in staging
  uint64_t attach_pause_ = 4;
  bool hesitated_ = false;
};

}  // namespace zerod::sim
