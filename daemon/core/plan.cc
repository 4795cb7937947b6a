// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "daemon/core/units.h"

namespace zerod::core {
namespace {

constexpr uint64_t kChunkBytes = 64 * 1024;
constexpr uint64_t kPage = 4096;
// Without a bucket: two units of a large model, one that moves and one that follows it, or dozens
// of a small one, so that their turn-around hides.
constexpr uint64_t kInFlightElementsMax = 8 << 20;
constexpr uint64_t kPiecesMax = 1 << 19;  // of a movement, so that each has a tag

uint64_t RoundUp(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }
uint64_t PageUp(uint64_t n) { return RoundUp(n, kPage); }
uint64_t ChunksFor(uint64_t bytes) { return (bytes + kChunkBytes - 1) / kChunkBytes; }

struct LiveSet {
  uint64_t chunks = 0;
  std::string unit;
};

// The most chunks that unpinned units need at once: a unit and the units of the modules around
// it, which stay gathered while it runs.
LiveSet LargestLiveSet(const Layout& layout, const std::vector<bool>& pinned) {
  LiveSet largest;
  const auto& units = layout.units();
  for (UnitIndex u = 0; u < units.size(); ++u) {
    uint64_t live = pinned[u] ? 0 : units[u].chunks;
    for (UnitIndex v = 0; v < units.size(); ++v) {
      if (v == u || pinned[v] || !IsAncestorOrSelf(units[v].name, units[u].name)) continue;
      live += units[v].chunks;
    }
    if (live > largest.chunks) largest = {live, units[u].name};
  }
  return largest;
}

// The units that stay gathered at stage 3: those that are small enough, the smallest first, as
// long as their sum is.
std::vector<bool> PersistentUnits(const Config& config, const Layout& layout) {
  std::vector<UnitIndex> small;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    if (layout.units()[u].elements < config.zero.param_persistence_threshold) small.push_back(u);
  }
  std::stable_sort(small.begin(), small.end(), [&](UnitIndex a, UnitIndex b) {
    return layout.units()[a].elements < layout.units()[b].elements;
  });
  std::vector<bool> persistent(layout.units().size(), false);
  uint64_t left = config.zero.model_persistence_threshold;
  for (UnitIndex u : small) {
    if (layout.units()[u].elements > left) break;
    left -= layout.units()[u].elements;
    persistent[u] = true;
  }
  return persistent;
}

absl::StatusOr<WindowSpec> PlanWindow(const Config& config, const Layout& layout,
                                      uint32_t members) {
  const auto& units = layout.units();
  const uint64_t element_bytes = DTypeBytes(layout.dtype());
  const uint64_t limit_bytes = config.zerod.window_bytes_max;
  WindowSpec spec;
  spec.pinned.assign(units.size(), true);
  spec.resident.assign(units.size(), true);
  spec.base_chunks = spec.max_chunks = layout.chunks();
  if (config.zero.stage < 3) {
    if (limit_bytes != 0 && limit_bytes < layout.chunks() * kChunkBytes) {
      return absl::FailedPreconditionError(absl::StrCat(
          "zerod.window_bytes_max is ", limit_bytes, ", but at stage ", config.zero.stage,
          " all parameters stay gathered: it must be at least ", layout.chunks() * kChunkBytes,
          ", or use stage 3"));
    }
    return spec;
  }

  spec.resident = spec.pinned = PersistentUnits(config, layout);
  uint64_t pinned_chunks = 0;
  for (UnitIndex u = 0; u < units.size(); ++u) {
    if (spec.pinned[u]) pinned_chunks += units[u].chunks;
  }
  // More than all of them is as good as all of them, and does not overflow.
  const uint64_t live_chunks =
      ChunksFor(std::min(config.zero.max_live_parameters,
                         layout.chunks() * kChunkBytes / element_bytes) * element_bytes);
  uint64_t base = pinned_chunks + live_chunks;
  if (limit_bytes != 0) base = std::min(base, limit_bytes / kChunkBytes);
  if (base >= layout.chunks()) {
    // Everything fits: each unit keeps its chunks. With one member the optimizer then writes the
    // copies themselves; with several they are gathered anew after each step.
    spec.pinned.assign(units.size(), true);
    if (members == 1) spec.resident.assign(units.size(), true);
    return spec;
  }
  const LiveSet largest = LargestLiveSet(layout, spec.pinned);
  if (base < pinned_chunks + largest.chunks) {
    const uint64_t wanted_bytes = largest.chunks * kChunkBytes;
    return absl::FailedPreconditionError(absl::StrCat(
        "the window is too small: the unit '", largest.unit,
        "' and the modules around it need ", wanted_bytes, " bytes at once, there are ",
        base > pinned_chunks ? (base - pinned_chunks) * kChunkBytes : 0,
        ". Set stage3_max_live_parameters to at least ", wanted_bytes / element_bytes,
        limit_bytes != 0 ? absl::StrCat(" and zerod.window_bytes_max to at least ",
                                        (pinned_chunks + largest.chunks) * kChunkBytes)
                         : std::string()));
  }
  spec.base_chunks = base;
  spec.max_chunks = limit_bytes == 0 ? layout.chunks()
                                     : std::min(layout.chunks(), limit_bytes / kChunkBytes);
  return spec;
}

// Every part of a unit has a multiple of the parameters' alignment, so an array of them has no
// gaps; each array is reserved in whole pages.
void PlanState(const Config& config, const Layout& layout, uint32_t members, MemberIndex self,
               JobPlan* plan) {
  const Partition partition(layout, members);
  const uint32_t stage = config.zero.stage;
  const uint64_t window_bytes = plan->window.base_chunks * kChunkBytes;
  uint64_t masters = 0;
  uint64_t copied = 0;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    masters += MasterRange(layout, partition, plan->form, stage, u, self).size();
    copied += CopyRange(layout, partition, plan->form, stage, plan->window.resident[u], u, self)
                  .size();
  }
  const uint64_t trainable_shard = partition.TrainableShardElements(self);
  MemoryPlan& m = plan->memory;
  const bool fp32 = layout.dtype() == DType::kFloat32;
  const bool all_resident =
      std::find(plan->window.resident.begin(), plan->window.resident.end(), false) ==
      plan->window.resident.end();
  plan->master_in_window = fp32 && all_resident && (stage < 3 || members == 1);
  if (plan->master_in_window) {
    m.parameters = window_bytes;
  } else {
    m.parameters = PageUp(4 * masters);
    (stage < 3 ? m.copies : m.window) = window_bytes;
    m.copies += PageUp(2 * copied);
  }
  if (members > 1) {
    m.gradients = PageUp(4 * (stage <= 1 ? layout.trainable_elements() : trainable_shard));
  }
  const uint64_t with_state = stage == 0 ? layout.trainable_elements() : trainable_shard;
  m.moments = layout.state_tensors() * PageUp(plan->form.state_bytes * with_state);
}

// An update and what kernels/cpu/muon.h needs to make it orthogonal, which the engine compares.
uint64_t MatrixScratchElements(const Parameter& p) {
  constexpr uint64_t kProductScratch = 256 * 1024;
  const uint64_t rows = static_cast<uint64_t>(p.shape[0]);
  const uint64_t columns = p.elements / rows;
  const uint64_t small = std::min(rows, columns);
  return 2 * p.elements + 4 * small * small + kProductScratch;
}

void PlanMatrices(const Config& config, const Layout& layout, uint32_t members, MemberIndex self,
                  JobPlan* plan) {
  const Partition partition(layout, members);
  const bool full = config.zero.stage == 0 || members == 1;
  for (const Parameter& p : layout.parameters()) {
    if (!layout.IsByMatrix(p) || p.elements == 0) continue;
    const Range shard = partition.Shard(p.unit, self);
    if (!full && (p.offset < shard.begin || p.offset >= shard.end)) continue;
    plan->matrices_at_once = std::min(plan->matrices_at_once + 1, kMatricesAtOnce);
    plan->matrix_scratch_elements = std::max(
        plan->matrix_scratch_elements, PageUp(4 * MatrixScratchElements(p)) / sizeof(float));
  }
  plan->memory.scratch = 4 * plan->matrices_at_once * plan->matrix_scratch_elements;
}

void PlanTransfers(const Config& config, const Layout& layout, uint32_t members, JobPlan* plan) {
  const Config::ZeroOptimization& zero = config.zero;
  plan->gather_piece_elements = PieceElements(layout, members, zero.allgather_bucket_size);
  plan->reduce_piece_elements = PieceElements(layout, members, zero.reduce_bucket_size);
  plan->in_flight_elements =
      std::min(kInFlightElementsMax, std::max(zero.allgather_bucket_size, kBucketElementsMin));
  if (zero.allgather_sequential) plan->in_flight_elements = 1;  // so one unit at a time
  if (members == 1) return;
  const uint64_t piece = std::max(plan->gather_piece_elements, plan->reduce_piece_elements);
  plan->memory.staging = PageUp(kPiecesInFlight * 2 * sizeof(float) * (members - 1) * piece);
}

// As many as fit into the staging that the configuration asks for, in whole pages, which is what is
// set aside of them; and enough that no unit has more than kStagedPartsMax.
uint64_t StagedPartElements(const Layout& layout, uint64_t staging_bytes) {
  constexpr uint64_t kStep = kPage / sizeof(float);
  uint64_t largest = 1;
  for (const Unit& unit : layout.units()) largest = std::max(largest, unit.trainable_elements);
  const uint64_t least = RoundUp((largest + kStagedPartsMax - 1) / kStagedPartsMax, kStep);
  if (staging_bytes == 0) return std::max(least, kStagedPartElementsMax);
  const uint64_t fitting = staging_bytes / kStagedPartsAtOnce / kPage * kStep;
  return std::max(least, std::min(fitting, kStagedPartElementsMax));
}

void PlanGradients(const Config& config, const Layout& layout, uint32_t local_world, bool node_sum,
                   JobPlan* plan) {
  plan->node_sum = node_sum;
  plan->gradient_offsets.clear();
  plan->staging_bytes = 0;
  plan->staged_part_elements = 0;
  MemoryPlan& m = plan->memory;
  if (!node_sum) {
    uint64_t bytes = 0;
    for (const Unit& unit : layout.units()) {
      plan->gradient_offsets.push_back(bytes);
      bytes += PageUp(unit.trainable_elements * 4);
    }
    plan->gradient_file_bytes = std::max(bytes, kPage);
    m.accumulator = 0;
  } else {
    plan->staged_part_elements = StagedPartElements(layout, config.zerod.staging_bytes);
    uint64_t all = 0;
    uint64_t largest = 0;
    for (const Unit& unit : layout.units()) {
      const uint64_t header = StagedHeaderBytes(unit.parameters.size());
      const uint64_t part = StagedPart(unit, plan->staged_part_elements, 0).size();
      largest = std::max(largest, header + part * sizeof(float));
      all += header * StagedParts(unit, plan->staged_part_elements) +
             RoundUp(unit.trainable_elements * sizeof(float), StagedHeaderBytes(1));
    }
    const uint64_t wanted = config.zerod.staging_bytes != 0
                                ? config.zerod.staging_bytes
                                : std::min(all, kStagedPartsAtOnce * largest);
    plan->staging_bytes = PageUp(std::max(wanted, largest));
    plan->gradient_file_bytes = std::max(plan->staging_bytes, kPage);
    m.accumulator = PageUp(4 * layout.trainable_elements());
  }
  m.client_gradients = plan->gradient_file_bytes * local_world;
}

absl::Status CheckForm(const Layout& layout, const StateForm& form) {
  if (form.masters && form.state_bytes == 4) return absl::OkStatus();
  for (const Parameter& p : layout.parameters()) {
    if (!p.trainable) continue;
    const OptimizerKind kind = layout.optimizer(p.group);
    if (ByTensor(kind) || ByMatrix(kind)) {
      return absl::UnimplementedError(absl::StrCat(
          "master weights and optimizer states in 16 bits are not served for Lamb and Muon, which "
          "parameter '", p.name, "' has: leave out bf16_master_weights_and_grads, "
          "bf16_optimizer_states, fp16_master_weights_and_grads and fp32_optimizer_states"));
    }
  }
  return absl::OkStatus();
}

std::string Describe(const Config& config, const Layout& layout, uint32_t members,
                     uint32_t local_world, const JobPlan& plan) {
  std::string text = absl::StrFormat(
      "%d parameters in %d units, stage %d, %d member(s), %d local rank(s); gradient plan %s%s; "
      "window %.1f MiB of %.1f MiB%s; memory on this node %.1f MiB (",
      layout.parameter_elements(), layout.units().size(), config.zero.stage, members, local_world,
      plan.node_sum ? "node_sum" : "per_rank",
      plan.node_sum && local_world > 1 ? " (a scatter may wait for another rank's)" : "",
      plan.window.base_chunks * kChunkBytes / 1048576.0, layout.chunks() * kChunkBytes / 1048576.0,
      plan.master_in_window ? ", which is the master copy" : "", plan.memory.total() / 1048576.0);
  bool first = true;
  for (const auto& [name, bytes] : plan.memory.Named()) {
    if (bytes == 0) continue;
    absl::StrAppendFormat(&text, "%s%s %.1f", first ? "" : ", ", name, bytes / 1048576.0);
    first = false;
  }
  return text + ")";
}

}  // namespace

std::vector<std::pair<std::string, uint64_t>> MemoryPlan::Named() const {
  return {{"parameters", parameters},   {"copies", copies},
          {"gradients", gradients},     {"moments", moments},
          {"window", window},           {"accumulator", accumulator},
          {"client_gradients", client_gradients}, {"staging", staging},     {"scratch", scratch},
          {"set_aside", set_aside}, {"control", control}};
}

uint64_t MemoryPlan::total() const {
  uint64_t sum = 0;
  for (const auto& [name, bytes] : Named()) sum += bytes;
  return sum;
}

uint64_t PieceElements(const Layout& layout, uint32_t members, uint64_t bucket_elements) {
  constexpr uint64_t kStep = 1024;
  uint64_t largest = 1;
  for (const Unit& unit : layout.units()) largest = std::max(largest, unit.elements);
  const uint64_t peers = members > 1 ? members - 1 : 1;
  const uint64_t fitting = kStagingBytes / kPiecesInFlight / (2 * sizeof(float) * peers);
  const uint64_t bucket =
      std::max(bucket_elements, kBucketElementsMin) / (kPiecesInFlight * members);
  const uint64_t wanted = std::max(bucket / kStep * kStep, RoundUp(largest / kPiecesMax, kStep));
  return std::min({uint64_t{1} << 20, fitting / kStep * kStep, wanted, RoundUp(largest, kStep)});
}

StateForm FormOf(const Config& config, DType dtype) {
  StateForm form;
  if (dtype == DType::kFloat32) return form;
  form.masters = !(dtype == DType::kBFloat16 ? config.bf16_options.master_weights_and_grads
                                             : config.fp16.master_weights_and_grads);
  const bool narrow = (dtype == DType::kBFloat16 && config.bf16_options.optimizer_states) ||
                      !config.optimizer.fp32_optimizer_states;
  form.state_bytes = narrow ? 2 : 4;
  return form;
}

Range MasterRange(const Layout& layout, const Partition& partition, const StateForm& form,
                  uint32_t stage, UnitIndex u, MemberIndex self) {
  if (!form.masters) return {0, 0};
  const Unit& unit = layout.units()[u];
  const Range all{0, layout.dtype() == DType::kFloat32 ? unit.elements : unit.trainable_elements};
  const bool full = stage == 0 || partition.members() == 1;
  return full ? all : Intersect(partition.Shard(u, self), all);
}

Range CopyRange(const Layout& layout, const Partition& partition, const StateForm& form,
                uint32_t stage, bool resident, UnitIndex u, MemberIndex self) {
  if (layout.dtype() == DType::kFloat32 || stage < 3) return {0, 0};
  if (partition.members() > 1) return partition.Shard(u, self);
  const Unit& unit = layout.units()[u];
  if (resident) return {0, 0};
  return {form.masters ? unit.trainable_elements : 0, unit.elements};
}

DType WireType(const Config& config, DType parameters) {
  const std::string name = config.communication.data_type.value_or("");
  if (name == "fp32") return DType::kFloat32;
  if (name == "fp16") return DType::kFloat16;
  if (name == "bf16") return DType::kBFloat16;
  return parameters;
}

absl::StatusOr<JobPlan> PlanJob(const Config& config, const Layout& layout, uint32_t members,
                                MemberIndex self, uint32_t local_world, uint64_t available_bytes) {
  if (config.zerod.master_remainder) {
    return absl::UnimplementedError(
        "zerod.master_remainder is not served yet: remove it from the configuration");
  }
  JobPlan plan;
  plan.form = FormOf(config, layout.dtype());
  RETURN_IF_ERROR(CheckForm(layout, plan.form));
  ASSIGN_OR_RETURN(plan.window, PlanWindow(config, layout, members));
  PlanState(config, layout, members, self, &plan);
  PlanMatrices(config, layout, members, self, &plan);
  PlanTransfers(config, layout, members, &plan);
  plan.transfer_values_bytes = kTransferValuesBytes;
  plan.transfer_bytes = kTransferValuesBytes + PageUp(config.zerod.client_state_bytes_max);
  const uint64_t client_control = plan.transfer_bytes + kRingBytes +
                                  PageUp(layout.units().size() * 4) +
                                  PageUp(layout.parameters().size());
  plan.memory.control = local_world * client_control + PageUp(layout.chunks() * 4) +
                        PageUp(layout.units().size() * 8) + kPage;
  plan.client_states_bytes_max = 2 * local_world * config.zerod.client_state_bytes_max;

  bool node_sum = config.zerod.gradient_plan == GradientPlanChoice::kNodeSum;
  PlanGradients(config, layout, local_world, node_sum, &plan);
  // With one local rank its own gradient is the node's sum already: per_rank is never larger.
  if (config.zerod.gradient_plan == GradientPlanChoice::kAuto && local_world > 1 &&
      plan.memory.total() > available_bytes / 10 * 9) {
    PlanGradients(config, layout, local_world, /*node_sum=*/true, &plan);
  }
  plan.client_bytes = plan.gradient_file_bytes + client_control;
  plan.text = Describe(config, layout, members, local_world, plan);
  return plan;
}

}  // namespace zerod::core
