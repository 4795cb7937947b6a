// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/shard_store.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace zerod::engine {

using core::Range;
using core::UnitIndex;

void ShardStore::Array::Keep(Range range) {
  if (range.empty()) range.end = range.begin;
  ranges.push_back(range);
  offsets.push_back(elements);
  elements += (range.size() + 15) / 16 * 16;  // each unit on a cache line of its own
}

absl::Status ShardStore::Array::Allocate(arena::Arena* arena, const std::string& name,
                                         uint64_t element_bytes) {
  const uint64_t bytes = elements * element_bytes;
  if (bytes == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(region, arena->Allocate(name, bytes, bytes, arena::Access::kPrivate));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ShardStore>> ShardStore::Create(const Options& options,
                                                               arena::Arena* arena) {
  auto store = std::make_unique<ShardStore>();
  const core::Layout& layout = *options.layout;
  const core::Partition& partition = *options.partition;
  const bool several = partition.members() > 1;
  store->full_ = options.stage == 0 || !several;
  store->narrow_states_ = options.form.state_bytes == 2;
  const bool full_gradients = options.stage <= 1;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    const core::Unit& unit = layout.units()[u];
    const Range trainable{0, unit.trainable_elements};
    const Range trainable_shard = partition.TrainableShard(u, options.self);
    store->master_.Keep(core::MasterRange(layout, partition, options.form, options.stage, u,
                                          options.self));
    store->copies_.Keep(core::CopyRange(layout, partition, options.form, options.stage,
                                        options.resident[u], u, options.self));
    for (Array& moment : store->moments_) moment.Keep(store->full_ ? trainable : trainable_shard);
    store->gradients_.Keep(full_gradients ? trainable : trainable_shard);
    store->accumulator_.Keep(trainable);
  }
  const std::string of_job = absl::StrCat(" of job ", options.job);
  if (!options.master_in_window) {
    RETURN_IF_ERROR(store->master_.Allocate(arena, "fp32 weights" + of_job, 4));
  }
  RETURN_IF_ERROR(store->copies_.Allocate(arena, "16-bit copies" + of_job, 2));
  const char* const names[core::kStateTensorsMax] = {"exp_avg", "exp_avg_sq", "third state"};
  for (uint32_t i = 0; i < layout.state_tensors(); ++i) {
    RETURN_IF_ERROR(
        store->moments_[i].Allocate(arena, names[i] + of_job, options.form.state_bytes));
  }
  if (several) RETURN_IF_ERROR(store->gradients_.Allocate(arena, "gradients" + of_job, 4));
  if (options.node_sum) {
    RETURN_IF_ERROR(store->accumulator_.Allocate(arena, "gradient accumulator" + of_job, 4));
  }
  return store;
}

void* ShardStore::copy(UnitIndex u, uint64_t element) const {
  const Range kept = copies_.ranges[u];
  if (element < kept.begin || element >= kept.end) return nullptr;
  return copies_.At<uint16_t>(u, element);
}

}  // namespace zerod::engine
