// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/update_rule.h"

#include <algorithm>

#include "base/check.h"

namespace zerod::engine {
namespace {

using core::Group;
using core::OptimizerKind;

UpdateRule::RmsProp RmsPropOf(OptimizerKind kind, const Group& g, double grad_scale) {
  return {kernels::MakeRmsPropScalars({g.lr, g.alpha, g.eps, g.weight_decay, g.momentum},
                                      grad_scale),
          core::HasMomentum(kind), core::IsCentered(kind)};
}

UpdateRule::Scalars ScalarsOf(OptimizerKind kind, const Group& g, uint64_t t, double grad_scale,
                              const core::TensorSquares& squares) {
  switch (kind) {
    case OptimizerKind::kAdam:
      return kernels::MakeAdamWScalars(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, t, grad_scale,
                                       g.decoupled, g.bias_correction);
    case OptimizerKind::kLion:
      return kernels::MakeLionScalars(g.lr, g.beta1, g.beta2, g.weight_decay, grad_scale);
    case OptimizerKind::kAdagrad:
      return kernels::MakeAdagradScalars(g.lr, g.lr_decay, g.eps, g.weight_decay, t, grad_scale);
    case OptimizerKind::kSgd:
    case OptimizerKind::kSgdMomentum:
      return kernels::MakeSgdScalars(g.lr, g.momentum, g.dampening, g.weight_decay, g.nesterov, t,
                                     grad_scale);
    case OptimizerKind::kLamb:
      return UpdateRule::Lamb{LambScalarsOf(g, t, grad_scale),
                              kernels::LambTrustRatio({squares.weight, squares.update},
                                                      g.min_coeff, g.max_coeff)};
    case OptimizerKind::kMuon:
      break;
    case OptimizerKind::kRmsProp:
    case OptimizerKind::kRmsPropMomentum:
    case OptimizerKind::kRmsPropCentered:
    case OptimizerKind::kRmsPropCenteredMomentum:
      return RmsPropOf(kind, g, grad_scale);
    case OptimizerKind::kAdadelta:
      return kernels::MakeAdadeltaScalars(g.lr, g.rho, g.eps, g.weight_decay, grad_scale);
    case OptimizerKind::kAdamax:
      return kernels::MakeAdamaxScalars(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, t,
                                        grad_scale);
    case OptimizerKind::kNAdam:
      return kernels::MakeNAdamScalars(
          {g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.momentum_decay, g.decoupled}, t,
          grad_scale);
    case OptimizerKind::kRAdam:
      return kernels::MakeRAdamScalars(
          {g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.decoupled}, t, grad_scale);
    case OptimizerKind::kAsgd:
      return kernels::MakeAsgdScalars(
          {g.lr, g.lr_before, g.lambd, g.alpha, g.t0, g.weight_decay}, t, grad_scale);
    case OptimizerKind::kRprop:
      return kernels::MakeRpropScalars(g.eta_minus, g.eta_plus, g.step_min, g.step_max,
                                       grad_scale);
  }
  CHECK(false) << "a parameter that is updated by matrix is no rule's";
  return kernels::SgdScalars{};
}

// --- One call per kernel: its states by name. --------------------------------------------------

void Compute(const kernels::AdamWScalars& s, const Elements& e) {
  kernels::AdamW(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const kernels::LionScalars& s, const Elements& e) {
  kernels::Lion(s, e.gradients, e.count, e.p, e.states[0], e.copy, e.n);
}
void Compute(const kernels::AdagradScalars& s, const Elements& e) {
  kernels::Adagrad(s, e.gradients, e.count, e.p, e.states[0], e.copy, e.n);
}
void Compute(const kernels::SgdScalars& s, const Elements& e) {
  kernels::Sgd(s, e.gradients, e.count, e.p, e.states[0], e.copy, e.n);
}
void Compute(const UpdateRule::Lamb& s, const Elements& e) {
  kernels::LambApply(s.scalars, s.trust_ratio, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const UpdateRule::RmsProp& s, const Elements& e) {
  float* const b = s.momentum ? e.states[1] : nullptr;
  float* const a = !s.centered ? nullptr : e.states[s.momentum ? 2 : 1];
  kernels::RmsProp(s.scalars, e.gradients, e.count, e.p, e.states[0], b, a, e.copy, e.n);
}
void Compute(const kernels::AdadeltaScalars& s, const Elements& e) {
  kernels::Adadelta(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const kernels::AdamaxScalars& s, const Elements& e) {
  kernels::Adamax(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const kernels::NAdamScalars& s, const Elements& e) {
  kernels::NAdam(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const kernels::RAdamScalars& s, const Elements& e) {
  kernels::RAdam(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}
void Compute(const kernels::AsgdScalars& s, const Elements& e) {
  kernels::Asgd(s, e.gradients, e.count, e.p, e.states[0], e.copy, e.n);
}
void Compute(const kernels::RpropScalars& s, const Elements& e) {
  kernels::Rprop(s, e.gradients, e.count, e.p, e.states[0], e.states[1], e.copy, e.n);
}

}  // namespace

kernels::LambScalars LambScalarsOf(const Group& group, uint64_t t, double grad_scale) {
  kernels::LambOptions options;
  options.lr = group.lr;
  options.beta1 = group.beta1;
  options.beta2 = group.beta2;
  options.eps = group.eps;
  options.eps_inside_sqrt = group.eps_inside_sqrt;
  options.weight_decay = group.weight_decay;
  options.bias_correction = group.bias_correction;
  return kernels::MakeLambScalars(options, t, grad_scale);
}

UpdateRule::UpdateRule(OptimizerKind kind, const Group& group, uint64_t t, double grad_scale,
                       const core::TensorSquares& squares)
    : scalars_(ScalarsOf(kind, group, t, grad_scale, squares)) {
  if (t != 1) return;
  if (kind == OptimizerKind::kAdagrad) {
    beginning_ = {0, static_cast<float>(group.initial_accumulator_value)};
  } else if (kind == OptimizerKind::kRprop) {
    beginning_ = {1, static_cast<float>(group.lr)};
  }
}

void UpdateRule::Run(const Elements& elements) const {
  if (beginning_.value != 0) {
    std::fill_n(elements.states[beginning_.state], elements.n, beginning_.value);
  }
  std::visit([&](const auto& scalars) { Compute(scalars, elements); }, scalars_);
}

}  // namespace zerod::engine
