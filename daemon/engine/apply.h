// SPDX-License-Identifier: Apache-2.0
//
// One unit of COMMIT, and one client's gradient into the node's accumulator or out of its staging:
// the arithmetic that workers do between two log entries. Each is a function of a range of
// elements, so that it can be shared out; elements are independent and no cutting changes a bit.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "daemon/core/job.h"
#include "daemon/engine/gradient_book.h"
#include "daemon/engine/movements.h"
#include "daemon/engine/window_files.h"
#include "kernels/cpu/optimizers.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

struct ApplyTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  std::shared_ptr<const core::ApplyPlan> plan;
  std::shared_ptr<const Sources> sources;
  UnitCopy copy;  // used where the window's copy is written by the optimizer
};
// INTERNAL where the decision does not fit the layout (a member of another build).
absl::Status CheckApply(const core::Layout& layout, core::UnitIndex unit,
                        const core::ApplyPlan& plan);
// Calls `update(elements, their weights, their copy)` for the pieces of `part` of one parameter, in
// whatever memory has them here, and sees to it that the window has what it wrote.
void UpdateWeights(const ApplyTask& task, core::Range part,
                   const std::function<void(core::Range, float*, kernels::Copy)>& update);
// The optimizer on the touched parameters' elements in `range`, which this member keeps, but for
// what is updated by matrix (matrices.h).
void Apply(const ApplyTask& task, core::Range range);

// The first pass over a unit with tensors that are updated as a whole (core::StartMeasure): their
// moments, and their squares piece by piece.
struct MeasureTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  std::shared_ptr<const core::ApplyPlan> plan;
  std::shared_ptr<const Sources> sources;
  UnitCopy copy;
  std::vector<core::TensorPiece> pieces;     // of what this member keeps
  std::vector<core::TensorSquares> squares;  // of `pieces`; Measure writes them
};
// REQUIRES: `first` to `last` are `pieces` that no other call gets.
void Measure(MeasureTask* task, size_t first, size_t last);

// A gradient that one client handed over, in its staging or set aside. Immutable, any thread.
struct StagedGradient {
  uint32_t part = 0;
  core::Range range;                // the unit's elements that it is of: those of `part`
  const float* data = nullptr;
  std::vector<bool> touched;        // per parameter of the unit
  std::vector<uint64_t> begins;     // per parameter touched: its first element here, from `data`
  std::shared_ptr<ClientSlot> client;      // whose memory it is, or
  std::shared_ptr<const arena::Region> aside;
};

struct AccumulateTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  StagedGradient gradient;
  std::vector<bool> add;  // per parameter: add to the accumulator, else write
};
void Accumulate(const AccumulateTask& task, core::Range range);

// What was touched of `from`, one parameter behind the other, to `to`.
struct SetAsideTask {
  const MoveContext* context = nullptr;
  core::UnitIndex unit = 0;
  StagedGradient from;
  std::vector<uint64_t> begins;  // per parameter touched: its first element here, from `to`
  float* to = nullptr;
};
void SetAside(const SetAsideTask& task, core::Range range);

}  // namespace zerod::engine
