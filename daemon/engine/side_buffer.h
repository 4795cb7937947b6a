// SPDX-License-Identifier: Apache-2.0
//
// node_sum: memory for gradients that leave their clients' staging before their turn to be added
// has come. Taken from the arena at need, kept for the next one of its size within the step, given
// back at the step's end. Core counts in whole pages and bounds what lies here at a time; what is
// kept beside it goes before both together exceed that bound. The loop only, but for Allocate.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "daemon/engine/apply.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

class SideBuffer {
 public:
  using Memory = std::shared_ptr<const arena::Region>;

  // `arena` outlives this.
  SideBuffer(arena::Arena* arena, std::string job, uint64_t bytes_max)
      : arena_(arena), name_("gradients set aside of job " + std::move(job)),
        bytes_max_(bytes_max) {}

  // Memory for so many bytes that was used before; null where there is none. Then Allocate() it,
  // having freed what lies in `surplus`, and tell how that went by Put() or Forgo().
  Memory Reuse(uint64_t bytes, std::vector<Memory>* surplus);
  // Any thread: populating memory takes time. RESOURCE_EXHAUSTED with the numbers.
  absl::StatusOr<Memory> Allocate(uint64_t bytes) const;
  void Forgo(uint64_t bytes);

  void Put(uint64_t number, uint64_t bytes, StagedGradient gradient);
  // Null where nothing was put under that number.
  const StagedGradient* Find(uint64_t number) const;
  // It was added, or is worth nothing.
  void Drop(uint64_t number);
  // Everything, set aside or free, to be freed by the caller wherever that suits him.
  std::vector<Memory> TakeAll();

  uint64_t bytes() const;  // taken from the arena

 private:
  arena::Arena* const arena_;
  const std::string name_;
  const uint64_t bytes_max_;
  absl::flat_hash_map<uint64_t, StagedGradient> gradients_;
  std::vector<Memory> free_;
  uint64_t on_their_way_ = 0;  // bytes for which Reuse() was asked and neither told yet
};

}  // namespace zerod::engine
