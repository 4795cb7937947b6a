// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/types.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace zerod::core {
namespace {

absl::Status Refuse(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("STEP with hyper-parameters that the optimizer ",
                                                 "cannot use: ", what));
}

bool IsShare(double v) { return v >= 0 && v < 1; }
bool IsSize(double v) { return std::isfinite(v) && v >= 0; }

bool IsRmsProp(OptimizerKind kind) {
  return kind >= OptimizerKind::kRmsProp && kind <= OptimizerKind::kRmsPropCenteredMomentum;
}

bool HasBetas(OptimizerKind kind) {
  return kind == OptimizerKind::kAdam || kind == OptimizerKind::kLion ||
         kind == OptimizerKind::kLamb || kind == OptimizerKind::kAdamax ||
         kind == OptimizerKind::kNAdam || kind == OptimizerKind::kRAdam;
}

bool HasEps(OptimizerKind kind) {
  return (HasBetas(kind) && kind != OptimizerKind::kLion) || kind == OptimizerKind::kAdagrad ||
         kind == OptimizerKind::kAdadelta || IsRmsProp(kind);
}

absl::Status CheckRmsProp(OptimizerKind kind, const Group& g) {
  if (!IsSize(g.alpha) || !IsSize(g.momentum)) {
    return Refuse("alpha and momentum must be finite and not negative");
  }
  if (!HasMomentum(kind) && g.momentum != 0) {
    return Refuse("the job was begun without momentum, so there is no memory for it");
  }
  if (IsCentered(kind) != g.centered) {
    return Refuse("whether an RMSprop is centered is fixed when the job is begun");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckGroup(OptimizerKind kind, const Group& g) {
  if (!std::isfinite(g.lr) || !std::isfinite(g.weight_decay)) {
    return Refuse("lr and weight_decay must be finite");
  }
  if (HasBetas(kind) && (!IsShare(g.beta1) || !IsShare(g.beta2))) {
    return Refuse("betas must lie in [0, 1)");
  }
  if (HasEps(kind) && !IsSize(g.eps)) {
    return Refuse("eps must be finite and not negative");
  }
  if (IsRmsProp(kind)) return CheckRmsProp(kind, g);
  switch (kind) {
    case OptimizerKind::kAdagrad:
      if (IsSize(g.lr_decay) && IsSize(g.initial_accumulator_value)) break;
      return Refuse("lr_decay and initial_accumulator_value must be finite and not negative");
    case OptimizerKind::kLamb:
      if (std::isfinite(g.max_coeff) && g.min_coeff >= 0 && g.min_coeff <= g.max_coeff) break;
      return Refuse("min_coeff must not be negative nor above max_coeff, which must be finite");
    case OptimizerKind::kMuon:
      if (IsShare(g.momentum)) break;
      return Refuse("momentum must lie in [0, 1)");
    case OptimizerKind::kSgd:
      if (g.momentum == 0 && !g.nesterov) break;
      return Refuse("the job was begun without momentum, so there is no memory for it");
    case OptimizerKind::kSgdMomentum:
      if (IsSize(g.momentum) && std::isfinite(g.dampening)) break;
      return Refuse("momentum and dampening must be finite, momentum not negative");
    case OptimizerKind::kAdadelta:
      if (IsSize(g.rho) && g.rho <= 1) break;
      return Refuse("rho must lie in [0, 1]");
    case OptimizerKind::kNAdam:
      if (IsSize(g.momentum_decay)) break;
      return Refuse("momentum_decay must be finite and not negative");
    case OptimizerKind::kAsgd:
      if (std::isfinite(g.lambd) && std::isfinite(g.alpha) && std::isfinite(g.t0) &&
          std::isfinite(g.lr_before)) {
        break;
      }
      return Refuse("lambd, alpha, t0 and the lr of the step before must be finite");
    case OptimizerKind::kRprop:
      if (0 < g.eta_minus && g.eta_minus < 1 && 1 < g.eta_plus && std::isfinite(g.eta_plus) &&
          std::isfinite(g.step_min) && std::isfinite(g.step_max)) {
        break;
      }
      return Refuse("etas must lie in (0, 1) and above 1, step_sizes must be finite");
    default:
      break;
  }
  return absl::OkStatus();
}

absl::Status CheckProgress(const OptimizerProgress& progress, size_t parameters, bool fp16) {
  const auto refuse = [](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("RESTORE of ", what...));
  };
  if (progress.parameter_steps.size() != parameters) {
    return refuse(progress.parameter_steps.size(), " parameters' steps, the layout has ",
                  parameters);
  }
  for (const uint64_t steps : progress.parameter_steps) {
    if (steps > kCountMax) return refuse(steps, " steps of a parameter: no job takes so many");
  }
  if (!progress.loss_scaler.has_value()) return absl::OkStatus();
  const LossScalerState& s = *progress.loss_scaler;
  if (!fp16) return refuse("a loss scale, which only a job in fp16 has");
  if (!std::isfinite(s.scale) || s.scale <= 0) {
    return refuse("the loss scale ", s.scale, ", which must be finite and above 0");
  }
  if (s.hysteresis < 1 || s.hysteresis > kCountMax || s.iterations > kCountMax ||
      s.last_overflow < -1 ||
      (s.last_overflow >= 0 && static_cast<uint64_t>(s.last_overflow) >= s.iterations)) {
    return refuse("a loss scaler with cur_hysteresis ", s.hysteresis, ", cur_iter ", s.iterations,
                  " and last_overflow_iter ", s.last_overflow,
                  ": the first must be above 0, the last from -1 to below cur_iter");
  }
  return absl::OkStatus();
}

Hash128 OptimizerProgress::Hash() const {
  Hasher h;
  h.Add(uint64_t{parameter_steps.size()});
  for (const uint64_t steps : parameter_steps) h.Add(steps);
  h.Add(uint64_t{loss_scaler.has_value()});
  if (loss_scaler.has_value()) {
    h.Add(loss_scaler->scale).Add(loss_scaler->iterations);
    h.Add(static_cast<uint64_t>(loss_scaler->last_overflow)).Add(loss_scaler->hysteresis);
  }
  return h.Finish();
}

Hash128 HyperParameters::Hash() const {
  Hasher h;
  h.Add(max_norm).Add(loss_scale).Add(uint64_t{groups.size()});
  for (const Group& g : groups) {
    h.Add(g.lr).Add(g.beta1).Add(g.beta2).Add(g.eps).Add(g.weight_decay).Add(g.momentum);
    h.Add(g.dampening).Add(g.lr_decay).Add(g.initial_accumulator_value);
    h.Add(uint64_t{g.decoupled}).Add(uint64_t{g.bias_correction}).Add(uint64_t{g.nesterov});
    h.Add(g.min_coeff).Add(g.max_coeff).Add(uint64_t{g.eps_inside_sqrt});
    h.Add(uint64_t{g.standard_newton_schulz}).Add(uint64_t{g.centered});
    h.Add(g.alpha).Add(g.rho).Add(g.momentum_decay).Add(g.eta_minus).Add(g.eta_plus);
    h.Add(g.step_min).Add(g.step_max).Add(g.lambd).Add(g.t0).Add(g.lr_before);
  }
  return h.Finish();
}

}  // namespace zerod::core
