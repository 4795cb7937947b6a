// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/apply.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "daemon/engine/narrow.h"
#include "daemon/engine/update_rule.h"
#include "kernels/cpu/lamb.h"

namespace zerod::engine {
namespace {

using core::Range;

// The gradient of a parameter that nobody touched but that is to be updated all the same.
constexpr uint64_t kZeroElements = 16 * 1024;
const float kZeros[kZeroElements] = {};

// At a time, of what is kept in 16 bits.
constexpr uint64_t kNarrowElements = 4 * 1024;

// One parameter's part of one step; by tensor, of its second pass.
class ParameterUpdate {
 public:
  ParameterUpdate(const ShardStore* store, core::DType dtype, core::UnitIndex unit,
                  core::OptimizerKind kind, const core::ApplyPlan& plan, uint32_t parameter,
                  uint32_t group_index,
                  const absl::InlinedVector<Source, 4>* sources)
      : store_(*store), dtype_(dtype), unit_(unit), state_tensors_(core::StateTensors(kind)),
        sources_(*sources),
        rule_(kind, plan.decision.hyper.groups[group_index], plan.parameter_steps[parameter],
              plan.decision.grad_scale,
              core::ByTensor(kind) ? plan.squares[parameter] : core::TensorSquares{}) {}

  // `p` and `copy` are of the first element of `range`.
  void Run(Range range, float* p, kernels::Copy copy) const {
    const bool narrow = store_.narrow_states() && state_tensors_ > 0;
    const uint64_t step =
        narrow ? kNarrowElements : sources_.empty() ? kZeroElements : range.size();
    for (uint64_t begin = range.begin; begin < range.end; begin += step) {
      const uint64_t done = begin - range.begin;
      absl::InlinedVector<const float*, 8> gradients;
      for (const Source& source : sources_) gradients.push_back(source.At(begin));
      if (gradients.empty()) gradients.push_back(kZeros);
      Elements elements{gradients.data(), gradients.size(), p + done, {}, copy.At(done),
                        std::min(step, range.end - begin)};
      if (narrow) {
        RunNarrow(&elements, begin);
        continue;
      }
      for (uint32_t i = 0; i < state_tensors_; ++i) {
        elements.states[i] = store_.moment(static_cast<int>(i), unit_, begin);
      }
      rule_.Run(elements);
    }
  }

 private:
  // In fp32 while they are computed, which stays in a cache.
  void RunNarrow(Elements* elements, uint64_t begin) const {
    alignas(64) thread_local float states[core::kStateTensorsMax][kNarrowElements];
    for (uint32_t i = 0; i < state_tensors_; ++i) {
      Widen(dtype_, store_.narrow_moment(static_cast<int>(i), unit_, begin), states[i],
            elements->n);
      elements->states[i] = states[i];
    }
    rule_.Run(*elements);
    for (uint32_t i = 0; i < state_tensors_; ++i) {
      Narrow(dtype_, states[i], store_.narrow_moment(static_cast<int>(i), unit_, begin),
             elements->n);
    }
  }

  const ShardStore& store_;
  const core::DType dtype_;
  const core::UnitIndex unit_;
  const uint32_t state_tensors_;
  const absl::InlinedVector<Source, 4>& sources_;
  const UpdateRule rule_;
};

// Where the elements `part` of the unit's i-th parameter lie, if its first one in `range` lies at
// begins[i].
uint64_t PlaceOf(const MoveContext& c, core::UnitIndex u, size_t i, Range range,
                 const std::vector<uint64_t>& begins, Range part) {
  const core::Parameter& p = c.layout->parameters()[c.layout->units()[u].parameters[i]];
  return begins[i] + (part.begin - std::max(p.offset, range.begin));
}

}  // namespace

absl::Status CheckApply(const core::Layout& layout, core::UnitIndex unit,
                        const core::ApplyPlan& plan) {
  const core::Decision& decision = plan.decision;
  const size_t parameters = layout.parameters().size();
  if (decision.touched.size() != parameters || plan.parameter_steps.size() != parameters) {
    return absl::InternalError(
        absl::StrCat("the commit of step ", plan.step, " speaks of ",
                     decision.touched.size(), " parameters, the layout has ", parameters));
  }
  for (uint32_t index : layout.units()[unit].parameters) {
    const core::Parameter& p = layout.parameters()[index];
    if (p.trainable && decision.touched[index] && p.group >= decision.hyper.groups.size()) {
      return absl::InternalError(absl::StrCat(
          "the commit of step ", plan.step, " has ", decision.hyper.groups.size(),
          " parameter groups, parameter '", p.name, "' is in group ", p.group));
    }
  }
  return absl::OkStatus();
}

namespace {

// Weights of which there is no master: the 16-bit values at `data` are read, updated and rounded.
void UpdateInPlace(core::DType dtype, std::byte* data, Range range,
                   const std::function<void(Range, float*, kernels::Copy)>& update) {
  alignas(64) thread_local float weights[kNarrowElements];
  for (uint64_t begin = range.begin; begin < range.end; begin += kNarrowElements) {
    const Range now{begin, std::min(begin + kNarrowElements, range.end)};
    std::byte* const place = data + core::DTypeBytes(dtype) * (begin - range.begin);
    Widen(dtype, place, weights, now.size());
    update(now, weights, CopyAt(dtype, place));
  }
}

}  // namespace

void UpdateWeights(const ApplyTask& task, Range part,
                   const std::function<void(Range, float*, kernels::Copy)>& update) {
  const MoveContext& c = *task.context;
  const ShardStore& store = *c.store;
  const core::DType dtype = c.layout->dtype();
  const bool fp32 = dtype == core::DType::kFloat32;
  // Below stage 3 the window's copy of what is updated here is the one to send from; else it is
  // written here only where nobody else will (core::Job::ValidAfterApply).
  const bool to_window = c.plan->window.resident[task.unit] && (store.full() || c.stage < 3);
  if (c.plan->master_in_window) {
    task.copy.ForEach(part, [&](std::byte* data, Range piece) {
      update(piece, reinterpret_cast<float*>(data), nullptr);
    });
  } else if (!c.plan->form.masters) {
    if (void* const copy = store.copy(task.unit, part.begin)) {
      return UpdateInPlace(dtype, static_cast<std::byte*>(copy), part, update);
    }
    task.copy.ForEach(part, [&](std::byte* data, Range piece) {
      UpdateInPlace(dtype, data, piece, update);
    });
  } else if (to_window && !fp32) {
    task.copy.ForEach(part, [&](std::byte* data, Range piece) {
      update(piece, store.master(task.unit, piece.begin), CopyAt(dtype, data));
    });
  } else {
    float* const master = store.master(task.unit, part.begin);
    // In a float32 job there are none, and CopyAt is null.
    update(part, master, CopyAt(dtype, store.copy(task.unit, part.begin)));
    if (to_window) task.copy.Store(part, master);
  }
}

void Apply(const ApplyTask& task, Range range) {
  const MoveContext& c = *task.context;
  const core::Decision& decision = task.plan->decision;
  const core::Unit& unit = c.layout->units()[task.unit];
  ForEachParameter(*c.layout, task.unit, range, [&](size_t i, Range part) {
    const uint32_t index = unit.parameters[i];
    const core::Parameter& parameter = c.layout->parameters()[index];
    if (!decision.touched[index] || c.layout->IsByMatrix(parameter)) return;
    const ParameterUpdate update(c.store, c.layout->dtype(), task.unit,
                                 c.layout->optimizer(parameter.group), *task.plan, index,
                                 parameter.group, &task.sources->of[i]);
    UpdateWeights(task, part, [&](Range piece, float* weights, kernels::Copy copy) {
      update.Run(piece, weights, copy);
    });
  });
}

void Measure(MeasureTask* task, size_t first, size_t last) {
  const MoveContext& c = *task->context;
  const ShardStore& store = *c.store;
  const std::vector<uint32_t>& parameters = c.layout->units()[task->unit].parameters;
  thread_local std::vector<float> weights;
  thread_local std::vector<float> zeros;
  size_t place = 0;  // in the unit
  for (size_t i = first; i < last; ++i) {
    const core::TensorPiece& piece = task->pieces[i];
    while (parameters[place] != piece.parameter) ++place;
    const Range range = piece.elements;
    absl::InlinedVector<const float*, 8> gradients;
    for (const Source& source : task->sources->of[place]) {
      gradients.push_back(source.At(range.begin));
    }
    if (gradients.empty()) {
      if (zeros.size() < range.size()) zeros.resize(range.size());
      gradients.push_back(zeros.data());
    }
    const float* p = nullptr;
    if (!c.plan->master_in_window) {
      p = store.master(task->unit, range.begin);
    } else if (const std::byte* in_window = task->copy.Contiguous(range)) {
      p = reinterpret_cast<const float*>(in_window);
    } else {
      // A piece's squares are those of one array.
      if (weights.size() < range.size()) weights.resize(range.size());
      task->copy.Load(range, weights.data());
      p = weights.data();
    }
    const core::Group& group =
        task->plan->decision.hyper.groups[c.layout->parameters()[piece.parameter].group];
    const kernels::LambSquares squares = kernels::LambMoments(
        LambScalarsOf(group, task->plan->parameter_steps[piece.parameter],
                      task->plan->decision.grad_scale),
        gradients.data(), gradients.size(), p, store.moment(0, task->unit, range.begin),
        store.moment(1, task->unit, range.begin), range.size());
    task->squares[i] = {squares.p, squares.u};
  }
}

void Accumulate(const AccumulateTask& task, Range range) {
  const MoveContext& c = *task.context;
  ForEachParameter(*c.layout, task.unit, range, [&](size_t i, Range part) {
    if (!task.gradient.touched[i]) return;
    const StagedGradient& from = task.gradient;
    const float* const in = from.data + PlaceOf(c, task.unit, i, from.range, from.begins, part);
    float* const out = c.store->accumulator(task.unit, part.begin);
    if (task.add[i]) {
      kernels::Accumulate(in, out, part.size());
    } else {
      memcpy(out, in, part.size() * sizeof(float));
    }
  });
}

void SetAside(const SetAsideTask& task, Range range) {
  const MoveContext& c = *task.context;
  ForEachParameter(*c.layout, task.unit, range, [&](size_t i, Range part) {
    if (!task.from.touched[i]) return;
    const StagedGradient& from = task.from;
    memcpy(task.to + PlaceOf(c, task.unit, i, from.range, task.begins, part),
           from.data + PlaceOf(c, task.unit, i, from.range, from.begins, part),
           part.size() * sizeof(float));
  });
}

}  // namespace zerod::engine
