// SPDX-License-Identifier: Apache-2.0
//
// torch.optim's other optimizers whose rate is each element's own: RMSprop, Adadelta, Adamax, NAdam
// and RAdam (maximize=False, capturable=False), in their single-tensor forms. Contracts and
// notation as in optimizers.h; `decay` and `l2` are those of Adam there. All divide and take square
// roots with correct rounding, which torch does not on every CPU: parameters differ from torch's by
// a few units in the last place of the update.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/optimizers.h"

namespace zerod::kernels {

// --- RMSprop ---------------------------------------------------------------------------------
// torch/optim/rmsprop.py, _single_tensor_rmsprop:
//   v   = fma((1 - alpha) * g, g, alpha * v)          (square_avg)
//   a   = fma(1 - alpha, g - a, a)                    (grad_avg, where centered; as Adam's m)
//   avg = sqrt(v) + eps, where centered sqrt(fma(-a, a, v)) + eps
//   b   = momentum * b + g / avg                      (momentum_buffer)
//   p   = fma(-lr, b, p), without momentum p - (lr * g) / avg
// Centered, v - a^2 may be below 0 by a rounding where a gradient does not change, and is NaN then
// as it is in torch. Without `b` there is no momentum, without `a` nothing is centered.
struct RmsPropScalars {
  float grad_scale;
  float l2;
  float lr;
  float alpha;
  float one_minus_alpha;
  float eps;
  float momentum;
};
struct RmsPropOptions {
  double lr = 1e-2;
  double alpha = 0.99;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum = 0;
};
RmsPropScalars MakeRmsPropScalars(const RmsPropOptions& options, double grad_scale);
void RmsProp(const RmsPropScalars& s, const float* const* grads, size_t count, float* p, float* v,
             float* b, float* a, Copy copy, size_t n);

// --- Adadelta --------------------------------------------------------------------------------
// torch/optim/adadelta.py, _single_tensor_adadelta:
//   v = fma((1 - rho) * g, g, rho * v)                (square_avg)
//   d = sqrt(u + eps) / sqrt(v + eps) * g
//   u = fma((1 - rho) * d, d, rho * u)                (acc_delta)
//   p = fma(-lr, d, p)
struct AdadeltaScalars {
  float grad_scale;
  float l2;
  float negative_lr;
  float rho;
  float one_minus_rho;
  float eps;
};
AdadeltaScalars MakeAdadeltaScalars(double lr, double rho, double eps, double weight_decay,
                                    double grad_scale);
void Adadelta(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
              float* v, float* u, Copy copy, size_t n);

// --- Adamax ----------------------------------------------------------------------------------
// torch/optim/adamax.py, _single_tensor_adamax:
//   m = as Adam's                                     (exp_avg)
//   u = max(beta2 * u, |g| + eps)                     (exp_inf; NaN where one of them is)
//   p = p - (step_size * m) / u
struct AdamaxScalars {
  float grad_scale;
  float l2;
  float one_minus_beta1;
  float beta2;
  float eps;
  float step_size;  // lr / (1 - beta1^t)
};
AdamaxScalars MakeAdamaxScalars(double lr, double beta1, double beta2, double eps,
                                double weight_decay, uint64_t t, double grad_scale);
void Adamax(const AdamaxScalars& s, const float* const* grads, size_t count, float* p, float* m,
            float* u, Copy copy, size_t n);

// --- NAdam -----------------------------------------------------------------------------------
// torch/optim/nadam.py, _single_tensor_nadam; m, v and denom as Adam's:
//   p = p * decay - fma(gradient_step, g, momentum_step * m) / denom
// with mu(i) = beta1 * (1 - 0.96^(i * momentum_decay) / 2), M(i) = mu(1) * ... * mu(i),
//   gradient_step = lr * (1 - mu(t)) / (1 - M(t)), momentum_step = lr * mu(t + 1) / (1 - M(t + 1))
// torch keeps M as `mu_product`, in fp32. Here it is made of t and this step's beta1 and
// momentum_decay, in fp64: where those change in between, it is as if they had always been the new
// ones. M vanishes within some tens / (1 - beta1) steps, and the difference with it.
struct NAdamScalars {
  float grad_scale;
  float l2;
  float decay;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float gradient_step;
  float momentum_step;
  float inverse_sqrt_bias2;
};
struct NAdamOptions {
  double lr = 2e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  double momentum_decay = 4e-3;
  bool decoupled = false;
};
NAdamScalars MakeNAdamScalars(const NAdamOptions& options, uint64_t t, double grad_scale);
void NAdam(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);

// --- RAdam -----------------------------------------------------------------------------------
// torch/optim/radam.py, _single_tensor_radam; m and v as Adam's, and with
// rho_inf = 2 / (1 - beta2) - 1 and rho = rho_inf - 2 * t * beta2^t / (1 - beta2^t),
//   p = p * decay - (step_size * m) / (sqrt(v) + eps) where rho > 5, else
//   p = fma(-step_size, m, p * decay)
struct RAdamScalars {
  float grad_scale;
  float l2;
  float decay;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  // lr / (1 - beta1^t), and where rectified times sqrt(1 - beta2^t) and the rectification
  // sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).
  float step_size;
  bool rectified;
};
struct RAdamOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  bool decoupled = false;
};
RAdamScalars MakeRAdamScalars(const RAdamOptions& options, uint64_t t, double grad_scale);
void RAdam(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);

}  // namespace zerod::kernels
