// SPDX-License-Identifier: Apache-2.0
//
// Optimizers on shards, one pass each: a function sums the `count` (1..kSourcesMax) gradients of
// its elements, updates the fp32 master p and its state in place, and where `copy` is not null
// writes the 16-bit copy of p, bfloat16 or float16, as CastToBf16 and CastToFp16 round. The copy is
// written past the caches, and visible to others as any store is when the function has returned.
// Bits, alignment and threads as in kernels.h; state begins as zeros unless said otherwise.
//
// Notation: fma(a, b, c) is a * b + c rounded once, all else is rounded each time, in fp32, from
// scalars that are derived in fp64. Everywhere, in this order,
//   g = (sum of in) * grad_scale
//   g = fma(l2, p, g)          where weight decay is L2 regularization (left out where l2 is 0)
// t is the parameter's own count of applied steps, from 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace zerod::kernels {

// Where the 16-bit copy goes. Callers pass a pointer to either type, or nullptr, which converts.
struct Copy {
  Copy(std::nullptr_t) {}
  Copy(bfloat16* data) : bf16(data) {}
  Copy(float16* data) : fp16(data) {}

  void* data() const { return bf16 != nullptr ? static_cast<void*>(bf16) : fp16; }
  // The copy of the elements from i on.
  Copy At(size_t i) const {
    if (fp16 != nullptr) return fp16 + i;
    return bf16 == nullptr ? nullptr : bf16 + i;
  }

  bfloat16* bf16 = nullptr;  // one of the two at most
  float16* fp16 = nullptr;
};

// --- Adam and AdamW --------------------------------------------------------------------------
// torch.optim.AdamW and torch.optim.Adam (amsgrad=False, maximize=False), single-tensor form
// (torch/optim/adam.py, _single_tensor_adam), in the order in which torch's kernels compute it:
//   m      = fma(1 - beta1, g - m, m)                 (lerp; where 1 - beta1 >= 0.5, as torch,
//                                                      fma((1 - beta1) - 1, g - m, g))
//   v      = fma((1 - beta2) * g, g, beta2 * v)       (addcmul)
//   denom  = fma(sqrt(v), 1 / sqrt(bias_correction2), eps)
//   p      = p * decay - (step_size * m) / denom      (addcdiv)
// With torch 2.13 on AVX2 and AVX-512 m and v have torch's bits (without l2). denom has not: torch
// divides by sqrt(bias_correction2), adds eps apart, and its square root is not always correctly
// rounded; p differs from torch's by that few units in the last place of the update. weight_decay 0
// leaves p's decay out exactly.
struct AdamWScalars {
  float grad_scale;       // 1 / (world * loss scale) * clip factor
  float l2;               // Adam: weight_decay
  float decay;            // AdamW: 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float step_size;              // lr / (1 - beta1^t)
  float inverse_sqrt_bias2;     // 1 / sqrt(1 - beta2^t)
};
// `decoupled`: AdamW's weight decay; false: Adam's. Without `bias_correction` both are 1.
AdamWScalars MakeAdamWScalars(double lr, double beta1, double beta2, double eps,
                              double weight_decay, uint64_t t, double grad_scale,
                              bool decoupled = true, bool bias_correction = true);
void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);
// The same with the master as two halves (kernels.h).
void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n);

// --- Lion ------------------------------------------------------------------------------------
// Chen et al., "Symbolic Discovery of Optimization Algorithms", Algorithm 2:
//   u = fma(1 - beta1, g, beta1 * m)
//   p = p * decay - lr * sign(u)                      (sign(0) = 0, sign(NaN) = NaN)
//   m = fma(1 - beta2, g, beta2 * m)
struct LionScalars {
  float grad_scale;
  float decay;            // 1 - lr * weight_decay
  float lr;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
};
LionScalars MakeLionScalars(double lr, double beta1, double beta2, double weight_decay,
                            double grad_scale);
void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          Copy copy, size_t n);

// --- Adagrad ---------------------------------------------------------------------------------
// torch.optim.Adagrad (torch/optim/adagrad.py, _single_tensor_adagrad):
//   sum = fma(g, g, sum)                              (begins as initial_accumulator_value)
//   p   = p - (clr * g) / (sqrt(sum) + eps)           (clr = lr / (1 + (t - 1) * lr_decay))
struct AdagradScalars {
  float grad_scale;
  float l2;
  float clr;
  float eps;
};
AdagradScalars MakeAdagradScalars(double lr, double lr_decay, double eps, double weight_decay,
                                  uint64_t t, double grad_scale);
void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, Copy copy, size_t n);

// --- SGD -------------------------------------------------------------------------------------
// torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd):
//   b = fma(weight, g, momentum * b)                  (weight = 1 - dampening, 1 where t is 1)
//   g = b, with Nesterov's momentum fma(momentum, b, g)
//   p = fma(-lr, g, p)
// With `b` null there is no momentum, and no state.
struct SgdScalars {
  float grad_scale;
  float l2;
  float negative_lr;
  float momentum;
  float weight;
  bool nesterov;
};
SgdScalars MakeSgdScalars(double lr, double momentum, double dampening, double weight_decay,
                          bool nesterov, uint64_t t, double grad_scale);
void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         Copy copy, size_t n);

}  // namespace zerod::kernels
