// SPDX-License-Identifier: Apache-2.0
//
// What one schedule is about: the job, the machine's delays, the faults, and what each rank's
// training script does. A function of the seed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/core/job.h"
#include "daemon/core/layout.h"
#include "tests/sim/numbers.h"

namespace zerod::sim {

using core::MemberIndex;
using core::Rank;
using core::SlotIndex;
using core::Step;
using core::UnitIndex;

// The part of a parameter that one member owns: the unit of numeric state.
struct Cell {
  uint32_t parameter = 0;  // in the layout
  uint32_t place = 0;      // in Unit::parameters
  MemberIndex owner = 0;
  core::Range elements;
  bool trainable = true;
};

// The elements of a parameter that lie in one part of its unit (StagedPart): the unit of what is
// handed over. Under per_rank, and of a frozen parameter, all of them.
struct Fragment {
  uint32_t place = 0;  // in Unit::parameters
  uint32_t part = 0;
  uint64_t elements = 0;
  bool whole_part = false;  // of several: nothing else lies in this part
};

// Where in the life of a job a fault strikes.
enum class Moment : uint8_t {
  kEvent,      // any event of the simulation
  kAttach,     // a client has attached
  kReduce,     // a member starts a REDUCE_SCATTER
  kAccumulate, // a node sum grows
  kSetAside,   // a gradient leaves its client's staging before its turn
  kStepSent,   // a client sends STEP
  kNorm,       // a member starts NORM
  kCommit,     // a member starts COMMIT
  kMeasure,    // an owner starts the first pass of an optimizer by tensor
  kApply,      // an owner starts the optimizer on a unit
  kPut,
  kRestore,    // a client is told that the progress is restored
  kLeave,      // a client detaches
  kCount,
};

struct Fault {
  Moment moment = Moment::kEvent;
  uint64_t nth = 0;    // the nth of its kind, from 0
  bool member = false; // a member dies, else a client
  uint32_t who = 0;
  uint64_t delay = 0;
};

struct Scenario {
  uint64_t seed = 0;
  core::JobSpec spec;  // of member 0; Spec() is any member's
  std::vector<std::vector<Cell>> cells;  // per unit
  std::vector<std::vector<Fragment>> fragments;  // per unit, by place and part
  Step steps = 2;

  uint64_t ring_delay_max = 1;
  uint64_t link_delay_max = 1;
  uint64_t work_delay_max = 1;
  uint64_t client_delay_max = 1;
  uint64_t lease = 400;           // from a member's death to its links being down
  uint64_t staging_slots = 1000;  // node_sum: gradients that a client may have in flight
  uint64_t aside_refused_percent = 0;  // node_sum: of those that there is no memory for

  std::vector<Fault> faults;
  bool restart_together = true;  // torchrun; else each rank comes back by itself

  // What the training scripts do.
  bool divergent = false;     // ranks take different paths
  bool unequal = false;       // and different numbers of micro-steps
  bool late = false;          // gradients after a unit's last scatter
  bool pieces = false;        // several scatters of a unit in one micro-step
  bool collectives = false;   // of the script's own, outside zerod, while units are held
  bool barriers = false;      // SCALAR in the midst of a step
  bool evaluation = false;    // one rank gathers what the others do not
  bool puts = false;          // GatheredParameters between steps
  bool grads = false;         // a unit's gradient is read, and set, before STEP
  bool restores = false;      // a checkpoint's progress is restored between steps
  bool nonfinite = false;     // some gradients are
  bool refuse = false;        // ranks disagree about a step's hyper-parameters
  bool stall = false;         // one rank stops until nothing else can move
  bool overrun = false;       // one rank takes a step too many
  bool hesitates = false;     // ranks detach while others have not come, and attach again
  double max_norm = 0;

  static Scenario FromSeed(uint64_t seed);
  core::JobSpec Spec(MemberIndex m) const;
  const core::Layout& layout() const { return *spec.layout; }
  bool ByTensor(const Cell& cell) const {
    const core::Parameter& p = layout().parameters()[cell.parameter];
    return cell.trainable && core::ByTensor(layout().optimizer(p.group));
  }
  uint32_t world() const { return spec.world; }
  uint32_t Parts(UnitIndex u) const {
    return core::StagedParts(layout().units()[u], spec.staged_part_elements);
  }
  bool Keeps(MemberIndex m, const Cell& cell) const {
    return spec.stage == 0 || cell.owner == m;
  }
  // Per place of the unit, of what is there per fragment.
  std::vector<Gradient> JoinFragments(UnitIndex u, const std::vector<Gradient>& gradients) const;
  std::string Text() const;
};

// --- Training scripts --------------------------------------------------------------------------

enum class OpKind : uint8_t {
  kGather, kRelease, kCompute, kLand, kScatter, kMicroStep, kReclaim, kScalar, kCollective, kPut,
  kRead,
  kReadProgress,
  kRestore,
  kRestoreOther,  // the ranks restore different values: refused
  kQuiet,    // nobody reads parameters from here to kReading
  kReading,
  kStall, kStep, kDetach,
};

struct Op {
  OpKind kind = OpKind::kCompute;
  UnitIndex unit = 0;
  uint32_t micro_step = 0;  // kLand
  uint64_t places = 0;      // kLand: bit i = the unit's i-th parameter
  bool last = false;        // kScatter
  core::StateKind state = core::StateKind::kMaster;  // kPut, kRead
  bool mark = false;        // kScatter: the last even where there is nothing to hand over
};

// What `rank` does in `step`; `attempt` counts the step's refusals.
std::vector<Op> StepProgram(const Scenario& s, Rank rank, Step step, uint32_t attempt);
// After the last step.
std::vector<Op> FinalProgram(const Scenario& s, Rank rank);
// True where `rank` and the others disagree about the step's learning rate.
bool Disagrees(const Scenario& s, Rank rank, Step step, uint32_t attempt);
// True where no rank has a gradient for some trainable parameter in this attempt at the step.
bool LacksGradients(const Scenario& s, Step step, uint32_t attempt);
core::HyperParameters Hyper(const Scenario& s, Rank rank, Step step, uint32_t attempt);

// PUT of a step: rank 0 initialises everything in step 1, later steps write one unit at times, or
// its state where `state` says so.
struct PutOfStep {
  Rank rank = 0;
  std::vector<UnitIndex> units;
  core::StateKind state = core::StateKind::kMaster;
};
std::optional<PutOfStep> PutsOf(const Scenario& s, Step step);
// Between the last micro-step and STEP: all ranks hand `unit` over for good and may read its
// gradient, and where `set` says so `rank` sets it.
struct GradientOfStep {
  UnitIndex unit = 0;
  bool set = false;
  Rank rank = 0;
};
std::optional<GradientOfStep> GradientOf(const Scenario& s, Step step);
// What becomes of a fragment that some rank had a gradient for.
Gradient SetGradient(uint64_t value, size_t fragment);
uint64_t PutValue(const Scenario& s, Step step, UnitIndex unit, size_t cell);
// What all ranks restore before `step`.
std::optional<core::OptimizerProgress> RestoreOf(const Scenario& s, Step step);

}  // namespace zerod::sim
