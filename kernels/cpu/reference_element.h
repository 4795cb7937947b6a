// SPDX-License-Identifier: Apache-2.0
//
// One element's arithmetic, which the plain references of all optimizers share.
#pragma once

#include <cmath>
#include <cstddef>

#include "kernels/cpu/optimizers.h"
#include "kernels/cpu/scalar_casts.h"

namespace zerod::kernels::reference {

inline void Store(const Copy& copy, size_t i, float p) {
  if (copy.bf16 != nullptr) Narrow(p, &copy.bf16[i]);
  if (copy.fp16 != nullptr) Narrow(p, &copy.fp16[i]);
}

// The scaled gradient, with L2 regularization.
inline float Gradient(float sum, float grad_scale, float l2, float p) {
  const float g = sum * grad_scale;
  return l2 == 0 ? g : std::fma(l2, p, g);
}

// start + weight * (end - start), from whichever end is nearer.
inline float Lerp(float start, float end, float weight) {
  const float distance = end - start;
  return weight < 0.5f ? std::fma(weight, distance, start)
                       : std::fma(weight - 1.0f, distance, end);
}

}  // namespace zerod::kernels::reference
