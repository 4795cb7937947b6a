// SPDX-License-Identifier: Apache-2.0
//
// LAMB (You et al., "Large Batch Optimization for Deep Learning", Algorithm 2) on a tensor that is
// cut over shards, in two passes. A tensor's step depends on the norms of its weights and of its
// update, so the first pass, which updates the moments, returns their squares for the elements it
// was given; when the squares of all its shards are added, the second pass moves the weights. It
// computes the update again from the moments, so none is kept between the passes, and both give it
// the same bits.
//
// Squares are summed in fp64 by SquaredNorm's rule. Called once per block of the layout and added
// in layout order they give a norm whose bits do not depend on who owns which block.
//
// Notation, bits, alignment and threads as in optimizers.h; m and v begin as zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/optimizers.h"

namespace zerod::kernels {

//   g = (sum of in) * grad_scale
//   m = fma(1 - beta1, g, beta1 * m)
//   v = fma((1 - beta2) * g, g, beta2 * v)
//   d = sqrt(v) + eps                                 (eps_inside_sqrt: sqrt(v + eps))
//   u = fma(weight_decay, p, m / d)
//   p = fma(-step_size * trust_ratio, u, p)
// step_size is lr * sqrt(1 - beta2^t) / (1 - beta1^t), as DeepSpeed's FusedLamb has it: the
// correction scales the whole update, eps and decay too. Without `bias_correction` it is lr.
struct LambScalars {
  float grad_scale;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  bool eps_inside_sqrt;
  float weight_decay;
  float step_size;
};
struct LambOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  bool eps_inside_sqrt = false;
  double weight_decay = 0;
  bool bias_correction = true;
};
LambScalars MakeLambScalars(const LambOptions& options, uint64_t t, double grad_scale);

// Sums of squares of elements: of the weights before the step, and of u.
struct LambSquares {
  double p;
  double u;
};

// The first pass: updates m and v, and returns the squares of its elements.
LambSquares LambMoments(const LambScalars& s, const float* const* grads, size_t count,
                        const float* p, float* m, float* v, size_t n);

// ||p|| / ||u|| within [min_coeff, max_coeff], from the squares of a whole tensor; 1 where one of
// the norms is 0. NaN where one of the squares is.
float LambTrustRatio(const LambSquares& tensor, double min_coeff, double max_coeff);

// The second pass, after the first with the same scalars: moves p, and writes the copy.
void LambApply(const LambScalars& s, float trust_ratio, float* p, const float* m, const float* v,
               Copy copy, size_t n);

}  // namespace zerod::kernels
