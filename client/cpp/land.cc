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
  if (dtype == DType::kBFloat16) {
    const auto* __restrict values = static_cast<const uint16_t*>(from);
    for (uint64_t i = 0; i < count; ++i) to[i] = FromBf16(values[i]);
    return;
  }
#if defined(__SSE2__)
  if (count * sizeof(float) >= kStreamBytes && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    StreamCopy(to, static_cast<const float*>(from), count);
    return;
  }
#endif
  memcpy(to, from, count * sizeof(float));
}

void LandAdd(float* __restrict to, const void* from, DType dtype, uint64_t count) {
  if (dtype == DType::kBFloat16) {
    const auto* __restrict values = static_cast<const uint16_t*>(from);
    for (uint64_t i = 0; i < count; ++i) to[i] += FromBf16(values[i]);
    return;
  }
  const auto* __restrict values = static_cast<const float*>(from);
  for (uint64_t i = 0; i < count; ++i) to[i] += values[i];
}

}  // namespace zerod::client
