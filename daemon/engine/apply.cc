// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/apply.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "daemon/engine/narrow.h"
#include "kernels/cpu/optimizers.h"

namespace zerod::engine {
namespace {

using core::Range;

// The gradient of a parameter that nobody touched but that is to be updated all the same.
constexpr uint64_t kZeroElements = 16 * 1024;
const float kZeros[kZeroElements] = {};

// One parameter's part of one step.
class ParameterUpdate {
 public:
  // `t`: the steps that this parameter has taken, this one included.
  ParameterUpdate(const ShardStore* store, core::UnitIndex unit, core::OptimizerKind kind,
                  const core::Group& group, uint64_t t, double grad_scale,
                  const absl::InlinedVector<Source, 4>* sources)
      : store_(*store), unit_(unit), kind_(kind), group_(group), t_(t), sources_(*sources) {
    switch (kind) {
      case core::OptimizerKind::kAdam:
        adam_ = kernels::MakeAdamWScalars(group.lr, group.beta1, group.beta2, group.eps,
                                          group.weight_decay, t, grad_scale, group.decoupled,
                                          group.bias_correction);
        break;
      case core::OptimizerKind::kLion:
        lion_ = kernels::MakeLionScalars(group.lr, group.beta1, group.beta2, group.weight_decay,
                                         grad_scale);
        break;
      case core::OptimizerKind::kAdagrad:
        adagrad_ = kernels::MakeAdagradScalars(group.lr, group.lr_decay, group.eps,
                                               group.weight_decay, t, grad_scale);
        break;
      case core::OptimizerKind::kSgd:
      case core::OptimizerKind::kSgdMomentum:
        sgd_ = kernels::MakeSgdScalars(group.lr, group.momentum, group.dampening,
                                       group.weight_decay, group.nesterov, t, grad_scale);
        break;
    }
  }

  // `p` and `copy` are of the first element of `range`.
  void Run(Range range, float* p, kernels::Copy copy) const {
    const uint64_t step = sources_.empty() ? kZeroElements : range.size();
    for (uint64_t begin = range.begin; begin < range.end; begin += step) {
      const uint64_t done = begin - range.begin;
      const uint64_t n = std::min(step, range.end - begin);
      absl::InlinedVector<const float*, 8> gradients;
      for (const Source& source : sources_) gradients.push_back(source.At(begin));
      if (gradients.empty()) gradients.push_back(kZeros);
      RunPiece(gradients, begin, p + done, copy.At(done), n);
    }
  }

 private:
  void RunPiece(const absl::InlinedVector<const float*, 8>& gradients, uint64_t begin, float* p,
                kernels::Copy copy, uint64_t n) const {
    const float* const* const in = gradients.data();
    const size_t count = gradients.size();
    float* const first = store_.moment(0, unit_, begin);
    switch (kind_) {
      case core::OptimizerKind::kAdam:
        return kernels::AdamW(adam_, in, count, p, first, store_.moment(1, unit_, begin), copy, n);
      case core::OptimizerKind::kLion:
        return kernels::Lion(lion_, in, count, p, first, copy, n);
      case core::OptimizerKind::kAdagrad:
        if (t_ == 1 && group_.initial_accumulator_value != 0) {
          std::fill(first, first + n, static_cast<float>(group_.initial_accumulator_value));
        }
        return kernels::Adagrad(adagrad_, in, count, p, first, copy, n);
      case core::OptimizerKind::kSgd:
        return kernels::Sgd(sgd_, in, count, p, nullptr, copy, n);
      case core::OptimizerKind::kSgdMomentum:
        return kernels::Sgd(sgd_, in, count, p, first, copy, n);
    }
  }

  const ShardStore& store_;
  const core::UnitIndex unit_;
  const core::OptimizerKind kind_;
  const core::Group& group_;
  const uint64_t t_;
  const absl::InlinedVector<Source, 4>& sources_;
  union {
    kernels::AdamWScalars adam_;
    kernels::LionScalars lion_;
    kernels::AdagradScalars adagrad_;
    kernels::SgdScalars sgd_;
  };
};

// Where the elements `part` of the unit's i-th parameter lie, if its first one lies at begins[i].
uint64_t PlaceOf(const MoveContext& c, core::UnitIndex u, size_t i,
                 const std::vector<uint64_t>& begins, Range part) {
  const core::Parameter& p = c.layout->parameters()[c.layout->units()[u].parameters[i]];
  return begins[i] + (part.begin - p.offset);
}

}  // namespace

absl::Status CheckApply(const ApplyTask& task) {
  const core::Layout& layout = *task.context->layout;
  const core::Decision& decision = task.plan->decision;
  const size_t parameters = layout.parameters().size();
  if (decision.touched.size() != parameters || task.plan->parameter_steps.size() != parameters) {
    return absl::InternalError(
        absl::StrCat("the commit of step ", task.plan->step, " speaks of ",
                     decision.touched.size(), " parameters, the layout has ", parameters));
  }
  for (uint32_t index : layout.units()[task.unit].parameters) {
    const core::Parameter& p = layout.parameters()[index];
    if (p.trainable && decision.touched[index] && p.group >= decision.hyper.groups.size()) {
      return absl::InternalError(absl::StrCat(
          "the commit of step ", task.plan->step, " has ", decision.hyper.groups.size(),
          " parameter groups, parameter '", p.name, "' is in group ", p.group));
    }
  }
  return absl::OkStatus();
}

void Apply(const ApplyTask& task, Range range) {
  const MoveContext& c = *task.context;
  const ShardStore& store = *c.store;
  const core::Decision& decision = task.plan->decision;
  const core::Unit& unit = c.layout->units()[task.unit];
  const core::DType dtype = c.layout->dtype();
  const bool fp32 = dtype == core::DType::kFloat32;
  // Below stage 3 the window's copy of what is updated here is the one to send from; else it is
  // written here only where nobody else will (core::Job::ValidAfterApply).
  const bool to_window = c.plan->window.resident[task.unit] && (store.full() || c.stage < 3);
  ForEachParameter(*c.layout, task.unit, range, [&](size_t i, Range part) {
    const uint32_t index = unit.parameters[i];
    if (!decision.touched[index]) return;
    const uint32_t group = c.layout->parameters()[index].group;
    const ParameterUpdate update(&store, task.unit, c.layout->optimizer(group),
                                 decision.hyper.groups[group], task.plan->parameter_steps[index],
                                 decision.grad_scale, &task.sources->of[i]);
    if (c.plan->master_in_window) {
      task.copy.ForEach(part, [&](std::byte* data, Range piece) {
        update.Run(piece, reinterpret_cast<float*>(data), nullptr);
      });
    } else if (to_window && !fp32) {
      task.copy.ForEach(part, [&](std::byte* data, Range piece) {
        update.Run(piece, store.master(task.unit, piece.begin), CopyAt(dtype, data));
      });
    } else {
      float* const master = store.master(task.unit, part.begin);
      // In a float32 job there are none, and CopyAt is null.
      update.Run(part, master, CopyAt(dtype, store.copy(task.unit, part.begin)));
      if (to_window) task.copy.Store(part, master);
    }
  });
}

void Accumulate(const AccumulateTask& task, Range range) {
  const MoveContext& c = *task.context;
  ForEachParameter(*c.layout, task.unit, range, [&](size_t i, Range part) {
    if (!task.gradient.touched[i]) return;
    const StagedGradient& from = task.gradient;
    const float* const in = from.data + PlaceOf(c, task.unit, i, from.begins, part);
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
    memcpy(task.to + PlaceOf(c, task.unit, i, task.begins, part),
           task.from.data + PlaceOf(c, task.unit, i, task.from.begins, part),
           part.size() * sizeof(float));
  });
}

}  // namespace zerod::engine
