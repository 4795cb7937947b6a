// SPDX-License-Identifier: Apache-2.0
//
// One schedule: virtual time, the links and the fabric between members, the launcher of the
// training processes, and the truth that everything is compared with.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/core/loss_scaler.h"
#include "tests/sim/scenario.h"

namespace zerod::sim {

class Member;
class Process;

// An invariant does not hold. Not caught inside the simulation.
struct Violation {
  std::string text;
};
[[noreturn]] void Violate(const std::string& text);

// What the weights are, by the training scripts alone.
class Truth {
 public:
  using Weights = std::vector<std::vector<uint64_t>>;  // [unit][cell]
  struct Outcome {
    bool skip = false;
    double grad_norm = 0;   // of gradients that were divided by their scale
    double loss_scale = 1;  // what this step's gradients came with
    double next_loss_scale = 1;
    std::vector<bool> touched;
    core::OptimizerProgress progress;  // behind it
  };

  explicit Truth(const Scenario* scenario);
  Step committed() const { return committed_; }
  // What a gather in `step` must see; `step` = committed() + 1 or that step itself.
  const Weights& Before(Step step) const { return before_.at(step); }
  // The optimizer's state then.
  const Weights& StateBefore(Step step) const { return state_before_.at(step); }
  // What the optimizer counts in `step`: restored, if it is to be, and not committed.
  const core::OptimizerProgress& Progress(Step step) const { return progress_before_.at(step); }
  // After step `step` and before any PUT of the next.
  const Weights& After(Step step) const { return after_.at(step); }
  const Outcome& outcome(Step step) const { return outcomes_.at(step); }
  // Some member has the COMMIT of `step`; `processes` (by rank) are those that took it.
  void Commit(Step step, const std::vector<std::shared_ptr<Process>>& processes);
  // Per place of the unit, of all that was handed over in the step under way; after it was `set` in
  // that step.
  std::vector<Gradient> Gradients(const std::vector<std::shared_ptr<Process>>& processes,
                                  UnitIndex unit, std::optional<Step> set) const;

 private:
  Gradient Sum(const std::vector<std::shared_ptr<Process>>& processes, UnitIndex unit,
               size_t fragment) const;
  void PrepareBefore(Step step);
  void CheckCommit(Step step, const std::vector<std::shared_ptr<Process>>& processes) const;
  void ApplyStep(const Outcome& outcome, const std::vector<Gradient>& gradients, Step step,
                 const core::OptimizerProgress& before, Weights* weights, Weights* states) const;

  const Scenario& s_;
  Step committed_ = 0;
  std::map<Step, core::OptimizerProgress> progress_before_;
  std::map<Step, core::OptimizerProgress> progress_after_;
  std::map<Step, Weights> before_;
  std::map<Step, Weights> after_;
  std::map<Step, Weights> state_before_;
  std::map<Step, Weights> state_after_;
  std::map<Step, Outcome> outcomes_;
};

class World {
 public:
  World(const Scenario& scenario, bool trace);
  ~World();
  // Throws Violation.
  void Run();

  const Scenario& scenario() const { return s_; }
  Truth& truth() { return truth_; }
  Random& random() { return random_; }
  uint64_t now() const { return now_; }
  uint64_t events() const { return events_; }
  void After(uint64_t delay, std::function<void()> what);
  uint64_t Delay(uint64_t max) { return 1 + random_.Below(max); }
  template <typename... Args>
  void Trace(const Args&... args) {
    if (trace_) Print(Concat(args...));
  }
  bool tracing() const { return trace_; }

  Member& member(MemberIndex m) { return *members_[m]; }
  std::vector<std::shared_ptr<Process>>& processes() { return processes_; }

  // --- Links.
  void Send(MemberIndex from, MemberIndex to, core::Message message);

  // --- The fabric: what started on all members moves.
  void StartExchange(uint64_t seq, MemberIndex m, uint64_t fingerprint,
                     std::function<void(bool ok)> done);
  // What travels with it.
  struct Wire {
    std::vector<uint64_t> values;                 // per cell of the unit
    std::vector<std::vector<Gradient>> node_sums;  // [member][place]
  };
  Wire& wire(uint64_t seq) { return wires_[seq]; }
  void StartConnect(MemberIndex m, std::function<void(bool ok)> done);

  // --- Faults and the launcher.
  void Happens(Moment moment);
  void OnExit(Process* process, bool ok);
  void KillMember(MemberIndex m);
  bool job_lost() const { return lost_; }
  // By rank; null where none is.
  std::vector<std::shared_ptr<Process>> Attached();
  // What a process of that generation reads as the gradient of the step under way, per cell.
  void CheckGradient(UnitIndex unit, uint64_t generation, const std::vector<uint64_t>& values);
  void Arrive(uint64_t generation, uint64_t ordinal, const std::shared_ptr<Process>& process);
  void Stall(const std::shared_ptr<Process>& process) { stalled_.push_back(process); }

 private:
  struct Event {
    uint64_t time;
    uint64_t order;
    std::function<void()> what;
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return a.time != b.time ? a.time > b.time : a.order > b.order;
    }
  };
  struct Exchange {
    uint64_t fingerprint = 0;
    std::map<MemberIndex, std::function<void(bool)>> started;
  };
  struct Collective {
    std::vector<std::shared_ptr<Process>> waiting;
  };

  template <typename... Args>
  static std::string Concat(const Args&... args);
  void Print(const std::string& line) const;
  void StartProcess(Rank rank);
  void Complete(Exchange* exchange);
  void FailCollectives();
  bool WakeStalled();
  void CheckStalled();
  void CheckEnd();
  std::string Stuck() const;

  const Scenario s_;
  const bool trace_;
  Random random_;
  Truth truth_;
  uint64_t now_ = 0;
  uint64_t order_ = 0;
  uint64_t events_ = 0;
  std::priority_queue<Event, std::vector<Event>, Later> queue_;
  std::vector<std::unique_ptr<Member>> members_;
  std::vector<std::shared_ptr<Process>> processes_;  // by rank
  std::map<std::pair<MemberIndex, MemberIndex>, uint64_t> link_free_;
  std::map<uint64_t, uint64_t> log_;  // seq -> fingerprint of the entry
  std::map<uint64_t, Exchange> exchanges_;
  std::map<uint64_t, Wire> wires_;
  Exchange connect_;
  std::vector<uint64_t> moments_;
  std::vector<bool> struck_;
  uint64_t restarts_ = 0;     // processes started
  uint64_t last_failed_ = 0;  // those up to this one must come again
  bool lost_ = false;  // a member died while the job needed it
  std::set<uint64_t> broken_;  // generations of which a process died
  std::map<std::pair<uint64_t, uint64_t>, Collective> collectives_;
  std::vector<std::shared_ptr<Process>> stalled_;
};

}  // namespace zerod::sim

#include "absl/strings/str_cat.h"

namespace zerod::sim {
template <typename... Args>
std::string World::Concat(const Args&... args) {
  return absl::StrCat(args...);
}
}  // namespace zerod::sim
