// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/matrices.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/muon.h"

namespace zerod::engine {
namespace {

struct MatrixShape {
  size_t rows;
  size_t columns;
};

MatrixShape ShapeOf(const core::Parameter& p) {
  if (p.elements == 0) return {0, 0};
  const auto rows = static_cast<size_t>(p.shape[0]);
  return {rows, static_cast<size_t>(p.elements) / rows};
}

}  // namespace

size_t MatrixScratch(const core::Parameter& p) {
  const MatrixShape shape = ShapeOf(p);
  return p.elements + std::max(kernels::OrthogonalizeScratch(kernels::NewtonSchulz::kGram,
                                                             shape.rows, shape.columns),
                               kernels::OrthogonalizeScratch(kernels::NewtonSchulz::kStandard,
                                                             shape.rows, shape.columns));
}

void ApplyMatrix(const ApplyTask& task, size_t place, float* scratch) {
  const MoveContext& c = *task.context;
  const core::Decision& decision = task.plan->decision;
  const core::Parameter& p =
      c.layout->parameters()[c.layout->units()[task.unit].parameters[place]];
  const core::Group& group = decision.hyper.groups[p.group];
  const core::Range all{p.offset, p.offset + p.elements};
  float* const update = scratch;
  float* const rest = scratch + p.elements;
  absl::InlinedVector<const float*, 8> gradients;
  for (const Source& source : task.sources->of[place]) gradients.push_back(source.At(all.begin));
  if (gradients.empty()) {  // touched by nobody, and to be updated all the same
    std::fill_n(rest, p.elements, 0.0f);
    gradients.push_back(rest);
  }
  const kernels::MuonScalars scalars =
      kernels::MakeMuonScalars(group.lr, group.momentum, group.nesterov, group.weight_decay,
                               decision.grad_scale);
  kernels::MuonMomentum(scalars, gradients.data(), gradients.size(),
                        c.store->moment(0, task.unit, all.begin), update, p.elements);
  const MatrixShape shape = ShapeOf(p);
  kernels::Orthogonalize(group.standard_newton_schulz ? kernels::NewtonSchulz::kStandard
                                                      : kernels::NewtonSchulz::kGram,
                         update, shape.rows, shape.columns, rest);
  UpdateWeights(task, all, [&](core::Range range, float* weights, kernels::Copy copy) {
    kernels::MuonApply(scalars, update + (range.begin - all.begin), weights, copy, range.size());
  });
}

MatrixQueue::MatrixQueue(Options options, Workers* workers,
                         std::function<void(absl::Status)> failed)
    : options_(options), workers_(workers), failed_(std::move(failed)) {
  for (size_t i = 0; i < options.at_once; ++i) {
    free_.push_back(options.scratch + i * options.scratch_elements);
  }
}

void MatrixQueue::Push(std::function<void(float*)> update, std::function<void()> done) {
  waiting_.push_back({std::move(update), std::move(done)});
  Pump();
}

void MatrixQueue::Pump() {
  while (!waiting_.empty() && !free_.empty()) {
    Work work = std::move(waiting_.front());
    waiting_.pop_front();
    float* const scratch = free_.back();
    free_.pop_back();
    const absl::Status status = workers_->Run(
        1, [update = std::move(work.update), scratch](size_t) { update(scratch); },
        [this, scratch, done = std::move(work.done)] {
          free_.push_back(scratch);
          done();
          Pump();
        });
    if (!status.ok()) return failed_(status);
  }
}

}  // namespace zerod::engine
