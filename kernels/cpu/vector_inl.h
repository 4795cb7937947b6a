// SPDX-License-Identifier: Apache-2.0
//
// What the vector code of all kernels shares. Compiled once for each target: no pragma once.
#if defined(ZEROD_KERNELS_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROD_KERNELS_CPU_VECTOR_INL_H_
#undef ZEROD_KERNELS_CPU_VECTOR_INL_H_
#else
#define ZEROD_KERNELS_CPU_VECTOR_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/scalar_casts.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {
#if HWY_TARGET != HWY_SCALAR

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DH = hn::Rebind<uint16_t, DF>;   // the 16-bit halves of a vector of floats
using DHS = hn::Rebind<int16_t, DF>;
using DH2 = hn::Twice<DH>;
using DF16 = hn::Rebind<hwy::float16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
using VH = hn::Vec<DH>;

// Sums of more than two gradients go through a buffer of this many elements, which stays in the
// first-level cache: two gradients at a time are read in runs long enough for the prefetchers.
constexpr size_t kBlock = 1024;

// Hardware prefetchers stop at the end of a page; each stream is fetched this far ahead.
constexpr size_t kPrefetchBytes = 512;

HWY_INLINE void PrefetchAhead(const void* p) {
  // An address and no pointer: what is ahead may be of nobody's array.
  hwy::Prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kPrefetchBytes));
}

HWY_INLINE VH NarrowU32(VU x) { return hn::TruncateTo(DH(), x); }

HWY_INLINE VH ToBf16(VF x) {
  const DU du;
  const VU bits = hn::BitCast(du, x);
  const VU high = hn::ShiftRight<16>(bits);
  const VU odd = hn::And(high, hn::Set(du, 1));
  const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
  const VU quiet = hn::Or(high, hn::Set(du, 0x40));
  return NarrowU32(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), quiet, rounded));
}

HWY_INLINE VF FromBf16(VH x) {
  const DU du;
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du, x)));
}

HWY_INLINE VH ToFp16(VF x) { return hn::BitCast(DH(), hn::DemoteTo(DF16(), x)); }

HWY_INLINE VF FromFp16(VH x) { return hn::PromoteTo(DF(), hn::BitCast(DF16(), x)); }

// --- Elements of any of the three types ------------------------------------------------------

HWY_INLINE uint16_t* Words(bfloat16* p) { return p; }
HWY_INLINE uint16_t* Words(float16* p) { return reinterpret_cast<uint16_t*>(p); }

HWY_INLINE VF LoadWide(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE VF LoadWide(const bfloat16* p) { return FromBf16(hn::LoadU(DH(), p)); }
HWY_INLINE VF LoadWide(const float16* p) {
  return FromFp16(hn::LoadU(DH(), reinterpret_cast<const uint16_t*>(p)));
}

template <class T>
HWY_INLINE VH NarrowTo(VF x) {
  if constexpr (std::is_same_v<T, float16>) return ToFp16(x);
  return ToBf16(x);
}

// --- The master as two halves ----------------------------------------------------------------

// Signed comparisons are the cheap ones, and magnitudes have no sign bit.
HWY_INLINE hn::Mask<DU> AtLeast(VU magnitude, uint32_t bound) {
  const DI di;
  return hn::RebindMask(DU(), hn::Gt(hn::BitCast(di, magnitude),
                                     hn::Set(di, static_cast<int32_t>(bound - 1))));
}

HWY_INLINE VU Magnitude(VU bits) { return hn::And(bits, hn::Set(DU(), 0x7fffffff)); }

// Returns the copy; the remainder is the low half of the same bits.
HWY_INLINE VH SplitCopy(VU bits) {
  const DU du;
  const VU magnitude = Magnitude(bits);
  VU addend = hn::Set(du, 0x8000);
  addend = hn::IfThenElse(AtLeast(magnitude, 0x7f808000), hn::Set(du, 0x7f8000), addend);
  addend = hn::IfThenZeroElse(AtLeast(magnitude, 0x7f810000), addend);
  return NarrowU32(hn::ShiftRight<16>(hn::Add(bits, addend)));
}

HWY_INLINE VF Join(VH copy, VH remainder) {
  const DU du;
  const DI di;
  const VU high = hn::ShiftLeft<16>(hn::PromoteTo(du, copy));
  const VU distance = hn::BitCast(du, hn::PromoteTo(di, hn::BitCast(DHS(), remainder)));
  const VU bits = hn::Add(high, distance);
  const VU unaliased =
      hn::IfThenElse(AtLeast(Magnitude(bits), 0x7fff8000),
                     hn::Sub(bits, hn::Set(du, 0x7f0000)), bits);
  const VU nan = hn::Or(high, hn::And(distance, hn::Set(du, 0xffff)));
  return hn::BitCast(DF(),
                     hn::IfThenElse(AtLeast(Magnitude(high), 0x7f810000), nan, unaliased));
}

// --- Sums ------------------------------------------------------------------------------------

template <class A, class B>
void Add(const A* a, const B* b, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    PrefetchAhead(a + i);
    PrefetchAhead(b + i);
    hn::StoreU(hn::Add(LoadWide(a + i), LoadWide(b + i)), d, out + i);
  }
  for (; i < n; ++i) out[i] = Widen(a[i]) + Widen(b[i]);
}

// out = (out + a) + b
template <class T>
void AddTwo(const T* a, const T* b, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    PrefetchAhead(a + i);
    PrefetchAhead(b + i);
    const VF first = hn::Add(hn::LoadU(d, out + i), LoadWide(a + i));
    hn::StoreU(hn::Add(first, LoadWide(b + i)), d, out + i);
  }
  for (; i < n; ++i) out[i] = (out[i] + Widen(a[i])) + Widen(b[i]);
}

// One block of the sum of two or more; `out` stays in the cache between the passes.
template <class T>
void SumBlock(const T* const* in, size_t count, size_t begin, float* out, size_t n) {
  Add(in[0] + begin, in[1] + begin, out, n);
  size_t k = 2;
  for (; k + 2 <= count; k += 2) AddTwo(in[k] + begin, in[k + 1] + begin, out, n);
  if (k < count) Add(out, in[k] + begin, out, n);
}

#endif  // HWY_TARGET != HWY_SCALAR
}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#endif  // per target
