// SPDX-License-Identifier: Apache-2.0
//
// What a job will take on one member, before a byte is reserved: window, gradients, state. The
// engine allocates exactly this and the metrics report it under the same names.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/config.h"
#include "daemon/core/layout.h"
#include "daemon/core/window.h"

namespace zerod::core {

// Bytes on one member. "Full" below means all units, "shard" this member's part.
//   parameters  fp32 values: stage 0-2 in fp32 the full window copy (which is the master copy),
//               else the fp32 master: full at stage 0, shard at 1-3, in 16-bit jobs of what is
//               trained only (MasterRange)
//   copies      16-bit jobs: stage 0-2 the full window copy; stage 3 what CopyRange says
//   gradients   reduced gradients: full at stages 0 and 1, shard at 2 and 3; none with one member
//               (the optimizer reads the clients' gradients, or the accumulator)
//   moments     state_bytes for each element of Layout::state_tensors (Adam: exp_avg, exp_avg_sq):
//               full at stage 0, shard at 1-3
//   window      stage 3: chunks of gathered copies. With one member and room for all of them in
//               fp32 the window is the master copy: counted as parameters
//   accumulator node_sum: the node's sum of its clients' gradients
//   client_gradients  all clients' gradient files
//   staging     buffers of pieces in flight between members
//   scratch     for what is updated by matrix: of the largest that this member keeps, and of
//               kMatricesAtOnce of them
//   set_aside   node_sum: gradients that left their clients' staging before their turn. Taken at
//               need and given back with the step, one for each local rank at most: not part of
//               the plan
//   control     rings, tables, transfer areas
struct MemoryPlan {
  uint64_t parameters = 0;
  uint64_t copies = 0;
  uint64_t gradients = 0;
  uint64_t moments = 0;
  uint64_t window = 0;
  uint64_t accumulator = 0;
  uint64_t client_gradients = 0;
  uint64_t staging = 0;
  uint64_t scratch = 0;
  uint64_t set_aside = 0;
  uint64_t control = 0;
  uint64_t total() const;
  std::vector<std::pair<std::string, uint64_t>> Named() const;
};

// What is kept of what is trained. In an fp32 job: this.
struct StateForm {
  bool masters = true;       // fp32 master weights; false: the 16-bit copies are what is updated
  uint32_t state_bytes = 4;  // of each element of the optimizer's state; 2: in the layout's type
};
StateForm FormOf(const Config& config, DType dtype);

struct JobPlan {
  WindowSpec window;
  bool master_in_window = false;  // fp32 and every unit has a full, up-to-date copy in the window:
                                  // stages 0-2, or one member where everything fits
  StateForm form;
  bool node_sum = false;
  uint64_t gradient_file_bytes = 0;         // each client's
  std::vector<uint64_t> gradient_offsets;   // per unit, per_rank plan, bytes
  uint64_t staging_bytes = 0;               // node_sum: of each gradient file
  uint64_t staged_part_elements = 0;        // node_sum
  uint64_t transfer_values_bytes = 0;       // the values area of each transfer file
  uint64_t transfer_bytes = 0;
  // Of all clients' own state at most, on the heap as it comes: that of the step being decided, and
  // the committed one. Not part of `memory`, which is reserved at once.
  uint64_t client_states_bytes_max = 0;
  uint64_t client_bytes = 0;                // of a client's files, gradients and transfers included
  // What is moved between members is cut into pieces of this many elements of each member's part.
  uint64_t gather_piece_elements = 0;
  uint64_t reduce_piece_elements = 0;
  uint32_t matrices_at_once = 0;         // updated by matrix, at a time; each has its own
  uint64_t matrix_scratch_elements = 0;  // floats of scratch, on a page boundary
  // Member 0 begins no further gather while so many elements are being gathered.
  uint64_t in_flight_elements = 0;
  MemoryPlan memory;
  std::string text;  // for the log and AttachResponse.plan_text
};

inline constexpr uint64_t kTransferValuesBytes = 4 << 20;
// Of a client's rings and its trace: proto/shm/format.h's sizes, which tests/core compares.
inline constexpr uint64_t kRingBytes = 92 << 10;
// node_sum: what stands before the elements of a gradient in staging; likewise.
constexpr uint64_t StagedHeaderBytes(uint64_t parameters) { return (parameters + 63) / 64 * 64; }
inline constexpr uint64_t kStagedPartElementsMax = 4 << 20;  // 16 MiB
inline constexpr uint64_t kStagedPartsMax = 4096;  // of a unit; larger parts where they are more
inline constexpr uint32_t kStagedPartsAtOnce = 4;  // that staging has room for: one is added while
                                                   // one is landed, and what is begun of others
inline constexpr uint64_t kStagingBytes = 32 << 20;  // at most, of all pieces in flight
inline constexpr uint32_t kPiecesInFlight = 4;
inline constexpr uint32_t kMatricesAtOnce = 4;  // at most
// The smallest of the buckets: with less in flight a network waits for messages.
inline constexpr uint64_t kBucketElementsMin = 1 << 18;

// Elements of a piece of each member's part: kPiecesInFlight pieces of all members are no more than
// `bucket_elements` (kBucketElementsMin counts for less) and fit with all peers into kStagingBytes.
// The same on all members: a function of its arguments alone.
uint64_t PieceElements(const Layout& layout, uint32_t members, uint64_t bucket_elements);

// The type of gradients between members: communication_data_type; where that is left out, the
// parameters' own, as in DeepSpeed.
DType WireType(const Config& config, DType parameters);

// Elements of unit `u` of which member `self` keeps fp32 master weights, where they are not the
// window itself: all at stage 0 and with one member, else its shard; in a 16-bit job none that are
// not trained, which nothing rounds: their 16-bit values are all there is.
Range MasterRange(const Layout& layout, const Partition& partition, const StateForm& form,
                  uint32_t stage, UnitIndex u, MemberIndex self);
// Those of which it keeps 16-bit copies beside the window, to send from or to fill it again: at
// stage 3 its shard; with one member what has no master, where the unit may be evicted.
Range CopyRange(const Layout& layout, const Partition& partition, const StateForm& form,
                uint32_t stage, bool resident, UnitIndex u, MemberIndex self);

// `available_bytes`: what the node can give, for choosing the gradient plan. FAILED_PRECONDITION
// or RESOURCE_EXHAUSTED with the value that works where the window cannot.
absl::StatusOr<JobPlan> PlanJob(const Config& config, const Layout& layout, uint32_t members,
                                MemberIndex self, uint32_t local_world, uint64_t available_bytes);

}  // namespace zerod::core
