// SPDX-License-Identifier: Apache-2.0
//
// One unit of COMMIT, and one client's gradient into the node's accumulator: the arithmetic that
// workers do between two log entries. Each is a function of a range of elements, so that it can
// be shared out; elements are independent and no cutting changes a bit.
#pragma once

#include <memory>
#include <vector>

#include "daemon/core/job.h"
#include "daemon/engine/gradient_book.h"
#include "daemon/engine/movements.h"
#include "daemon/engine/window_files.h"

namespace zerod::engine {

struct ApplyTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  std::shared_ptr<const core::ApplyPlan> plan;
  std::shared_ptr<const Sources> sources;
  UnitCopy copy;  // used where the window's copy is written by the optimizer
};
// INTERNAL where the decision does not fit the layout (a member of another build).
absl::Status CheckApply(const ApplyTask& task);
// AdamW on the touched parameters' elements in `range`, which this member keeps.
void Apply(const ApplyTask& task, core::Range range);

struct AccumulateTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  const float* gradient = nullptr;  // Unit::trainable_elements, in the client's staging
  std::vector<bool> touched;        // per parameter of the unit
  std::vector<bool> add;            // per parameter: add to the accumulator, else write
  std::shared_ptr<ClientSlot> keep_alive;
};
void Accumulate(const AccumulateTask& task, core::Range range);

}  // namespace zerod::engine
