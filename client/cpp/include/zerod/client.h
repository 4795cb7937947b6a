// SPDX-License-Identifier: Apache-2.0
//
// libzerod_client: what a training process needs of its daemon, without PyTorch. The caller hands
// in a description of its model, gets an address for life for every parameter, and from then on
// gathers, scatters and steps through shared memory.
//
// Threads: a Client may be used from several threads; calls that wait release its lock. Forked
// children must not use it (they may read mapped parameters); their destructors do nothing.
// Waits end by the answer, the job's failure, the daemon's death (UNAVAILABLE), or `interrupt`
// returning true (CANCELLED), which is polled at least every 100 ms.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace zerod::client {

#define ZEROD_EXPORT __attribute__((visibility("default")))

enum class DType { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
// What a parameter group is updated by, for the life of the job; kSgd is the one without momentum.
enum class OptimizerKind {
  kAdam = 1,
  kLion = 2,
  kAdagrad = 3,
  kSgd = 4,
  kSgdMomentum = 5,
  kLamb = 6,
  kMuon = 7,  // of parameters of 2 or 4 dimensions
  kRmsProp = 8,  // without momentum, not centered
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

struct ModuleInfo {
  std::string path;
  std::string type;
  bool is_container = false;
  bool leaf = false;  // gathered as one, with all modules within; the caller applies leaf_module
};
struct ParameterInfo {
  std::string name;
  std::vector<int64_t> shape;
  bool trainable = true;
  uint32_t group = 0;
  std::vector<std::string> modules;
};

struct AttachOptions {
  std::string address;  // "unix:/path"; empty: ZEROD_ADDRESS, else the embedded daemon's
  bool embedded = true; // no address and no daemon there: local rank 0 starts a private one
  std::string job;
  uint32_t attempt = 0;
  uint32_t rank = 0;
  uint32_t world = 1;
  uint32_t local_rank = 0;
  uint32_t local_world = 1;
  uint32_t node_rank = 0;
  std::vector<std::string> peers;  // peer address of each node's daemon, by node rank
  std::string job_token;
  std::string config;  // JSON text
  std::vector<ModuleInfo> modules;
  std::vector<ParameterInfo> parameters;
  std::vector<OptimizerKind> groups;  // by ParameterInfo::group; empty: Adam for all
  DType dtype = DType::kFloat32;
  double attach_timeout_seconds = 60;  // for UNAVAILABLE and a predecessor that still ends
  double takeover_seconds = 10;        // how long a living predecessor of this rank is waited for
  std::function<bool()> interrupt;
  // Told, by the waiting thread, why it takes so long: when attaching after notice_seconds, later
  // after wait_notice_seconds, and again each time that as long as until then has passed. Kept as
  // long as the client; several threads may wait, and tell, at once.
  std::function<void(const std::string&)> on_wait;
  double notice_seconds = 5;
  double wait_notice_seconds = 60;
};

struct UnitView {
  std::string name;
  uint64_t elements = 0;
  uint64_t trainable_elements = 0;
  bool resident = false;
};
struct ParameterView {
  uint32_t unit = 0;
  uint64_t offset = 0;  // elements from the unit's start
  uint64_t elements = 0;
  const void* data = nullptr;  // its address for life, of the job's dtype; readable while held
};

// A parameter group's hyper-parameters of one step, in the words of torch.optim; its kind of
// optimizer reads those that it has.
struct Group {
  double lr = 0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum = 0;
  double dampening = 0;
  double lr_decay = 0;
  double initial_accumulator_value = 0;
  bool decoupled = true;  // Adam, NAdam, RAdam: AdamW's weight decay, else L2 regularization
  bool bias_correction = true;
  bool nesterov = false;
  double min_coeff = 0.01;  // LAMB
  double max_coeff = 10;    // LAMB
  bool eps_inside_sqrt = false;  // LAMB
  bool standard_newton_schulz = false;  // Muon
  bool centered = false;  // RMSprop: what its kind says
  double alpha = 0.99;    // RMSprop, ASGD
  double rho = 0.9;       // Adadelta
  double momentum_decay = 0.004;  // NAdam
  double eta_minus = 0.5;  // Rprop: its etas and step_sizes
  double eta_plus = 1.2;
  double step_min = 1e-6;
  double step_max = 50;
  double lambd = 1e-4;    // ASGD
  double t0 = 1e6;        // ASGD
  double lr_before = 0;   // ASGD: lr of the step before
};
struct StepRequest {
  double max_norm = 0;
  double loss_scale = 1;
  bool want_norm = false;
  std::vector<Group> groups;
  std::string blob;  // this client's own state, committed with the step
};
struct StepResult {
  bool skipped = false;
  double grad_norm = 0;   // NaN where not computed, infinite where skipped
  double loss_scale = 1;  // what the next step's loss is to be multiplied by
};
enum class ScalarOp { kSum, kMean, kMin, kMax };
// The master copy, and the first, second and third tensor of the optimizer's state.
// kGradient: the sum of all ranks' gradients of the step under way, as far as they were handed over
// for good and reduced (HandOver). STEP uses it up. It can be put where some rank landed one in
// this step: what is put of another parameter may count in the norm and is not applied.
enum class StateKind { kMaster, kExpAvg, kExpAvgSq, kThird, kGradient };

// Where the loss scale of an fp16 job stands, in the terms of DeepSpeed's DynamicLossScaler.
struct LossScalerState {
  double scale = 1;            // cur_scale
  uint64_t iterations = 0;     // cur_iter
  int64_t last_overflow = -1;  // last_overflow_iter; -1: none yet
  uint64_t hysteresis = 1;     // cur_hysteresis
};
struct OptimizerProgress {
  std::vector<uint64_t> parameter_steps;  // applied steps, in the order of the attach options
  std::optional<LossScalerState> loss_scaler;  // in fp16 alone
};

struct ClientCounters {
  uint64_t gathers = 0;          // calls
  uint64_t gather_hits = 0;      // answered by the unit's word, without a request
  uint64_t gather_waits = 0;
  double gather_wait_seconds = 0;
  uint64_t remaps = 0;           // mmap calls for chunks that moved
  uint64_t scatter_bytes = 0;    // landed
  double scatter_wait_seconds = 0;
  double step_wait_seconds = 0;
};

class ZEROD_EXPORT Client {
 public:
  static absl::StatusOr<std::unique_ptr<Client>> Attach(AttachOptions options);
  // Detaches as a death would be seen (state is kept) unless Detach() was called.
  virtual ~Client() = default;

  // --- Constant after Attach.
  virtual const std::vector<UnitView>& units() const = 0;
  virtual const std::vector<ParameterView>& parameters() const = 0;  // order of the options
  virtual uint64_t generation() const = 0;
  virtual uint64_t resumed_step() const = 0;  // committed when this client attached
  virtual bool resumed_skipped() const = 0;   // that step was a skipped one
  // What the next step's loss is to be multiplied by: 1 but in fp16.
  virtual double loss_scale() const = 0;
  virtual bool initialized() const = 0;  // the weights are there; else rank 0 must Put them
  virtual uint32_t members() const = 0;
  virtual uint32_t stage() const = 0;
  virtual DType dtype() const = 0;
  virtual const std::string& resolved_config() const = 0;  // JSON
  virtual const std::string& plan_text() const = 0;
  virtual bool guard_pages() const = 0;

  // The step this client computes: committed + 1.
  virtual uint64_t step() const = 0;

  // The unit may be read until Release, StepEnd or a new Gather of another step. A valid unit
  // costs two loads, a store and a fence; else one request. Idempotent while held.
  // RESOURCE_EXHAUSTED: held units leave no room, the message says which window would do.
  virtual absl::Status Gather(uint32_t unit) = 0;
  // True: the unit is held, no request was needed. False: nothing was done, call Gather. Never
  // waits; for callers who would first let go of a lock of their own.
  virtual bool TryGather(uint32_t unit) = 0;
  // The unit may be evicted; with guard pages a later read faults, and the fault is reported on
  // standard error with parameter, unit and step. Not held: nothing happens.
  virtual void Release(uint32_t unit) = 0;
  virtual void ReleaseAll() = 0;
  virtual bool Held(uint32_t unit) const = 0;

  // Adds a gradient of `parameter` (contiguous, all its elements) to what this client hands over
  // in this step: float32, or bfloat16 where `dtype` says so. Several calls add up, in order.
  // FAILED_PRECONDITION after the unit's last Scatter of this step: keep the gradient and call
  // again after Reclaim.
  virtual absl::Status Land(uint32_t parameter, const void* gradient, DType dtype) = 0;
  // True once Scatter(unit, last) was called in this step.
  virtual bool Scattered(uint32_t unit) const = 0;
  // What was landed since the last Scatter is handed over. `last`: nothing more comes for this
  // unit in this step (unless Reclaim is called). per_rank: a scatter that is not last costs
  // nothing.
  virtual absl::Status Scatter(uint32_t unit, bool last) = 0;
  // Scatter(unit, last) even where nothing was landed, so that no other rank waits for this one
  // before Step. What is landed afterwards needs a Reclaim. Returns the rounds of the unit that
  // this rank is through with in this step. Once every rank is through with as many (a rank that
  // is behind calls Reclaim and HandOver again), and after a Barrier, the unit's gradient can be
  // read on any.
  virtual absl::StatusOr<uint32_t> HandOver(uint32_t unit) = 0;
  // A backward pass is over. node_sum: what was landed in it and not scattered is handed over.
  // Gradients are added pass by pass, and no other rank waits any longer for more of this one.
  // per_rank: nothing happens.
  virtual absl::Status EndMicroStep() = 0;
  // After a last Scatter: waits until the unit may be landed again in this step. May wait for
  // other ranks: call it where all ranks come together (in step()).
  virtual absl::Status Reclaim(uint32_t unit) = 0;

  // Releases everything, hands over what is left, waits for the commit and for the resident units
  // of the new version. step() has grown when it returns OK.
  // FAILED_PRECONDITION: the ranks disagree; this step's gradients are dropped on all of them, its
  // number is not used up. CANCELLED: it is on its way; the next call waits for it again.
  virtual absl::StatusOr<StepResult> Step(const StepRequest& request) = 0;

  // Writes fp32 values into elements [begin, begin + count) of a unit, on all members: the master
  // copy (nobody may hold the unit), or a tensor of the optimizer's state (of trainable elements;
  // copies of the weights stay valid). Returns when all owners of this node have it; order against
  // other ranks' requests by Barrier. INVALID_ARGUMENT where the job has no such state.
  virtual absl::Status Put(uint32_t unit, uint64_t begin, const float* values, uint64_t count,
                           StateKind kind) = 0;
  // The state of elements [begin, begin + count) as fp32: the master copy, or a moment.
  virtual absl::Status Read(uint32_t unit, uint64_t begin, float* values, uint64_t count,
                            StateKind kind) = 0;

  // What the optimizer counts, as of the committed step and what was restored. Needs no other rank.
  virtual absl::StatusOr<OptimizerProgress> ReadProgress() = 0;
  // Sets it on all members at once: every rank calls it, with equal contents and between steps,
  // like AllReduce. Without a loss scaler that of the job stays as it is. loss_scale() is the
  // restored one when it returns OK. INVALID_ARGUMENT where the ranks differ (all hear of it), or
  // the values cannot be.
  virtual absl::Status Restore(const OptimizerProgress& progress) = 0;

  // Element-wise over all ranks of the job, in rank order; at most 64 values; none = a barrier.
  // All ranks must call it, the same number of times in the same order.
  virtual absl::StatusOr<std::vector<double>> AllReduce(const std::vector<double>& values,
                                                        ScalarOp op) = 0;
  absl::Status Barrier() { return AllReduce({}, ScalarOp::kSum).status(); }

  // The blob of the last committed step of this rank, as of Attach; empty before the first.
  virtual absl::StatusOr<std::string> ClientState() = 0;

  // Leaves of its own will: once all ranks have, the job and its state end.
  virtual absl::Status Detach() = 0;

  virtual ClientCounters counters() const = 0;
  // For messages and tests: the address range of all units.
  virtual const void* base() const = 0;
  virtual uint64_t reserved_bytes() const = 0;
  // Keeps the addresses reserved, and mapped as they are then, beyond the client's own life.
  virtual std::shared_ptr<const void> memory() const = 0;
};

// The directory and address that an embedded daemon of this user, job and node would have.
ZEROD_EXPORT std::string EmbeddedAddress(const std::string& job, uint32_t node_rank);

// Makes sure that a daemon answers at the address (starting the embedded one where `address` is
// empty and this is local rank 0) and returns its peer address ("host:port") for the launcher's
// store, with the boot id.
struct DaemonInfo {
  std::string address;
  std::string peer_address;
  std::string boot_id;
};
ZEROD_EXPORT absl::StatusOr<DaemonInfo> EnsureDaemon(const AttachOptions& options);

}  // namespace zerod::client
