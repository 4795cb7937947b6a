// SPDX-License-Identifier: Apache-2.0
//
// The vocabulary of daemon/core: indices, the decision of a step, log entries, and the messages
// that members exchange. Plain values; the server turns them into bytes and back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "base/hash.h"

namespace zerod::core {

using UnitIndex = uint32_t;
using MemberIndex = uint32_t;
using SlotIndex = uint32_t;  // a client's place among the clients of its node
using Rank = uint32_t;
using Step = uint64_t;       // attempts of the optimizer, from 1; the version of weights = the
                             // step that wrote them, 0 = the initial ones
using MemberSet = uint64_t;  // bit m = member m

inline constexpr uint32_t kMembersMax = 64;
inline constexpr uint32_t kRoundsMax = 255;  // reductions of one unit in one step; shm::kRoundsMax

constexpr MemberSet AllMembers(uint32_t members) {
  return members >= 64 ? ~MemberSet{0} : (MemberSet{1} << members) - 1;
}

enum class StateKind : uint16_t {
  kMaster = 0,
  kExpAvg = 1,
  kExpAvgSq = 2,
  kThird = 3,     // of a centered RMSprop with momentum: it has three
  kGradient = 4,  // the sum of what was reduced in the step under way
};
enum class ScalarOp : uint16_t { kSum = 0, kMean = 1, kMin = 2, kMax = 3 };

// Where the loss scale of an fp16 job stands, in the terms of DeepSpeed's DynamicLossScaler.
struct LossScalerState {
  double scale = 1;           // cur_scale: what the next step's loss is to be multiplied by
  uint64_t iterations = 0;    // cur_iter: steps that were attempted
  int64_t last_overflow = -1;  // last_overflow_iter: the iteration that overflowed last, -1: none
  uint64_t hysteresis = 1;    // cur_hysteresis: overflows left to bear, and the one that halves
  friend bool operator==(const LossScalerState&, const LossScalerState&) = default;
};

// What the optimizer counts, the same on every member: with the weights and the state tensors all
// that a job's next step depends on.
struct OptimizerProgress {
  std::vector<uint64_t> parameter_steps;  // per parameter of the layout: applied steps
  std::optional<LossScalerState> loss_scaler;  // fp16 alone; RESTORE without it leaves it alone
  friend bool operator==(const OptimizerProgress&, const OptimizerProgress&) = default;
  Hash128 Hash() const;
};
// Counts beyond it are not taken: exact in a double, whoever computes with them.
inline constexpr uint64_t kCountMax = uint64_t{1} << 53;
// OK, or INVALID_ARGUMENT naming what cannot be. `fp16`: the job has a loss scale.
absl::Status CheckProgress(const OptimizerProgress& progress, size_t parameters, bool fp16);

// What is computed for a parameter group, fixed for the life of a job: it says how much state there
// is. Formulas: kernels/cpu/optimizers.h, adaptive.h and asgd_rprop.h.
enum class OptimizerKind : uint8_t {
  kAdam = 1,         // AdamW too: Group::decoupled
  kLion = 2,
  kAdagrad = 3,
  kSgd = 4,          // without momentum
  kSgdMomentum = 5,
  kLamb = 6,         // by tensor: kernels/cpu/lamb.h
  kMuon = 7,         // by matrix: kernels/cpu/muon.h
  kRmsProp = 8,      // without momentum, not centered
  kRmsPropMomentum = 9,
  kRmsPropCentered = 10,
  kRmsPropCenteredMomentum = 11,
  kAdadelta = 12,
  kAdamax = 13,
  kNAdam = 14,
  kRAdam = 15,
  kAsgd = 16,
  kRprop = 17,
};
inline constexpr OptimizerKind kOptimizerKindLast = OptimizerKind::kRprop;
// True where a step of one element depends on norms of its whole tensor: such a step is taken in
// two passes, with TENSOR_NORMS between them.
constexpr bool ByTensor(OptimizerKind kind) { return kind == OptimizerKind::kLamb; }
// True where it depends on all elements of its matrix, and not by sums: then no shard cuts one.
constexpr bool ByMatrix(OptimizerKind kind) { return kind == OptimizerKind::kMuon; }
// What an RMSprop was begun with.
constexpr bool HasMomentum(OptimizerKind kind) {
  return kind == OptimizerKind::kRmsPropMomentum || kind == OptimizerKind::kRmsPropCenteredMomentum;
}
constexpr bool IsCentered(OptimizerKind kind) {
  return kind == OptimizerKind::kRmsPropCentered || kind == OptimizerKind::kRmsPropCenteredMomentum;
}
// fp32 tensors of state beside the master copy, StateKind::kExpAvg first.
inline constexpr uint32_t kStateTensorsMax = 3;
constexpr uint32_t StateTensors(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kSgd:
      return 0;
    case OptimizerKind::kLion:
    case OptimizerKind::kAdagrad:
    case OptimizerKind::kSgdMomentum:
    case OptimizerKind::kMuon:
    case OptimizerKind::kRmsProp:
    case OptimizerKind::kAsgd:
      return 1;
    case OptimizerKind::kAdam:
    case OptimizerKind::kLamb:
    case OptimizerKind::kRmsPropMomentum:
    case OptimizerKind::kRmsPropCentered:
    case OptimizerKind::kAdadelta:
    case OptimizerKind::kAdamax:
    case OptimizerKind::kNAdam:
    case OptimizerKind::kRAdam:
    case OptimizerKind::kRprop:
      return 2;
    case OptimizerKind::kRmsPropCenteredMomentum:
      return 3;
  }
  return 0;
}

// A parameter group's hyper-parameters in one step. Each kind reads its own.
struct Group {
  double lr = 0;
  double beta1 = 0;         // Adam, Lion, LAMB, Adamax, NAdam, RAdam
  double beta2 = 0;         // the same
  double eps = 0;           // the same but Lion, Adagrad, RMSprop, Adadelta
  double weight_decay = 0;  // all but Rprop
  double momentum = 0;      // kSgdMomentum, Muon, RMSprop
  double dampening = 0;     // kSgdMomentum
  double lr_decay = 0;      // Adagrad
  double initial_accumulator_value = 0;  // Adagrad
  bool decoupled = true;        // Adam, NAdam, RAdam: AdamW's weight decay
  bool bias_correction = true;  // Adam, LAMB
  bool nesterov = false;        // kSgdMomentum, Muon
  double min_coeff = 0.01;      // LAMB: bounds of the trust ratio
  double max_coeff = 10;
  bool eps_inside_sqrt = false;  // LAMB
  bool standard_newton_schulz = false;  // Muon: not by the Gram matrix
  bool centered = false;          // RMSprop: what its kind says
  double alpha = 0.99;            // RMSprop: of the average of squares; ASGD: of the rate's decay
  double rho = 0.9;               // Adadelta
  double momentum_decay = 0.004;  // NAdam
  double eta_minus = 0.5;         // Rprop
  double eta_plus = 1.2;
  double step_min = 1e-6;
  double step_max = 50;
  double lambd = 1e-4;            // ASGD
  double t0 = 1e6;
  double lr_before = 0;           // lr of the step before
  friend bool operator==(const Group&, const Group&) = default;
};
// OK, or INVALID_ARGUMENT naming what `kind` cannot compute with.
absl::Status CheckGroup(OptimizerKind kind, const Group& group);

// What a client says with STEP. Members compare it; the values used are those of the COMMIT.
struct HyperParameters {
  double max_norm = 0;  // <= 0: no clipping
  double loss_scale = 1;
  bool want_norm = false;
  std::vector<Group> groups;
  // Of what all ranks must agree on: everything but want_norm.
  Hash128 Hash() const;
};

// The outcome of NORM k: a pure function of the reduced gradients and the hyper-parameters.
struct Decision {
  enum class Kind : uint8_t {
    kApply = 0,
    kSkip = 1,    // non-finite gradients: weights stay, the step counts as attempted
    kRefuse = 2,  // the ranks disagree: the step fails with `reason`, its number is not used up
  };
  Kind kind = Kind::kApply;
  double grad_norm = 0;   // of the mean gradient (JobSpec::sum_gradients: the sum), unscaled; NaN
                          // where nobody asked, infinite with kSkip
  double grad_scale = 1;  // what each summed gradient element is multiplied by
  double next_loss_scale = 1;  // what the next step's loss is to be multiplied by
  LossScalerState loss_scaler;  // fp16: as this step leaves it
  HyperParameters hyper;
  std::vector<bool> touched;  // per parameter: some rank had a gradient
  std::string reason;
};

// Sums of squares over elements of one tensor: of its weights before the step, and of the update
// before it is scaled.
struct TensorSquares {
  double weight = 0;
  double update = 0;
  friend bool operator==(const TensorSquares&, const TensorSquares&) = default;
};

// What an owner needs to apply a step: the decision, and each parameter's own count of applied
// steps including this one (an untouched parameter's does not advance).
struct ApplyPlan {
  Step step = 0;
  Decision decision;
  std::vector<uint64_t> parameter_steps;
  std::vector<TensorSquares> squares;  // per parameter, where some are updated by tensor
};

// One member's part of NORM k.
struct NormPart {
  std::vector<double> block_squares;  // of the blocks of its shards, in layout order
  std::vector<bool> touched;          // per parameter, over its clients
  bool nonfinite = false;
};

struct ScalarValues {
  ScalarOp op = ScalarOp::kSum;
  std::vector<double> values;  // empty: a barrier
  // It is no SCALAR but a RESTORE, which takes its place among them: of what is restored.
  std::optional<Hash128> restore;
  friend bool operator==(const ScalarValues&, const ScalarValues&) = default;
};

// --- The log ---------------------------------------------------------------------------------

enum class EntryKind : uint8_t {
  kStart = 1,      // all members and ranks are there: the generation runs
  kPut = 2,
  kAllGather = 3,
  kReduceScatter = 4,
  kNorm = 5,
  kCommit = 6,
  kRead = 7,
  kScalar = 8,
  kLeave = 9,      // `rank` detached of its own will
  kGeneration = 10,  // `rank` died: everything before this is finished, then clients attach anew
  kRestore = 11,   // the optimizer's counts and the loss scale are set
  kTensorNorms = 12,  // directly behind a COMMIT with tensors that are updated as a whole
};
inline constexpr EntryKind kEntryKindLast = EntryKind::kTensorNorms;

struct Entry {
  uint64_t seq = 0;  // from 1, without gaps, for the life of the job; also the fabric's tag
  uint64_t generation = 0;
  EntryKind kind = EntryKind::kStart;
  UnitIndex unit = 0;
  Step step = 0;         // kAllGather: the version; of a step's entries: the step
  uint32_t round = 0;    // kReduceScatter: 1, 2, ... within the step
  MemberSet wants = 0;   // kAllGather
  MemberIndex origin = 0;  // kPut, kRead: whose client
  SlotIndex slot = 0;      // kPut, kRead: which of its clients
  uint64_t begin = 0;    // kPut, kRead: first element of the unit
  uint64_t count = 0;
  StateKind state_kind = StateKind::kMaster;  // kPut, kRead
  uint64_t ordinal = 0;  // kScalar, kRestore: the n-th of the generation, from 1
  ScalarValues scalar;   // kScalar: the result
  Rank rank = 0;         // kLeave, kGeneration
  std::string reason;    // kGeneration: how the rank died; kScalar: not empty = it failed
  bool norm_needed = false;  // kNorm: somebody clips, asks, or skips by it
  Decision decision;     // kCommit
  OptimizerProgress restore;  // kRestore
  std::vector<TensorSquares> squares;  // kTensorNorms: per parameter; zeros where not wanted
};

// --- Messages --------------------------------------------------------------------------------

// To member 0, in batches (a Report). Each is one thing that happened on the sender's node.
struct Joined {  // first of all
  Hash128 layout;
  Hash128 config;
  uint32_t world = 0;
  uint32_t members = 0;
};
struct ClientAttached {
  Rank rank = 0;
};
struct ClientGone {
  Rank rank = 0;
  bool left = false;  // of its own will
  std::string reason;
};
struct Want {
  UnitIndex unit = 0;
  Step version = 0;
  bool demand = false;  // a client waits for it; else it is expected to be needed
  bool again = false;   // it was asked for as expected, and now a client waits for it
};
struct Forecasted {  // the sender has asked for what it expects to need of `version` first
  Step version = 0;
};
struct GradientsReady {  // every client of the sender marked `round` of `unit`, or sent STEP
  UnitIndex unit = 0;
  Step step = 0;
  uint32_t round = 0;
};
struct StepReady {  // every client of the sender sent STEP; nothing of this step follows
  Step step = 0;
  bool agree = true;  // its own clients agree
  std::string disagreement;
  HyperParameters hyper;
  std::vector<Rank> ranks;
};
struct NormReady {
  Step step = 0;
  NormPart part;
};
struct TensorsMeasured {  // the first pass of a step is done here
  Step step = 0;
  std::vector<TensorSquares> squares;  // of TensorPieces of the sender's shards, in layout order
};
struct StateRequest {  // a client's PUT or READ of some elements of a unit
  bool put = false;
  SlotIndex slot = 0;
  UnitIndex unit = 0;
  uint64_t begin = 0;
  uint64_t count = 0;
  StateKind kind = StateKind::kMaster;
};
struct ScalarReady {  // every client of the sender posted its `ordinal`-th SCALAR or RESTORE
  uint64_t ordinal = 0;
  std::vector<Rank> ranks;            // parallel to values
  std::vector<ScalarValues> values;
  OptimizerProgress restore;          // where it is a RESTORE, from member 0 alone
};
struct Failed {  // the sender cannot go on: the job ends everywhere
  absl::Status status;
  bool discard = false;  // its state is given up on purpose
};
using ReportItem = std::variant<Joined, ClientAttached, ClientGone, Want, GradientsReady, StepReady,
                                NormReady, StateRequest, ScalarReady, Failed, Forecasted,
                                TensorsMeasured>;

struct Report {
  uint64_t generation = 0;  // 0 with Joined only
  std::vector<ReportItem> items;
};

// From member 0 to all.
struct Append {
  std::vector<Entry> entries;
};
struct FailJob {
  absl::Status status;
  bool discard = false;
};

using Message = std::variant<Report, Append, FailJob>;

}  // namespace zerod::core
