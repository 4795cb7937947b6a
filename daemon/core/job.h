// SPDX-License-Identifier: Apache-2.0
//
// One member's part of one job, as a state machine: events in (the On... methods), actions out
// (TakeActions), no threads, sockets, files or clocks. Everything between members goes through the
// log: member 0's Sequencer appends entries, every member starts them in order (docs/step.md,
// docs/architecture.md). Not thread-safe: one event loop drives it.
//
// Trust: slots, units, steps and counts in the client events come from shared memory that a
// client can write; every one is checked here and answered with a status. Messages come from
// authenticated members of the same version, but are checked all the same: one that makes no sense
// fails the job, never the process.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "daemon/core/layout.h"
#include "daemon/core/loss_scaler.h"
#include "daemon/core/types.h"
#include "daemon/core/window.h"

namespace zerod::core {

class Sequencer;

struct JobSpec {
  std::string id;
  std::shared_ptr<const Layout> layout;
  Hash128 config_hash;
  uint32_t world = 1;
  uint32_t members = 1;
  MemberIndex self = 0;
  uint32_t local_world = 1;       // clients of this node
  uint32_t stage = 0;
  bool node_sum = false;          // the gradient plan; false: per_rank
  uint64_t staged_part_elements = uint64_t{1} << 40;  // node_sum: JobPlan's
  bool sum_gradients = false;     // the ranks' gradients are added, else their mean is taken
  bool skip_nonfinite = false;
  std::optional<LossScaleSpec> loss_scale;  // nothing: clients say what they scaled by
  bool untouched_as_zero = false;  // zerod.unused_parameters = "zero"
  bool refuse_untouched = false;   // ignore_unused_parameters false: the step fails
  uint64_t prefetch_elements = 0;
  // What is being gathered at once, more waits at member 0: two units of a large model, one that
  // moves and one that follows it, or dozens of a small one, so that their turn-around hides.
  uint64_t in_flight_elements = 8 << 20;
  WindowSpec window;
};

// --- Actions: what the engine does, in this order --------------------------------------------

struct StepResult {
  double grad_norm = 0;
  bool skipped = false;
  double next_loss_scale = 1;
};
// Answers a request of a client. The optional fields are set where the request was one that asks
// for them.
struct Complete {
  SlotIndex slot = 0;
  uint64_t cookie = 0;
  absl::Status status;
  uint64_t result = 0;
  std::optional<ScalarValues> scalar;
  std::optional<StepResult> step;
  std::optional<double> loss_scale;           // RESTORE: of the next step
  std::optional<OptimizerProgress> progress;  // READ_PROGRESS
};
// Every request of this attachment, now and later, fails with `status`.
struct FailSlot {
  SlotIndex slot = 0;
  absl::Status status;
};
// Never to oneself.
struct Send {
  MemberIndex to = 0;
  Message message;
};
// Connect the fabric for this generation (the first only; the others keep it), then OnConnected.
struct Connect {
  uint64_t generation = 0;
};
// Members in `wants` receive the unit's shards of `version` into their windows (`receive`: this
// member is one), owners send. Then OnEntryDone.
struct StartAllGather {
  uint64_t seq = 0;
  UnitIndex unit = 0;
  MemberSet wants = 0;
  bool receive = false;
};
// Sum this node's gradients of `unit` (all clients that marked `round`) and give each owner its
// slice; the owner sums nodes in order into its gradient shard (round 1 writes, later ones add).
// With one member: nothing moves. Square norms of own blocks may be taken at once. Then
// OnEntryDone.
struct StartReduce {
  uint64_t seq = 0;
  UnitIndex unit = 0;
  Step step = 0;
  uint32_t round = 0;
};
// node_sum: add the gradient that lies at `staging_offset` of the slot's gradient file, or where
// `aside` is not 0 what was set aside under that number (nobody asks for it again), to the node's
// accumulator (`first`: write instead of add). Then OnAccumulateDone.
struct StartAccumulate {
  UnitIndex unit = 0;
  SlotIndex slot = 0;
  uint64_t cookie = 0;  // of the SCATTER; of no meaning where `aside` is not 0
  uint64_t staging_offset = 0;
  bool first = false;
  uint64_t aside = 0;
};
// node_sum: copy what was touched of the gradient at `staging_offset` of the slot's gradient file
// into memory of the daemon, `bytes`, under the number `aside`. Then OnSetAsideDone.
struct StartSetAside {
  UnitIndex unit = 0;
  SlotIndex slot = 0;
  uint64_t cookie = 0;  // of the SCATTER
  uint64_t staging_offset = 0;
  uint64_t aside = 0;
  uint64_t bytes = 0;
};
// What was set aside under this number is worth nothing.
struct DropAside {
  uint64_t aside = 0;
};
// Squares of the blocks of own shards, of every unit reduced in `step`; zero for the others. Then
// OnNormDone.
struct ComputeNorm {
  Step step = 0;
  bool needed = false;  // false: no squares are wanted, answer with touched bits alone
};
// The blobs that came with STEP `step` are now the committed ones.
struct CommitBlobs {
  Step step = 0;
};
// One unit of COMMIT: optimizer on what this member keeps of it, 16-bit copies, and where the
// unit's copy is the window itself (valid_after_apply), that. Then OnApplyDone.
struct StartApply {
  UnitIndex unit = 0;
  std::shared_ptr<const ApplyPlan> plan;
};
// The first pass of a step over one unit with tensors that are updated as a whole: their moments on
// what this member keeps, and the squares of Layout::TensorPieces of its own shard. Then
// OnMeasured; StartApply follows when the squares of all members are there.
struct StartMeasure {
  UnitIndex unit = 0;
  std::shared_ptr<const ApplyPlan> plan;  // without squares
};
// The origin's client has the values in its transfer area; each member that keeps some of them
// (owners; of weights every member for a resident unit) stores them. Then OnEntryDone.
struct StartPut {
  uint64_t seq = 0;
  UnitIndex unit = 0;
  MemberIndex origin = 0;
  SlotIndex slot = 0;
  uint64_t begin = 0;
  uint64_t count = 0;
  StateKind kind = StateKind::kMaster;
};
// Owners send their part; the origin puts it into its client's transfer area. Then OnEntryDone.
struct StartRead {
  uint64_t seq = 0;
  UnitIndex unit = 0;
  MemberIndex origin = 0;
  SlotIndex slot = 0;
  uint64_t begin = 0;
  uint64_t count = 0;
  StateKind kind = StateKind::kMaster;
};
// The gradients of the step under way are worth nothing: forget marks, sums, pending blobs and all
// that was set aside.
struct DropGradients {};
// The job is over on this member: OK = every client left; else it failed. No action follows.
struct End {
  absl::Status status;
};
using Action =
    std::variant<Complete, FailSlot, Send, Connect, StartAllGather, StartReduce, StartAccumulate,
                 StartSetAside, DropAside, ComputeNorm, CommitBlobs, StartApply, StartMeasure,
                 StartPut, StartRead, DropGradients, End>;

// node_sum: how much is set aside at most for each local rank, a gradient with each parameter by
// itself, in whole pages and parts.
uint64_t AsideBytesMax(const Layout& layout, uint64_t part_elements);

enum class JobState : uint8_t { kForming, kRunning, kFailed, kEnded };

class Job {
 public:
  // `window` outlives the job.
  Job(JobSpec spec, WindowPort* window);
  ~Job();

  // --- Clients of this node. `slot` < local_world; slot == local rank.
  // A client joins the forming generation. UNAVAILABLE: not now, ask again; ALREADY_EXISTS: the
  // slot's client lives; FAILED_PRECONDITION: the job has failed.
  absl::Status OnAttach(SlotIndex slot, Rank rank);
  // Its process is gone, or broke the ring's rules (`reason` says). Unknown slots are ignored.
  void OnClientGone(SlotIndex slot, const std::string& reason);
  void OnGather(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step);
  void OnRelease(SlotIndex slot, UnitIndex unit);
  // `touched`: per parameter of the unit (Unit::parameters order), what this scatter carries, all
  // of it or under node_sum what lies in this part of the unit.
  void OnScatter(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step, bool last,
                 uint64_t staging_offset, const std::vector<bool>& touched, uint32_t part = 0);
  // A backward pass of this client is over: what it scatters from here on is of the next one.
  void OnMicroStep(SlotIndex slot, Step step);
  // node_sum: the client has no room in its staging: it waits for the answer to any scatter.
  void OnMakeRoom(SlotIndex slot);
  void OnReclaim(SlotIndex slot, uint64_t cookie, UnitIndex unit, Step step);
  // `trace`: the units this client gathered in this step, in order (checked here).
  void OnStep(SlotIndex slot, uint64_t cookie, Step step, const HyperParameters& hyper,
              const std::vector<UnitIndex>& trace);
  // Copies of the weights stay valid where it is another kind of state that is written.
  void OnPut(SlotIndex slot, uint64_t cookie, UnitIndex unit, uint64_t begin, uint64_t count,
             StateKind kind);
  void OnRead(SlotIndex slot, uint64_t cookie, UnitIndex unit, uint64_t begin, uint64_t count,
              StateKind kind);
  void OnScalar(SlotIndex slot, uint64_t cookie, const ScalarValues& values);
  // The answer has the progress as of what this member has started of the log.
  void OnReadProgress(SlotIndex slot, uint64_t cookie);
  // Every client's, with equal contents, between steps.
  void OnRestore(SlotIndex slot, uint64_t cookie, const OptimizerProgress& progress);
  void OnDetach(SlotIndex slot, uint64_t cookie);

  // --- Other members.
  void OnMessage(MemberIndex from, const Message& message);
  void OnMemberDown(MemberIndex member, const absl::Status& why);

  // --- The engine's answers.
  void OnConnected(const absl::Status& status);
  void OnEntryDone(uint64_t seq, const absl::Status& status);
  void OnAccumulateDone(UnitIndex unit, SlotIndex slot);
  // `done` false: there was no memory for it; it lies where it lay.
  void OnSetAsideDone(UnitIndex unit, uint64_t aside, bool done);
  void OnNormDone(Step step, NormPart part);
  // `squares`: of the pieces of this member's shard of the unit, in order.
  void OnMeasured(UnitIndex unit, Step step, std::vector<TensorSquares> squares);
  void OnApplyDone(UnitIndex unit, Step step);
  // Ends the job everywhere (an operator, a drain, a fabric that broke). `discard`: its state is
  // given up on purpose, so its id may be used again.
  void OnFail(const absl::Status& status, bool discard = false);

  // The actions since the last call, oldest first.
  std::vector<Action> TakeActions();

  JobState state() const { return state_; }
  const absl::Status& failure() const { return failure_; }
  // Failed with a committed state that somebody may come back for.
  bool lost() const { return state_ == JobState::kFailed && committed_ > 0 && !discarded_; }
  uint64_t generation() const { return generation_; }
  Step committed() const { return committed_; }
  uint64_t applied() const { return applied_; }
  // Of the committed step; before the first only `next_loss_scale` has a meaning.
  const StepResult& last_step() const { return step_result_; }
  const OptimizerProgress& progress() const { return progress_; }
  const JobSpec& spec() const { return spec_; }
  // True where the unit's copy is written by the optimizer itself: one member, or stage 0.
  bool ValidAfterApply(UnitIndex u) const;
  // The round that the slot's next SCATTER of `unit` belongs to; asked before OnScatter.
  uint32_t NextRound(SlotIndex slot, UnitIndex unit) const;
  // Who has not come, while forming; while running, which ranks wait for which others and for what.
  // For status pages; may be empty.
  std::string WaitingFor() const;
  // node_sum: it waits for room in its staging.
  bool WantsRoom(SlotIndex slot) const { return slots_[slot].wants_room; }

 private:
  enum class SlotState : uint8_t { kEmpty, kAttached, kZombie, kDead, kLeft };
  struct Slot {
    SlotState state = SlotState::kEmpty;
    Rank rank = 0;
    bool stepped = false;
    uint64_t step_cookie = 0;
    HyperParameters hyper;
    uint64_t scalars = 0;          // posted in this generation
    std::vector<uint8_t> marks;    // per unit: rounds closed in this step, by SCATTER or RECLAIM
    std::vector<bool> unmarked;    // per unit: scattered since the last mark
    // node_sum. Where the next scatter belongs: (scalars, micro_steps, indices[unit][part]) of
    // round marks + 1.
    uint64_t micro_steps = 0;        // ended in this step
    // Per unit and part of it: scatters in this round since the last scalar or micro-step.
    std::vector<std::vector<uint32_t>> indices;
    bool wants_room = false;         // waits for the answer to any of its scatters
    bool room_refused = false;       // there was no memory, and nothing has changed since
    size_t cursor = 0;             // where in the forecast it was last seen
  };
  struct Waiter {
    SlotIndex slot = 0;
    uint64_t cookie = 0;
  };
  struct ScalarWait {
    uint64_t ordinal = 0;
    bool reported = false;
    std::vector<std::optional<ScalarValues>> values;  // per slot
    std::vector<Waiter> waiters;
    OptimizerProgress restore;  // member 0: of the last RESTORE among the values
  };
  struct Staged {  // node_sum: a gradient that is not in the accumulator yet
    SlotIndex slot = 0;
    uint64_t cookie = 0;  // 0: answered, since it was set aside
    uint64_t offset = 0;  // in the client's staging
    uint32_t round = 0;
    uint64_t scalars = 0;
    uint64_t micro_step = 0;
    uint32_t part = 0;    // of the unit
    uint32_t index = 0;   // in all that, of this part
    uint64_t bytes = 0;   // of what was touched, in whole pages
    uint64_t order = 0;   // of coming, among all of this member
    uint64_t aside = 0;   // not 0: set aside under this number, or on its way there
    bool moving = false;  // on its way there
    auto Key() const { return std::make_tuple(round, scalars, micro_step, index, slot, part); }
  };
  struct GradientRequest {  // PUT or READ of it
    Waiter waiter;
    StateRequest request;
  };
  struct UnitState {
    std::vector<Waiter> waiters;   // gathers not yet answered
    Step applied = 0;              // version of what this member owns
    bool applying = false;         // from COMMIT on
    bool by_tensor = false;        // it waits for TENSOR_NORMS
    std::vector<TensorSquares> squares;  // of its first pass
    bool forecast = false;         // the copy on its way was not asked for by a client
    uint32_t exchanges = 0;        // gathers, puts and reads in flight
    bool writing = false;          // a PUT is among them
    uint32_t gradient_exchanges = 0;  // those of the gradient among them
    uint32_t reducing = 0;         // reduces in flight
    uint32_t reduced_round = 0;    // last completed in this step
    uint32_t reported_round = 0;
    std::vector<Waiter> reclaims;
    std::vector<GradientRequest> gradient_requests;  // until what their slots gave is reduced
    std::vector<Staged> staged;    // node_sum, by key; the first may be on its way
    bool accumulating = false;
    bool accumulated = false;      // something is in the accumulator
    std::vector<bool> touched;     // of this step, per parameter of the unit
  };

  // Requests (job_clients.cc, job_gradients.cc).
  bool Attached(SlotIndex slot) const;
  absl::Status CheckUnitAndStep(UnitIndex unit, Step step) const;
  absl::Status CheckRange(UnitIndex unit, uint64_t begin, uint64_t count) const;
  absl::Status CheckState(UnitIndex unit, uint64_t begin, uint64_t count, StateKind kind,
                          bool put) const;
  void OnPutOrRead(Waiter waiter, const StateRequest& request);
  absl::Status CheckRestore(const OptimizerProgress& progress) const;
  absl::Status MissingRank() const;
  static absl::Status GradientBehindStep();
  std::string WaitingForStart() const;
  std::string WaitingForStep() const;
  std::string WaitingForScalar() const;
  std::string WaitingForRoom() const;
  std::string WaitingForReduce() const;
  std::string MissingNodes(const std::function<bool(MemberIndex)>& has) const;
  ScalarWait& PostScalar(Waiter waiter, const ScalarValues& values);
  void ForgetScalars(SlotIndex slot);
  void Answer(Waiter waiter, absl::Status status, uint64_t result = 0);
  void AnswerAll(std::vector<Waiter>* waiters, const absl::Status& status, uint64_t result = 0);
  void MaybeReportGradients(UnitIndex unit);
  void MaybeReportStep();
  void MaybeReportScalars();
  void AnswerReclaims(UnitIndex unit);
  void TellGradientRequests(UnitIndex unit);
  void AnswerGradientRequests(UnitState* u, const absl::Status& status,
                              std::optional<SlotIndex> slot = std::nullopt);
  void CloseRounds(SlotIndex slot, uint32_t rounds);
  void PassOn(Slot* slot);
  void PumpStaging(UnitIndex unit);
  void PumpRoom();
  void TryRoom();
  Staged* OldestInStaging(SlotIndex slot, UnitIndex* unit);
  uint64_t AsideMax(const Slot& slot) const;
  void ForgetStaged(UnitState* u, const absl::Status& why);
  uint64_t TouchedBytes(UnitIndex unit, uint32_t part, const std::vector<bool>& touched) const;
  bool Passed(SlotIndex slot, UnitIndex unit, const Staged& s) const;
  bool Ready(UnitIndex unit, const Staged& s) const;
  bool FirstOfItsPart(UnitIndex unit, const Staged& s) const;
  bool Waits(UnitIndex unit, const Staged& s) const;
  void SetForecast(const std::vector<UnitIndex>& trace);
  void Saw(SlotIndex slot, UnitIndex unit);
  uint64_t NextUse(UnitIndex unit) const;

  // Room and copies (job_clients.cc).
  void RequestCopy(UnitIndex unit, bool first = false);
  void RetryRoom();
  void Forecast();
  void PublishCopy(UnitIndex unit, Step version);

  // The log (job_log.cc).
  absl::Status AppendEntries(const std::vector<Entry>& entries);
  void Advance();
  bool GradientFree(const Entry& e) const;
  bool CanStart(const Entry& e) const;
  void Start(const Entry& e);
  void StartFirst(const Entry& e);
  void StartGather(const Entry& e);
  void StartReduceScatter(const Entry& e);
  void StartCommit(const Entry& e);
  void ApplyCommitted(const Entry& e);
  void StartTensorNorms(const Entry& e);
  void StartGeneration(const Entry& e);
  void StartPutOrRead(const Entry& e);
  void StartScalar(const Entry& e);
  void StartRestore(const Entry& e);
  void StartLeave(const Entry& e);
  bool Names(const Entry& e) const;
  void FinishEntry(const Entry& e);
  void MaybeFinishStep();
  void ResetStep();

  // Members (job.cc).
  void Tell(ReportItem item);
  absl::Status Sequence(MemberIndex from, const Report& report);
  absl::Status Distribute(const std::vector<Entry>& entries);
  void Fail(const absl::Status& status, bool discard = false);
  void EndWith(const absl::Status& status);
  void Emit(Action action) { actions_.push_back(std::move(action)); }
  void Pump();

  const JobSpec spec_;
  Window window_;
  std::unique_ptr<Sequencer> sequencer_;  // member 0 only
  JobState state_ = JobState::kForming;
  absl::Status failure_;
  bool discarded_ = false;
  uint64_t generation_ = 1;
  bool connect_asked_ = false;
  bool connected_ = false;
  Step committed_ = 0;  // COMMIT started
  uint64_t applied_ = 0;
  OptimizerProgress progress_;
  std::vector<Slot> slots_;
  std::vector<UnitState> units_;
  std::deque<UnitIndex> room_queue_;  // demands that wait for a copy on its way, or each other
  std::vector<bool> left_;            // per rank of the world
  std::deque<Entry> log_;             // appended, not started
  uint64_t next_seq_ = 1;             // the next entry to be appended here
  absl::flat_hash_map<uint64_t, Entry> running_;  // started, not done
  absl::flat_hash_set<uint64_t> receiving_;         // all-gathers that fill a copy here
  absl::flat_hash_map<uint64_t, Waiter> exchange_waiters_;  // PUT and READ under way, by seq
  std::deque<Waiter> requests_;       // PUT and READ of this node, in the order told
  std::deque<ScalarWait> scalars_;
  uint64_t scatters_ = 0;       // node_sum: so far, for Staged::order
  uint64_t asides_ = 0;         // numbers given to what was set aside
  uint64_t aside_of_one_ = 0;   // AsideBytesMax
  uint64_t aside_bytes_ = 0;    // set aside now, or on its way there
  uint32_t setting_aside_ = 0;  // on their way there
  bool step_reported_ = false;
  bool norm_running_ = false;
  bool norm_started_ = false;     // of this step: every member has reported it
  uint32_t applying_ = 0;
  std::shared_ptr<const ApplyPlan> measured_plan_;  // from COMMIT to TENSOR_NORMS, if that comes
  uint32_t measuring_ = 0;        // units in their first pass
  bool finishing_step_ = false;   // COMMIT started, clients not yet answered
  StepResult step_result_;
  std::vector<UnitIndex> forecast_;                     // the order in which units will be needed
  std::vector<std::vector<size_t>> forecast_places_;    // per unit, ascending
  size_t forecast_next_ = 0;
  uint64_t forecast_elements_in_flight_ = 0;
  std::vector<ReportItem> outbox_;
  std::vector<Entry> unsent_;       // member 0: entries that some member has not been sent
  std::vector<uint64_t> sent_seq_;  // member 0: per member
  bool pumping_ = false;
  std::vector<Action> actions_;
};

}  // namespace zerod::core
