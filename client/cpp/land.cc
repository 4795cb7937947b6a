// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/land.h"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace zerod::client {
namespace {

// From here on a copy leaves the caches alone: beyond what a core's L2 holds, reading the old
// lines first would be a third of the traffic.
constexpr uint64_t kStreamBytes = 512 * 1024;

float FromBf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// Exponent and fraction where binary32 has them, and the exponent's bias made up for by a product
// that is exact. No branch, so that the compiler makes vectors of it.
float FromFp16(uint16_t value) {
  const uint32_t magnitude = uint32_t{value & 0x7fffu} << 13;
  float scaled;
  memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof(bits));
  if (magnitude >= (0x7c00u << 13)) bits = magnitude | 0x7f800000;  // Inf and NaN
  bits |= uint32_t{value & 0x8000u} << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <float (*kConvert)(uint16_t)>
void Copy16(float* __restrict to, const void* from, uint64_t count) {
  const auto* __restrict values = static_cast<const uint16_t*>(from);
  for (uint64_t i = 0; i < count; ++i) to[i] = kConvert(values[i]);
}

template <float (*kConvert)(uint16_t)>
void Add16(float* __restrict to, const void* from, uint64_t count) {
  const auto* __restrict values = static_cast<const uint16_t*>(from);
  for (uint64_t i = 0; i < count; ++i) to[i] += kConvert(values[i]);
}

#if defined(__SSE2__)
// `to` is 16-byte aligned; `count` may be anything.
void StreamCopy(float* to, const float* from, uint64_t count) {
  const uint64_t body = count & ~uint64_t{15};
  for (uint64_t i = 0; i < body; i += 16) {
    const __m128 a = _mm_loadu_ps(from + i);
    const __m128 b = _mm_loadu_ps(from + i + 4);
    const __m128 c = _mm_loadu_ps(from + i + 8);
    const __m128 d = _mm_loadu_ps(from + i + 12);
    _mm_stream_ps(to + i, a);
    _mm_stream_ps(to + i + 4, b);
    _mm_stream_ps(to + i + 8, c);
    _mm_stream_ps(to + i + 12, d);
  }
  _mm_sfence();
  memcpy(to + body, from + body, (count - body) * sizeof(float));
}
#endif

}  // namespace

void LandCopy(float* __restrict to, const void* from, DType dtype, uint64_t count) {
  if (dtype == DType::kBFloat16) return Copy16<FromBf16>(to, from, count);
  if (dtype == DType::kFloat16) return Copy16<FromFp16>(to, from, count);
#if defined(__SSE2__)
  if (count * sizeof(float) >= kStreamBytes && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    StreamCopy(to, static_cast<const float*>(from), count);
    return;
  }
#endif
  memcpy(to, from, count * sizeof(float));
}

void LandAdd(float* __restrict to, const void* from, DType dtype, uint64_t count) {
  if (dtype == DType::kBFloat16) return Add16<FromBf16>(to, from, count);
  if (dtype == DType::kFloat16) return Add16<FromFp16>(to, from, count);
  const auto* __restrict values = static_cast<const float*>(from);
  for (uint64_t i = 0; i < count; ++i) to[i] += values[i];
}

}  // namespace zerod::client
