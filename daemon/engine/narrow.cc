// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/narrow.h"

#include <cstring>

#include "base/check.h"
#include "kernels/cpu/kernels.h"

namespace zerod::engine {

using core::DType;
using kernels::bfloat16;
using kernels::float16;

kernels::Copy CopyAt(DType dtype, void* data) {
  if (dtype == DType::kBFloat16) return static_cast<bfloat16*>(data);
  if (dtype == DType::kFloat16) return static_cast<float16*>(data);
  return nullptr;
}

void Narrow(DType dtype, const float* in, void* out, uint64_t n) {
  CHECK(dtype != DType::kFloat32);
  if (dtype == DType::kBFloat16) return kernels::CastToBf16(in, static_cast<bfloat16*>(out), n);
  kernels::CastToFp16(in, static_cast<float16*>(out), n);
}

void Widen(DType dtype, const void* in, float* out, uint64_t n) {
  switch (dtype) {
    case DType::kFloat32: memcpy(out, in, n * sizeof(float)); return;
    case DType::kBFloat16:
      return kernels::CastFromBf16(static_cast<const bfloat16*>(in), out, n);
    case DType::kFloat16: return kernels::CastFromFp16(static_cast<const float16*>(in), out, n);
  }
}

void AccumulateWide(DType dtype, const void* in, float* out, uint64_t n) {
  switch (dtype) {
    case DType::kFloat32: return kernels::Accumulate(static_cast<const float*>(in), out, n);
    case DType::kBFloat16: return kernels::Accumulate(static_cast<const bfloat16*>(in), out, n);
    case DType::kFloat16: return kernels::Accumulate(static_cast<const float16*>(in), out, n);
  }
}

}  // namespace zerod::engine
