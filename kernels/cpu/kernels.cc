// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/cpu/reference.h"

// Only targets with fused multiply-add, and with vectors that divide the norm's 16 lanes. Where a
// CPU has none of them, the static target answers with the plain reference.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_BROKEN_EMU128 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kernels.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void CastToBf16Impl(const float* in, bfloat16* out, size_t n) {
  reference::CastToBf16(in, out, n);
}
void CastFromBf16Impl(const bfloat16* in, float* out, size_t n) {
  reference::CastFromBf16(in, out, n);
}
void SumImpl(const float* const* in, size_t count, float* out, size_t n) {
  reference::Sum(in, count, out, n);
}
void AccumulateImpl(const float* in, float* out, size_t n) { reference::Accumulate(in, out, n); }
double SquaredNormImpl(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  return reference::SquaredNorm(in, count, n, nonfinite);
}
void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, bfloat16* copy, size_t n) {
  reference::AdamW(s, grads, count, p, m, v, copy, n);
}
void SplitMasterImpl(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  reference::SplitMaster(p, copy, remainder, n);
}
void JoinMasterImpl(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  reference::JoinMaster(copy, remainder, p, n);
}
void AdamWSplitImpl(const AdamWScalars& s, const float* const* grads, size_t count,
                    bfloat16* copy, uint16_t* remainder, float* m, float* v, size_t n) {
  reference::AdamWSplit(s, grads, count, copy, remainder, m, v, n);
}

#else

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DH = hn::Rebind<uint16_t, DF>;   // the 16-bit halves of a vector of floats
using DHS = hn::Rebind<int16_t, DF>;
using DH2 = hn::Twice<DH>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
using VH = hn::Vec<DH>;

// Sums of more than two gradients go through a buffer of this many elements, which stays in the
// first-level cache: two gradients at a time are read in runs long enough for the prefetchers.
constexpr size_t kBlock = 1024;

// Hardware prefetchers stop at the end of a page; each stream is fetched this far ahead.
constexpr size_t kPrefetchBytes = 512;

HWY_INLINE void PrefetchAhead(const void* p) {
  hwy::Prefetch(static_cast<const char*>(p) + kPrefetchBytes);
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

// --- Casts -----------------------------------------------------------------------------------

void CastToBf16Impl(const float* in, bfloat16* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(ToBf16(hn::LoadU(d, in + i)), DH(), out + i);
  reference::CastToBf16(in + i, out + i, n - i);
}

void CastFromBf16Impl(const bfloat16* in, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(FromBf16(hn::LoadU(DH(), in + i)), d, out + i);
  reference::CastFromBf16(in + i, out + i, n - i);
}

// --- Sums ------------------------------------------------------------------------------------

void Add(const float* a, const float* b, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    PrefetchAhead(a + i);
    PrefetchAhead(b + i);
    hn::StoreU(hn::Add(hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, out + i);
  }
  for (; i < n; ++i) out[i] = a[i] + b[i];
}

// out = (out + a) + b
void AddTwo(const float* a, const float* b, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    PrefetchAhead(a + i);
    PrefetchAhead(b + i);
    const VF first = hn::Add(hn::LoadU(d, out + i), hn::LoadU(d, a + i));
    hn::StoreU(hn::Add(first, hn::LoadU(d, b + i)), d, out + i);
  }
  for (; i < n; ++i) out[i] = (out[i] + a[i]) + b[i];
}

// One block of the sum of two or more; `out` stays in the cache between the passes.
void SumBlock(const float* const* in, size_t count, size_t begin, float* out, size_t n) {
  Add(in[0] + begin, in[1] + begin, out, n);
  size_t k = 2;
  for (; k + 2 <= count; k += 2) AddTwo(in[k] + begin, in[k + 1] + begin, out, n);
  if (k < count) Add(out, in[k] + begin, out, n);
}

void SumImpl(const float* const* in, size_t count, float* out, size_t n) {
  if (count == 1) {
    if (out != in[0] && n > 0) std::memcpy(out, in[0], n * sizeof(float));
    return;
  }
  for (size_t begin = 0; begin < n; begin += kBlock) {
    SumBlock(in, count, begin, out + begin, std::min(kBlock, n - begin));
  }
}

void AccumulateImpl(const float* in, float* out, size_t n) { Add(out, in, out, n); }

// --- Norm ------------------------------------------------------------------------------------

// 16 sums in fp64, in whichever number of vectors that takes, and the largest magnitude seen.
struct NormState {
  alignas(64) double lanes[16] = {};
  uint32_t magnitude_max = 0;
};

// n is a multiple of 16.
void NormRun(const float* g, size_t n, NormState* state) {
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

double SquaredNormImpl(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  NormState state;
  alignas(64) float buffer[kBlock];
  const size_t whole = n - n % 16;
  if (count == 1) {
    NormRun(in[0], whole, &state);
  } else {
    for (size_t begin = 0; begin < whole; begin += kBlock) {
      const size_t size = std::min(kBlock, whole - begin);
      SumBlock(in, count, begin, buffer, size);
      NormRun(buffer, size, &state);
    }
  }
  if (whole < n) {
    // Zeros change neither a sum of squares nor the largest magnitude.
    alignas(64) float tail[16] = {};
    for (size_t i = whole; i < n; ++i) {
      tail[i - whole] = in[0][i];
      for (size_t k = 1; k < count; ++k) tail[i - whole] += in[k][i];
    }
    NormRun(tail, 16, &state);
  }
  if (state.magnitude_max >= 0x7f800000) *nonfinite = true;
  for (size_t half = 8; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) state.lanes[lane] += state.lanes[lane + half];
  }
  return state.lanes[0];
}

// --- AdamW -----------------------------------------------------------------------------------

// Where the master weights are. Load one vector, store two: a pair of vectors fills a whole cache
// line of 16-bit values.
struct MasterAlone {
  float* p;
  HWY_INLINE void Prefetch(size_t i) const { PrefetchAhead(p + i); }
  HWY_INLINE VF Load(size_t i) const { return hn::LoadU(DF(), p + i); }
  HWY_INLINE void Store(size_t i, VF low, VF high) const {
    hn::StoreU(low, DF(), p + i);
    hn::StoreU(high, DF(), p + i + hn::Lanes(DF()));
  }
};

struct MasterWithCopy {
  float* p;
  bfloat16* copy;  // aligned to a pair of vectors
  HWY_INLINE void Prefetch(size_t i) const { PrefetchAhead(p + i); }
  HWY_INLINE VF Load(size_t i) const { return hn::LoadU(DF(), p + i); }
  HWY_INLINE void Store(size_t i, VF low, VF high) const {
    hn::StoreU(low, DF(), p + i);
    hn::StoreU(high, DF(), p + i + hn::Lanes(DF()));
    // Nobody here reads the copy: going past the caches saves fetching the lines to overwrite.
    hn::Stream(hn::Combine(DH2(), ToBf16(high), ToBf16(low)), DH2(), copy + i);
  }
};

struct MasterSplit {
  bfloat16* copy;
  uint16_t* remainder;
  HWY_INLINE void Prefetch(size_t i) const {
    PrefetchAhead(copy + i);
    PrefetchAhead(remainder + i);
  }
  HWY_INLINE VF Load(size_t i) const {
    return Join(hn::LoadU(DH(), copy + i), hn::LoadU(DH(), remainder + i));
  }
  HWY_INLINE void Store(size_t i, VF low, VF high) const {
    const VU a = hn::BitCast(DU(), low);
    const VU b = hn::BitCast(DU(), high);
    hn::StoreU(hn::Combine(DH2(), SplitCopy(b), SplitCopy(a)), DH2(), copy + i);
    hn::StoreU(hn::Combine(DH2(), NarrowU32(b), NarrowU32(a)), DH2(), remainder + i);
  }
};

struct AdamWVectors {
  explicit AdamWVectors(const AdamWScalars& s)
      : grad_scale(hn::Set(DF(), s.grad_scale)),
        decay(hn::Set(DF(), s.decay)),
        weight(hn::Set(DF(), s.one_minus_beta1 < 0.5f ? s.one_minus_beta1
                                                      : s.one_minus_beta1 - 1.0f)),
        from_gradient(hn::RebindMask(
            DF(), hn::Ne(hn::Set(DU(), s.one_minus_beta1 < 0.5f ? 0 : 1), hn::Zero(DU())))),
        beta2(hn::Set(DF(), s.beta2)),
        one_minus_beta2(hn::Set(DF(), s.one_minus_beta2)),
        eps(hn::Set(DF(), s.eps)),
        step_size(hn::Set(DF(), s.step_size)),
        inverse_sqrt_bias2(hn::Set(DF(), s.inverse_sqrt_bias2)) {}

  // reference.cc has the same lines for one element.
  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* v_at) const {
    const DF d;
    const VF g = hn::Mul(sum, grad_scale);
    VF m = hn::LoadU(d, m_at);
    VF v = hn::LoadU(d, v_at);
    m = hn::MulAdd(weight, hn::Sub(g, m), hn::IfThenElse(from_gradient, g, m));
    v = hn::MulAdd(hn::Mul(one_minus_beta2, g), g, hn::Mul(beta2, v));
    hn::StoreU(m, d, m_at);
    hn::StoreU(v, d, v_at);
    const VF denominator = hn::MulAdd(hn::Sqrt(v), inverse_sqrt_bias2, eps);
    return hn::Sub(hn::Mul(p, decay), hn::Div(hn::Mul(step_size, m), denominator));
  }

  VF grad_scale, decay, weight;
  hn::Mask<DF> from_gradient;
  VF beta2, one_minus_beta2, eps, step_size, inverse_sqrt_bias2;
};

// g (+ h, where kSources is 2) are the gradients of elements [begin, end), a multiple of two
// vectors; the others are indexed from 0.
template <size_t kSources, class Master>
HWY_INLINE void AdamWRun(const AdamWVectors& s, const float* g, const float* h,
                         const Master& master, float* m, float* v, size_t begin, size_t end) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  const auto sum_at = [&](size_t i) HWY_ATTR {
    const VF first = hn::LoadU(d, g + (i - begin));
    if constexpr (kSources == 1) return first;
    return hn::Add(first, hn::LoadU(d, h + (i - begin)));
  };
  for (size_t i = begin; i < end; i += 2 * lanes) {
    for (size_t j = i; j < i + 2 * lanes; j += 64 / sizeof(float)) {
      PrefetchAhead(g + (j - begin));
      if constexpr (kSources == 2) PrefetchAhead(h + (j - begin));
      PrefetchAhead(m + j);
      PrefetchAhead(v + j);
      master.Prefetch(j);
    }
    const VF low = s.Update(sum_at(i), master.Load(i), m + i, v + i);
    const size_t k = i + lanes;
    const VF high = s.Update(sum_at(k), master.Load(k), m + k, v + k);
    master.Store(i, low, high);
  }
}

template <class Master>
void AdamWBody(const AdamWScalars& scalars, const float* const* grads, size_t count,
               const Master& master, float* m, float* v, size_t begin, size_t end) {
  const AdamWVectors s(scalars);
  if (count == 1) {
    AdamWRun<1>(s, grads[0] + begin, nullptr, master, m, v, begin, end);
  } else if (count == 2) {
    AdamWRun<2>(s, grads[0] + begin, grads[1] + begin, master, m, v, begin, end);
  } else {
    alignas(64) float buffer[kBlock];
    for (size_t at = begin; at < end; at += kBlock) {
      const size_t size = std::min(kBlock, end - at);
      SumBlock(grads, count, at, buffer, size);
      AdamWRun<1>(s, buffer, nullptr, master, m, v, at, at + size);
    }
  }
}

// The elements before the first whole pair of vectors that is aligned in `copy` (all n where it
// has none), and the first after the last.
struct Edges {
  size_t begin;
  size_t end;
};
Edges FindEdges(const bfloat16* copy, size_t n) {
  const size_t pair = 2 * hn::Lanes(DF());
  const size_t over = reinterpret_cast<uintptr_t>(copy) / sizeof(bfloat16) % pair;
  const size_t begin = std::min(n, over == 0 ? 0 : pair - over);
  return {begin, n - (n - begin) % pair};
}

// Calls `edge(begin, size)` for the elements outside.
template <class Edge>
void AtEdges(const Edges& edges, size_t n, const float* const* grads, size_t count,
             const Edge& edge) {
  const float* shifted[kSourcesMax];
  const auto call = [&](size_t begin, size_t size) {
    if (size == 0) return;
    for (size_t k = 0; k < count; ++k) shifted[k] = grads[k] + begin;
    edge(shifted, begin, size);
  };
  call(0, edges.begin);
  call(edges.end, n - edges.end);
}

void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, bfloat16* copy, size_t n) {
  const Edges edges = FindEdges(copy, n);
  AtEdges(edges, n, grads, count, [&](const float* const* shifted, size_t at, size_t size) {
    reference::AdamW(s, shifted, count, p + at, m + at, v + at,
                     copy == nullptr ? nullptr : copy + at, size);
  });
  if (copy == nullptr) {
    AdamWBody(s, grads, count, MasterAlone{p}, m, v, edges.begin, edges.end);
  } else {
    AdamWBody(s, grads, count, MasterWithCopy{p, copy}, m, v, edges.begin, edges.end);
    hwy::FlushStream();
  }
}

void AdamWSplitImpl(const AdamWScalars& s, const float* const* grads, size_t count,
                    bfloat16* copy, uint16_t* remainder, float* m, float* v, size_t n) {
  const Edges edges = FindEdges(copy, n);
  AtEdges(edges, n, grads, count, [&](const float* const* shifted, size_t at, size_t size) {
    reference::AdamWSplit(s, shifted, count, copy + at, remainder + at, m + at, v + at, size);
  });
  AdamWBody(s, grads, count, MasterSplit{copy, remainder}, m, v, edges.begin, edges.end);
}

void SplitMasterImpl(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  const DU du;
  const size_t lanes = hn::Lanes(du);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VU bits = hn::BitCast(du, hn::LoadU(DF(), p + i));
    hn::StoreU(SplitCopy(bits), DH(), copy + i);
    hn::StoreU(NarrowU32(bits), DH(), remainder + i);
  }
  reference::SplitMaster(p + i, copy + i, remainder + i, n - i);
}

void JoinMasterImpl(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(Join(hn::LoadU(DH(), copy + i), hn::LoadU(DH(), remainder + i)), d, p + i);
  }
  reference::JoinMaster(copy + i, remainder + i, p + i, n - i);
}

#endif  // HWY_TARGET == HWY_SCALAR

const char* NameImpl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(NameImpl);
HWY_EXPORT(CastToBf16Impl);
HWY_EXPORT(CastFromBf16Impl);
HWY_EXPORT(SumImpl);
HWY_EXPORT(AccumulateImpl);
HWY_EXPORT(SquaredNormImpl);
HWY_EXPORT(AdamWImpl);
HWY_EXPORT(SplitMasterImpl);
HWY_EXPORT(JoinMasterImpl);
HWY_EXPORT(AdamWSplitImpl);

const char* TargetName() { return HWY_DYNAMIC_DISPATCH(NameImpl)(); }

bool ForceTarget(const char* name) {
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  if (*name == '\0') {
    hwy::GetChosenTarget().Update(usable);
    return true;
  }
  for (int64_t rest = usable | HWY_STATIC_TARGET; rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    if (std::strcmp(hwy::TargetName(target), name) != 0) continue;
    hwy::GetChosenTarget().Update(target);
    return true;
  }
  return false;
}

void CastToBf16(const float* in, bfloat16* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(CastToBf16Impl)(in, out, n);
}

void CastFromBf16(const bfloat16* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(CastFromBf16Impl)(in, out, n);
}

void Sum(const float* const* in, size_t count, float* out, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SumImpl)(in, count, out, n);
}

void Accumulate(const float* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateImpl)(in, out, n);
}

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  return HWY_DYNAMIC_DISPATCH(SquaredNormImpl)(in, count, n, nonfinite);
}

AdamWScalars MakeAdamWScalars(double lr, double beta1, double beta2, double eps,
                              double weight_decay, uint64_t t, double grad_scale) {
  const double step = static_cast<double>(t);
  AdamWScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  s.inverse_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  return s;
}

void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, bfloat16* copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWImpl)(s, grads, count, p, m, v, copy, n);
}

void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  HWY_DYNAMIC_DISPATCH(SplitMasterImpl)(p, copy, remainder, n);
}

void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  HWY_DYNAMIC_DISPATCH(JoinMasterImpl)(copy, remainder, p, n);
}

void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWSplitImpl)(s, grads, count, copy, remainder, m, v, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
