// SPDX-License-Identifier: Apache-2.0
//
// Sums of squares by SquaredNorm's rule (kernels.h): 16 lanes in fp64. Compiled once for each
// target: no pragma once.
#if defined(ZEROD_KERNELS_CPU_NORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROD_KERNELS_CPU_NORM_INL_H_
#undef ZEROD_KERNELS_CPU_NORM_INL_H_
#else
#define ZEROD_KERNELS_CPU_NORM_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/vector_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {
#if HWY_TARGET != HWY_SCALAR

// 16 sums in fp64, in whichever number of vectors that takes, and the largest magnitude seen.
struct NormState {
  alignas(64) double lanes[16] = {};
  uint32_t magnitude_max = 0;
};

// n is a multiple of 16.
inline void AddWholeSquares(const float* g, size_t n, NormState* state) {
  using DD = hn::ScalableTag<double>;
  using DHalf = hn::Rebind<float, DD>;
  const DD dd;
  const DHalf dh;
  const hn::RebindToUnsigned<DHalf> du;
  const hn::RebindToSigned<DHalf> di;
  const size_t lanes = hn::Lanes(dd);
  // Vectors are kept in registers only where they are variables of their own: 16 lanes are 2, 4 or
  // 8 vectors of doubles.
  constexpr size_t kVectors = 16 / hn::MaxLanes(DD());
  hn::Vec<DD> sums[kVectors];
  for (size_t j = 0; j < kVectors; ++j) sums[j] = hn::Load(dd, state->lanes + j * lanes);
  auto largest = hn::Zero(di);
  for (size_t i = 0; i < n; i += 16) {
    PrefetchAhead(g + i);
    for (size_t j = 0; j < kVectors; ++j) {
      const auto narrow = hn::LoadU(dh, g + i + j * lanes);
      const auto magnitude = hn::And(hn::BitCast(du, narrow), hn::Set(du, 0x7fffffff));
      largest = hn::Max(largest, hn::BitCast(di, magnitude));
      const auto wide = hn::PromoteTo(dd, narrow);
      // The square of a float is exact in fp64, so that fusing the sum changes nothing.
      sums[j] = hn::MulAdd(wide, wide, sums[j]);
    }
  }
  for (size_t j = 0; j < kVectors; ++j) hn::Store(sums[j], dd, state->lanes + j * lanes);
  const auto most = static_cast<uint32_t>(hn::GetLane(hn::MaxOfLanes(di, largest)));
  state->magnitude_max = std::max(state->magnitude_max, most);
}

// Adds g's squares; after an n that is no multiple of 16 nothing can be added.
inline void AddSquares(const float* g, size_t n, NormState* state) {
  const size_t whole = n - n % 16;
  AddWholeSquares(g, whole, state);
  if (whole == n) return;
  // Zeros change neither a sum of squares nor the largest magnitude.
  alignas(64) float tail[16] = {};
  std::copy(g + whole, g + n, tail);
  AddWholeSquares(tail, 16, state);
}

inline double Total(const NormState& state) {
  double lanes[16];
  std::copy(state.lanes, state.lanes + 16, lanes);
  for (size_t half = 8; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

#endif  // HWY_TARGET != HWY_SCALAR
}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#endif  // per target
