// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit types by their number: what copies of the weights are in, and gradients on the wire.
#pragma once

#include <cstdint>

#include "daemon/core/layout.h"
#include "kernels/cpu/optimizers.h"

namespace zerod::engine {

// `data` holds elements of `dtype`: where an optimizer writes its copy. Null for float32.
kernels::Copy CopyAt(core::DType dtype, void* data);

// `out` gets `n` elements of `dtype`, rounded to nearest even. REQUIRES: not float32.
void Narrow(core::DType dtype, const float* in, void* out, uint64_t n);

// out[i] = in[i], and out[i] += in[i]; `in` holds elements of `dtype`.
void Widen(core::DType dtype, const void* in, float* out, uint64_t n);
void AccumulateWide(core::DType dtype, const void* in, float* out, uint64_t n);

}  // namespace zerod::engine
