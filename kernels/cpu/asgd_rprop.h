// SPDX-License-Identifier: Apache-2.0
//
// torch.optim's two without averages of gradients: ASGD and Rprop (maximize=False,
// capturable=False), in their single-tensor forms, with torch's bits but for ASGD's rounding of
// sums that are fused here. Contracts and notation as in optimizers.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/optimizers.h"

namespace zerod::kernels {

// --- ASGD ------------------------------------------------------------------------------------
// Polyak and Juditsky's averaged descent, torch/optim/asgd.py, _single_tensor_asgd:
//   p  = fma(-eta, g, p * (1 - lambd * eta))
//   ax = ax + (p - ax) * mu, p where mu is 1
// A step's rate is what torch has made at the end of the one before: with lr' the lr of that one,
//   eta = lr' / (1 + lambd * lr' * (t - 1))^alpha, mu = 1 / max(1, t - 1 - t0)
// and lr and 1 in a parameter's first step. torch keeps both beside the parameter; here they are
// made of t and this step's lambd, alpha and t0, rounded to fp32 as torch's are.
struct AsgdScalars {
  float grad_scale;
  float l2;
  float decay;         // 1 - lambd * eta
  float negative_eta;
  float mu;
};
struct AsgdOptions {
  double lr = 1e-2;
  double lr_before = 1e-2;  // of the step before
  double lambd = 1e-4;
  double alpha = 0.75;
  double t0 = 1e6;
  double weight_decay = 0;
};
AsgdScalars MakeAsgdScalars(const AsgdOptions& options, uint64_t t, double grad_scale);
void Asgd(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
          Copy copy, size_t n);

// --- Rprop -----------------------------------------------------------------------------------
// torch/optim/rprop.py, _single_tensor_rprop:
//   sign = sign(g * prev)
//   step = clamp(step * (eta_plus, 1 or eta_minus by sign), step_min, step_max)
//   g    = 0 where sign < 0
//   p    = p - sign(g) * step                         (sign(0) = sign(NaN) = 0)
//   prev = g
// `step` (step_size) begins as lr, which has no other meaning.
struct RpropScalars {
  float grad_scale;
  float eta_minus;
  float eta_plus;
  float step_min;
  float step_max;
};
RpropScalars MakeRpropScalars(double eta_minus, double eta_plus, double step_min, double step_max,
                              double grad_scale);
void Rprop(const RpropScalars& s, const float* const* grads, size_t count, float* p, float* prev,
           float* step, Copy copy, size_t n);

}  // namespace zerod::kernels
