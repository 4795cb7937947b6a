// SPDX-License-Identifier: Apache-2.0
//
// What this member keeps of the job for good: fp32 master weights, 16-bit copies to send from,
// moments, reduced gradients, the node's gradient accumulator. Plain memory with an address for
// each (unit, element); who may touch what when is the log's business.
//
// Which elements of a unit are kept ("full": all; "shard": core::Partition's):
//   master       fp32     core::MasterRange; not here at all where the window is the master copy
//                         (JobPlan::master_in_window)
//   copies       16 bits  of the layout's type: core::CopyRange
//   moments      fp32 or the layout's 16 bits (StateForm)
//                         Layout::state_tensors of them, of trainable elements: full at stage 0
//                         and with one member, else shard
//   gradients    fp32     full at stages 0 and 1, else shard; trainable; several members only
//   accumulator  fp32     full, trainable; node_sum only
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

class ShardStore {
 public:
  struct Options {
    std::string job;
    std::shared_ptr<const core::Layout> layout;
    const core::Partition* partition = nullptr;  // outlives the store
    core::MemberIndex self = 0;
    uint32_t stage = 0;
    std::vector<bool> resident;  // per unit: WindowSpec's
    core::StateForm form;
    bool master_in_window = false;
    bool node_sum = false;
  };
  // Everything is reserved and zero. RESOURCE_EXHAUSTED with the numbers.
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(const Options& options,
                                                            arena::Arena* arena);

  // True where every element is kept here: stage 0, or one member.
  bool full() const { return full_; }
  // Elements that this member keeps master weights and 16-bit copies of, and those it updates.
  core::Range MasterRange(core::UnitIndex u) const { return master_.ranges[u]; }
  core::Range CopyRange(core::UnitIndex u) const { return copies_.ranges[u]; }
  core::Range TrainRange(core::UnitIndex u) const { return moments_[0].ranges[u]; }
  core::Range GradientRange(core::UnitIndex u) const { return gradients_.ranges[u]; }

  // Null where the store has no such memory. REQUIRES: `element` in the range kept (its end is
  // allowed where nothing is read). For a copy it is asked: null outside of the range too.
  float* master(core::UnitIndex u, uint64_t element) const { return master_.At(u, element); }
  void* copy(core::UnitIndex u, uint64_t element) const;
  // Of the layout's type, and `narrow_moment` where they are, else fp32 and `moment`.
  bool narrow_states() const { return narrow_states_; }
  float* moment(int which, core::UnitIndex u, uint64_t element) const {
    return moments_[which].At(u, element);
  }
  uint16_t* narrow_moment(int which, core::UnitIndex u, uint64_t element) const {
    return moments_[which].At<uint16_t>(u, element);
  }
  float* gradient(core::UnitIndex u, uint64_t element) const { return gradients_.At(u, element); }
  float* accumulator(core::UnitIndex u, uint64_t element) const {
    return accumulator_.At(u, element);
  }

  // Bytes reserved, for the metrics.
  uint64_t master_bytes() const { return master_.region.populated_bytes(); }
  uint64_t copies_bytes() const { return copies_.region.populated_bytes(); }
  uint64_t moments_bytes() const {
    uint64_t bytes = 0;
    for (const Array& moment : moments_) bytes += moment.region.populated_bytes();
    return bytes;
  }
  uint64_t gradients_bytes() const { return gradients_.region.populated_bytes(); }
  uint64_t accumulator_bytes() const { return accumulator_.region.populated_bytes(); }

 private:
  struct Array {
    arena::Region region;
    std::vector<core::Range> ranges;   // per unit: elements kept
    std::vector<uint64_t> offsets;     // per unit: of ranges[u].begin, in elements
    template <typename T = float>
    T* At(core::UnitIndex u, uint64_t element) const {
      if (!region) return nullptr;
      return reinterpret_cast<T*>(region.data()) + offsets[u] + (element - ranges[u].begin);
    }
    absl::Status Allocate(arena::Arena* arena, const std::string& name, uint64_t element_bytes);
    void Keep(core::Range range);
    uint64_t elements = 0;
  };

  bool full_ = false;
  bool narrow_states_ = false;
  Array master_;
  Array copies_;
  Array moments_[core::kStateTensorsMax];
  Array gradients_;
  Array accumulator_;
};

}  // namespace zerod::engine
