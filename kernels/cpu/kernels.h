// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic on shards, for CPUs: Highway code chosen at run time (AVX2, AVX-512). Each
// function gives the same bits on every target, because each element is computed by the same
// sequence of correctly rounded operations (mul, add, fma, sqrt, div), and each reduction by a
// fixed tree of 16 lanes whatever the vector width. The plain references in reference.h have the
// same bits too and are what the tests compare with.
//
// All pointers are to at least `n` elements, aligned to their element type, and do not overlap
// unless said otherwise. n == 0 is allowed. Functions are thread-safe as far as callers use
// disjoint outputs; none allocates or spawns: the engine cuts work into pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zerod::kernels {

using bfloat16 = uint16_t;  // the upper 16 bits of an IEEE binary32

inline constexpr size_t kSourcesMax = 64;  // gradients that one call can sum

// The target that the dispatch chose: "AVX2", "AVX3", ... For logs and tests.
const char* TargetName();
// Tests: restricts dispatch to one target by name; false where this CPU has none such.
// Empty: back to the best.
bool ForceTarget(const char* name);

// --- Casts -----------------------------------------------------------------------------------
// Round to nearest even; a NaN stays a NaN (quiet, sign kept).
void CastToBf16(const float* in, bfloat16* out, size_t n);
void CastFromBf16(const bfloat16* in, float* out, size_t n);

// --- Sums of gradients -----------------------------------------------------------------------
// out[i] = ((in[0][i] + in[1][i]) + in[2][i]) + ...; count 1..kSourcesMax. `out` may be in[0].
void Sum(const float* const* in, size_t count, float* out, size_t n);
// out[i] += in[i].
void Accumulate(const float* in, float* out, size_t n);

// --- Norm ------------------------------------------------------------------------------------
// The sum of squares, in fp64, of g[i] = (in[0][i] + in[1][i] + ...) as Sum gives it, over
// elements [0, n): lane l (0..15) adds the squares of the elements i with i % 16 == l, in order
// of i; the lanes are added as a binary tree: (l, l+8), (l, l+4), (l, l+2), (l, l+1).
// A caller gets bits that do not depend on its own cutting by calling it once per block.
// *nonfinite is set to true where a g[i] is Inf or NaN, else left alone.
double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite);

// --- AdamW -----------------------------------------------------------------------------------
// torch.optim.AdamW(amsgrad=False, maximize=False), single-tensor form
// (torch/optim/adamw.py, _single_tensor_adam), per element:
//   g      = (sum of in) * grad_scale
//   p      = p * (1 - lr * weight_decay)
//   m      = m + (1 - beta1) * (g - m)              (lerp)
//   v      = beta2 * v + (1 - beta2) * g * g
//   denom  = sqrt(v) / sqrt(bias_correction2) + eps
//   p      = p - (lr / bias_correction1) * m / denom
// computed in fp32 from the scalars below, which the caller derives in fp64.
struct AdamWScalars {
  float grad_scale;       // 1 / (world * loss scale) * clip factor
  float decay;            // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float step_size;              // lr / (1 - beta1^t)
  float inverse_sqrt_bias2;     // 1 / sqrt(1 - beta2^t)
};
AdamWScalars MakeAdamWScalars(double lr, double beta1, double beta2, double eps,
                              double weight_decay, uint64_t t, double grad_scale);

// One pass: sums the `count` (1..kSourcesMax) gradients, updates p (fp32 master), m, v in place,
// and where `copy` is not null writes the 16-bit copy of p (round to nearest even).
void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, bfloat16* copy, size_t n);

// The same with the fp32 master kept as its bf16 copy plus a 16-bit remainder:
// p = Join(copy, remainder), exact for every bit pattern (Split rounds half away from zero, so
// `copy` differs from CastToBf16 in ties alone).
void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n);
void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n);
void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n);

}  // namespace zerod::kernels
