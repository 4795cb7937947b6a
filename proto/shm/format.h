// SPDX-License-Identifier: Apache-2.0
//
// The shared-memory half of the contract between a client and its daemon: which memory files
// exist, how their bytes are laid out, and who may write what. The prose, the life cycle of each
// word and worked examples are in docs/formats/ring.md and docs/formats/window.md.
//
// Per client (one memfd each, passed over the fd socket in the order of `enum class ClientFile`):
//   submit    client writes   SubmitPage, then the hold words, the trace, the touched bytes
//   complete  daemon writes   CompletePage
//   gradient  client writes   gradients on their way to the daemon (docs/formats/window.md)
//   transfer  both write      values of PUT and READ, the client's state blob
// Per job and node, mapped by every client of the node, written by the daemon alone:
//   units     UnitTablePage, the unit words, the chunk table
//   window    chunks of gathered parameters
//
// Everything is little-endian, naturally aligned and lock-free. The daemon believes nothing that
// a client can write: it copies an entry first and checks the copy.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace zerod::shm {

// Bumped whenever a layout below changes; client and daemon must agree exactly.
inline constexpr uint32_t kFormatVersion = 5;
inline constexpr uint64_t kMagic = 0x315f444f52455a00;  // "\0ZEROD_1"

// The piece in which window memory is given to units.
inline constexpr uint64_t kChunkBytes = 64 * 1024;
// Parameters start on multiples of this many elements, so on 64 bytes in every dtype we serve.
inline constexpr uint64_t kParamAlignElements = 32;
// A gradient in staging starts on a multiple of this many bytes, and so do its elements.
inline constexpr uint64_t kStagedAlignBytes = 64;
// Before its elements: a touched byte for each parameter of the unit, padded.
constexpr uint64_t StagedHeaderBytes(uint64_t parameters) {
  return (parameters + kStagedAlignBytes - 1) / kStagedAlignBytes * kStagedAlignBytes;
}
inline constexpr uint32_t kRingEntries = 256;  // power of two; bound on requests in flight
inline constexpr uint32_t kRoundsMax = 255;    // SCATTERs of a unit with kLast in one step
inline constexpr uint32_t kGroupsMax = 64;     // parameter groups of an optimizer
inline constexpr uint32_t kTraceMax = 8192;    // gathers of one step that are remembered
inline constexpr uint32_t kScalarsMax = 64;    // values of one SCALAR request
inline constexpr uint32_t kTextSlots = 16;
inline constexpr uint32_t kTextBytes = 1024;

enum class ClientFile : uint32_t { kSubmit, kComplete, kGradient, kTransfer, kUnits, kWindow };
inline constexpr uint32_t kClientFiles = 6;

enum class Op : uint16_t {
  kNone = 0,      // reserved: zeroed memory is not a request
  kGather = 1,    // unit, step: complete when the unit's copy of version step-1 may be read
  kRelease = 2,   // unit: a hint, no completion; the hold word is what counts
  kScatter = 3,   // unit, step, flags kLast; node_sum: arg0 = staging offset, arg1 = the part of
                  //   the unit's trainable elements that lies there
  kReclaim = 4,   // unit, step: complete when the gradient memory of the unit may be landed in
                  //   again after kLast; result = 1: what lies there was consumed, start afresh,
                  //   0: it is still needed, add to it
  kStep = 5,      // step; StepRecord in the submit page, blob of arg0 bytes in the transfer area
  kPut = 6,       // unit, arg0 = first element, arg1 = elements, flags = StateKind; values (fp32)
                  //   in the transfer area
  kRead = 7,      // unit, arg0, arg1, flags as kPut; the values come back as fp32
  kScalar = 8,    // arg0 = number of values (0 = barrier), flags = ScalarOp; ScalarRecord
  kDetach = 9,    // the client leaves of its own will; nothing follows
  kMicroStep = 10,  // step: a backward pass is over, what is scattered from here on is of the next
                    //   one; no completion
  kMakeRoom = 11,   // node_sum: this client waits for room in its staging: answer one of its
                    //   scatters without waiting for other ranks, if possible; no completion
  kReadProgress = 12,  // arg0 = parameters of the layout; a ProgressRecord and the parameters'
                       //   steps come back in the transfer area
  kRestore = 13,  // arg0 as kReadProgress, the same in the transfer area; of all ranks, among their
                  //   SCALARs
};

enum ScatterFlags : uint16_t { kLast = 1 };
enum class StateKind : uint16_t {
  kMaster = 0,
  kExpAvg = 1,
  kExpAvgSq = 2,
  kThird = 3,
  kGradient = 4,
};
enum class ScalarOp : uint16_t { kSum = 0, kMean = 1, kMin = 2, kMax = 3 };

struct SubmitEntry {
  Op op;
  uint16_t flags;
  uint32_t unit;
  uint64_t step;
  uint64_t arg0;
  uint64_t arg1;
  uint64_t cookie;  // chosen by the client, returned in the completion; 0 = no completion wanted
  uint64_t reserved[3];
};
static_assert(sizeof(SubmitEntry) == 64);

struct CompleteEntry {
  uint64_t cookie;
  int32_t code;       // absl::StatusCode; 0 = OK
  uint32_t text_seq;  // 0 = no text, else texts[text_seq % kTextSlots] if its seq still equals this
  uint64_t result;
  uint64_t reserved;
};
static_assert(sizeof(CompleteEntry) == 32);

// One parameter group's values for one step, in the words of torch.optim. Each kind of optimizer
// reads its own (daemon/core/types.h); the others are as they are by default there.
enum GroupFlags : uint64_t {
  kDecoupled = 1,       // Adam, NAdam, RAdam: weight decay is AdamW's
  kBiasCorrection = 2,  // Adam, LAMB
  kNesterov = 4,        // SGD, Muon
  kEpsInsideSqrt = 8,   // LAMB
  kStandardNewtonSchulz = 16,  // Muon
  kCentered = 32,       // RMSprop
};
struct GroupRecord {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double momentum;
  double dampening;
  double lr_decay;
  double initial_accumulator_value;
  uint64_t flags;  // GroupFlags
  double min_coeff;  // LAMB
  double max_coeff;
  double alpha;           // RMSprop, ASGD
  double rho;             // Adadelta
  double momentum_decay;  // NAdam
  double eta_minus;       // Rprop
  double eta_plus;
  double step_min;
  double step_max;
  double lambd;           // ASGD
  double t0;
  double lr_before;
  uint64_t reserved[2];
};
static_assert(sizeof(GroupRecord) == 192);

// What varies from step to step; compared among all clients (docs/step.md).
struct StepRecord {
  double max_norm;    // gradient_clipping; <= 0: no clipping
  double loss_scale;  // gradients arrive multiplied by it
  uint32_t groups;    // number of `group` in use, <= kGroupsMax
  uint32_t want_norm; // 1: the client will ask for the global gradient norm
  uint64_t reserved;
  GroupRecord group[kGroupsMax];
};

// At the start of the transfer area, before a uint64_t per parameter in the layout's order: the
// applied steps that the optimizer counts.
struct ProgressRecord {
  uint32_t has_loss_scaler;  // 1: the rest has a meaning
  uint32_t reserved0;
  double scale;              // core::LossScalerState
  uint64_t iterations;
  int64_t last_overflow;
  uint64_t hysteresis;
  uint64_t reserved1[3];
};
static_assert(sizeof(ProgressRecord) == 64);
constexpr uint64_t ProgressBytes(uint64_t params) { return sizeof(ProgressRecord) + 8 * params; }

struct ScalarRecord {
  double value[kScalarsMax];
};

// Offset 0 of the submit file. The client is the only writer.
struct SubmitPage {
  uint64_t magic;
  uint32_t version;
  uint32_t reserved0;
  alignas(64) std::atomic<uint32_t> tail;      // entries published; i is at [i % kRingEntries]
  alignas(64) std::atomic<uint32_t> cq_head;   // completions consumed
  alignas(64) std::atomic<uint32_t> sleeping;  // 1: sleeps, or is about to, on CompletePage::wake
  alignas(64) std::atomic<uint32_t> trace_len; // entries of the trace written in this step
  alignas(64) SubmitEntry entry[kRingEntries];
  alignas(64) StepRecord step;
  alignas(64) ScalarRecord scalar;
};

// Offset 0 of the complete file. The daemon is the only writer; clients map it read-only.
struct TextSlot {
  uint32_t seq;
  uint32_t bytes;
  char text[kTextBytes - 8];
};
static_assert(sizeof(TextSlot) == kTextBytes);

struct CompletePage {
  uint64_t magic;
  uint32_t version;
  uint32_t reserved0;
  alignas(64) std::atomic<uint32_t> wake;      // the client's futex word: grows with each wake
  alignas(64) std::atomic<uint32_t> tail;      // completions published
  alignas(64) std::atomic<uint32_t> sq_head;   // submissions consumed
  alignas(64) std::atomic<uint32_t> sleeping;  // 1: the daemon sleeps: ring its doorbell
  // Not 0: every request of this attachment fails with this absl::StatusCode, text in `failure`.
  alignas(64) std::atomic<uint32_t> failed;
  TextSlot failure;
  alignas(64) CompleteEntry entry[kRingEntries];
  TextSlot texts[kTextSlots];
  // The result of the last SCALAR and of the last STEP of this client, valid once it completed.
  alignas(64) ScalarRecord scalar;
  double grad_norm;  // NaN when not computed
  uint32_t skipped;  // 1: the last step was skipped (non-finite gradients)
  uint32_t reserved1;
  double loss_scale; // what the next step's loss is to be multiplied by
};

// --- The submit file behind SubmitPage -------------------------------------------------------
// hold[u]     std::atomic<uint32_t> per unit: 0 = none, else version + 1 of the copy claimed
// trace[i]    uint32_t kTraceMax: the units gathered in this step, in order
// touched[p]  uint8_t per parameter (layout order): 1 = a gradient landed in this step
// Each section starts on a multiple of 4096.
struct SubmitSections {
  uint64_t hold;
  uint64_t trace;
  uint64_t touched;
  uint64_t total;
};
constexpr uint64_t PageUp(uint64_t n) { return (n + 4095) & ~uint64_t{4095}; }
constexpr SubmitSections SubmitLayout(uint32_t units, uint32_t params) {
  SubmitSections s{};
  s.hold = PageUp(sizeof(SubmitPage));
  s.trace = s.hold + PageUp(uint64_t{units} * 4);
  s.touched = s.trace + PageUp(uint64_t{kTraceMax} * 4);
  s.total = s.touched + PageUp(params);
  return s;
}

// --- The units file --------------------------------------------------------------------------
// word[u]   std::atomic<uint64_t> per unit, see UnitWord
// chunk[i]  uint32_t per chunk of the layout's address space (UnitInfo::first_chunk + j): the
//           window chunk behind it, kNoChunk = none. Stable while the word's epoch is.
struct UnitTablePage {
  uint64_t magic;
  uint32_t version;
  uint32_t units;
  uint64_t chunks;
  uint64_t reserved;
};
inline constexpr uint32_t kNoChunk = 0xffffffff;
struct UnitsSections {
  uint64_t word;
  uint64_t chunk;
  uint64_t total;
};
constexpr UnitsSections UnitsLayout(uint32_t units, uint64_t chunks) {
  UnitsSections s{};
  s.word = PageUp(sizeof(UnitTablePage));
  s.chunk = s.word + PageUp(uint64_t{units} * 8);
  s.total = s.chunk + PageUp(chunks * 4);
  return s;
}

// The state of a unit's copy in the window, in one word that is read and written atomically:
//   bits 0..31 version (the committed step whose weights these are), 32..55 epoch (grows when the
//   chunks behind the unit change), 56..63 state.
enum class CopyState : uint8_t {
  kAbsent = 0,    // no chunks, or bytes that mean nothing
  kFilling = 1,   // chunks are there, bytes are on their way
  kValid = 2,     // readable by whoever holds it
  kEvicting = 3,  // the daemon is looking at the hold words; the copy may come back as kValid
};
struct UnitWord {
  uint32_t version;
  uint32_t epoch;  // 24 bits
  CopyState state;
};
constexpr uint64_t PackUnitWord(UnitWord w) {
  return uint64_t{w.version} | (uint64_t{w.epoch & 0xffffff} << 32) |
         (uint64_t{static_cast<uint8_t>(w.state)} << 56);
}
constexpr UnitWord UnpackUnitWord(uint64_t v) {
  return {static_cast<uint32_t>(v), static_cast<uint32_t>((v >> 32) & 0xffffff),
          static_cast<CopyState>(v >> 56)};
}

static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint64_t>) == 8);

}  // namespace zerod::shm
