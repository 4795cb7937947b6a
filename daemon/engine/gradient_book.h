// SPDX-License-Identifier: Apache-2.0
//
// Whose gradients of the step under way lie where: what clients marked with SCATTER, which
// parameters the node's accumulator has, and the square norms of the blocks that were reduced.
// The loop only; what workers read of it is handed to them as immutable Sources.
#pragma once

#include <memory>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "daemon/core/types.h"
#include "daemon/engine/client_slot.h"
#include "daemon/engine/shard_store.h"

namespace zerod::engine {

// A gradient of one unit in fp32; element e lies at data[e - begin].
struct Source {
  float* data = nullptr;
  uint64_t begin = 0;
  float* At(uint64_t element) const { return data + (element - begin); }
};

// For each parameter of a unit (Unit::parameters order): the gradients to be summed, in order.
// None: nobody touched it; its gradient is zero. Immutable, any thread; of those that hold one,
// SetRange alone writes what lies there.
struct Sources {
  core::UnitIndex unit = 0;
  std::vector<absl::InlinedVector<Source, 4>> of;
  std::vector<std::shared_ptr<ClientSlot>> keep_alive;
};

// Calls `visit(index in Unit::parameters, elements)` for the trainable parameters' parts in
// `range`, in order. Padding belongs to none.
template <typename Visit>
void ForEachParameter(const core::Layout& layout, core::UnitIndex u, core::Range range,
                      const Visit& visit) {
  const core::Unit& unit = layout.units()[u];
  const auto& parameters = layout.parameters();
  // Sorted by offset: the first one that ends behind the range's begin.
  size_t low = 0;
  size_t high = unit.parameters.size();
  while (low < high) {
    const size_t middle = (low + high) / 2;
    const core::Parameter& p = parameters[unit.parameters[middle]];
    if (p.offset + p.elements <= range.begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (size_t i = low; i < unit.parameters.size(); ++i) {
    const core::Parameter& p = parameters[unit.parameters[i]];
    if (p.offset >= range.end || !p.trainable) break;
    const core::Range part = core::Intersect(range, {p.offset, p.offset + p.elements});
    if (!part.empty()) visit(i, part);
  }
}

// The sum of `sources` of one parameter over `range`, zeros where there are none.
void SumInto(const absl::InlinedVector<Source, 4>& sources, core::Range range, float* out);
// The node's sum over `range` with zeros in the padding.
void SumRange(const core::Layout& layout, const Sources& sources, core::Range range, float* out);
// Makes `values` the sum that SumRange gives of `range`, where there are sources: the first of each
// parameter gets them, the others zeros.
void SetRange(const core::Layout& layout, const Sources& sources, core::Range range,
              const float* values);
// Where one gradient is all that there is to sum over the whole of `range`: its elements there, to
// be sent as they lie (what lies in the padding means nothing). Else null.
const float* OnlySource(const core::Layout& layout, const Sources& sources, core::Range range);
// Sum of squares of one block's elements [range), as kernels::SquaredNorm gives it.
double BlockSquare(const core::Layout& layout, const Sources& sources, core::Range range,
                   bool* nonfinite);

class GradientBook {
 public:
  GradientBook(std::shared_ptr<const core::Layout> layout, const core::Partition* partition,
               core::MemberIndex self, uint32_t local_world, const core::JobPlan* plan,
               const ShardStore* store);

  // A client handed over gradients of these parameters of `unit`, in `round` as core counts it
  // (Job::NextRound); `last` marks that round.
  void Mark(core::SlotIndex slot, core::UnitIndex unit, core::Step step, uint32_t round, bool last,
            const std::vector<bool>& touched);
  // The accumulator is about to take `touched` in this part of the unit; returns, per parameter of
  // the unit, whether it has something there already (else it must be written, not added to).
  std::vector<bool> Accumulate(core::UnitIndex unit, uint32_t part, bool first,
                               const std::vector<bool>& touched);

  // What the accumulator had was sent to the owners.
  void ConsumeAccumulator(core::UnitIndex unit);

  // What this node's clients have for `round` of `unit`: their files, or the accumulator, where
  // what no client handed over of a parameter becomes zero.
  // `round` 0: whatever they marked in this step (one member).
  std::shared_ptr<const Sources> NodeSources(
      core::UnitIndex unit, core::Step step, uint32_t round,
      const std::vector<std::shared_ptr<ClientSlot>>& clients) const;
  // The gradient that this member applies: the reduced one, or with one member the node's own.
  std::shared_ptr<const Sources> FinalSources(
      core::UnitIndex unit, core::Step step,
      const std::vector<std::shared_ptr<ClientSlot>>& clients) const;

  // Per parameter of the layout: some client of this node had a gradient in `step`.
  std::vector<bool> Touched(core::Step step) const;

  // --- Square norms of the blocks of this member's trainable shards.
  // One piece of work: one block of a unit that it owns.
  struct Block {
    size_t index = 0;  // in layout order
    core::Range elements;
  };
  const std::vector<Block>& BlocksOf(core::UnitIndex unit) const { return blocks_[unit]; }
  void SetReduced(core::UnitIndex unit, core::Step step, uint32_t round);
  // True where the unit was reduced in `step` and its squares are not those of the last round.
  bool SquaresMissing(core::UnitIndex unit, core::Step step) const;
  void SetSquaresDone(core::UnitIndex unit);
  void SetSquaresMissing(core::UnitIndex unit);
  double* square(size_t block) { return &squares_[block]; }
  uint8_t* nonfinite(size_t block) { return &nonfinite_[block]; }
  // The squares of the units reduced in `step`, zero for the others.
  std::vector<double> Squares(core::Step step, bool* nonfinite) const;

  // Forgets everything of the step under way.
  void Drop();

 private:
  struct Marks {  // of one client and unit
    core::Step step = 0;
    uint32_t round = 0;  // the last one marked
    std::vector<bool> touched;  // of the last round marked
  };
  struct UnitState {
    core::Step touched_step = 0;
    std::vector<bool> touched;      // by any client, over all rounds of touched_step
    std::vector<std::vector<bool>> accumulated;  // what the accumulator has: [part][parameter]
    core::Step reduced_step = 0;
    uint32_t reduced_round = 0;
    uint32_t squares_round = 0;  // of reduced_step
  };

  bool HasAccumulated(core::UnitIndex unit, size_t parameter) const;
  void ForgetAccumulated(UnitState* state);

  const std::shared_ptr<const core::Layout> layout_;
  const core::JobPlan* const plan_;
  const ShardStore* const store_;
  const bool several_members_;
  std::vector<std::vector<Marks>> marks_;  // [slot][unit]
  std::vector<UnitState> units_;
  std::vector<std::vector<Block>> blocks_;  // per unit
  std::vector<double> squares_;
  std::vector<uint8_t> nonfinite_;
};

}  // namespace zerod::engine
