// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kernels.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/norm_inl.h"
#include "kernels/cpu/vector_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

template <class T>
void CastTo(const float* in, T* out, size_t n) {
  reference::CastTo(in, out, n);
}
template <class T>
void CastFrom(const T* in, float* out, size_t n) {
  reference::CastFrom(in, out, n);
}
template <class T>
void SumOf(const T* const* in, size_t count, float* out, size_t n) {
  reference::Sum(in, count, out, n);
}
template <class T>
void AccumulateOf(const T* in, float* out, size_t n) {
  reference::Accumulate(in, out, n);
}
double SquaredNormImpl(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  return reference::SquaredNorm(in, count, n, nonfinite);
}
void SplitMasterImpl(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  reference::SplitMaster(p, copy, remainder, n);
}
void JoinMasterImpl(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  reference::JoinMaster(copy, remainder, p, n);
}

#else

// --- Casts -----------------------------------------------------------------------------------

template <class T>
void CastTo(const float* in, T* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(NarrowTo<T>(hn::LoadU(d, in + i)), DH(), Words(out + i));
  }
  reference::CastTo(in + i, out + i, n - i);
}

template <class T>
void CastFrom(const T* in, float* out, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(LoadWide(in + i), d, out + i);
  reference::CastFrom(in + i, out + i, n - i);
}

// --- Sums ------------------------------------------------------------------------------------

template <class T>
void SumOf(const T* const* in, size_t count, float* out, size_t n) {
  if (count == 1) {
    if constexpr (std::is_same_v<T, float>) {
      if (out != in[0] && n > 0) std::memcpy(out, in[0], n * sizeof(float));
    } else {
      CastFrom(in[0], out, n);
    }
    return;
  }
  for (size_t begin = 0; begin < n; begin += kBlock) {
    SumBlock(in, count, begin, out + begin, std::min(kBlock, n - begin));
  }
}

template <class T>
void AccumulateOf(const T* in, float* out, size_t n) {
  Add(out, in, out, n);
}

// --- Norm ------------------------------------------------------------------------------------

double SquaredNormImpl(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  NormState state;
  if (count == 1) {
    AddSquares(in[0], n, &state);
  } else {
    alignas(64) float buffer[kBlock];
    for (size_t begin = 0; begin < n; begin += kBlock) {
      const size_t size = std::min(kBlock, n - begin);
      SumBlock(in, count, begin, buffer, size);
      AddSquares(buffer, size, &state);
    }
  }
  if (state.magnitude_max >= 0x7f800000) *nonfinite = true;
  return Total(state);
}

// --- The master as two halves ----------------------------------------------------------------

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

void CastToBf16Impl(const float* in, bfloat16* out, size_t n) { CastTo(in, out, n); }
void CastFromBf16Impl(const bfloat16* in, float* out, size_t n) { CastFrom(in, out, n); }
void CastToFp16Impl(const float* in, float16* out, size_t n) { CastTo(in, out, n); }
void CastFromFp16Impl(const float16* in, float* out, size_t n) { CastFrom(in, out, n); }
void SumFp32Impl(const float* const* in, size_t count, float* out, size_t n) {
  SumOf(in, count, out, n);
}
void SumBf16Impl(const bfloat16* const* in, size_t count, float* out, size_t n) {
  SumOf(in, count, out, n);
}
void SumFp16Impl(const float16* const* in, size_t count, float* out, size_t n) {
  SumOf(in, count, out, n);
}
void AccumulateFp32Impl(const float* in, float* out, size_t n) { AccumulateOf(in, out, n); }
void AccumulateBf16Impl(const bfloat16* in, float* out, size_t n) { AccumulateOf(in, out, n); }
void AccumulateFp16Impl(const float16* in, float* out, size_t n) { AccumulateOf(in, out, n); }

const char* NameImpl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(NameImpl);
HWY_EXPORT(CastToBf16Impl);
HWY_EXPORT(CastFromBf16Impl);
HWY_EXPORT(CastToFp16Impl);
HWY_EXPORT(CastFromFp16Impl);
HWY_EXPORT(SumFp32Impl);
HWY_EXPORT(SumBf16Impl);
HWY_EXPORT(SumFp16Impl);
HWY_EXPORT(AccumulateFp32Impl);
HWY_EXPORT(AccumulateBf16Impl);
HWY_EXPORT(AccumulateFp16Impl);
HWY_EXPORT(SquaredNormImpl);
HWY_EXPORT(SplitMasterImpl);
HWY_EXPORT(JoinMasterImpl);

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

void CastToFp16(const float* in, float16* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(CastToFp16Impl)(in, out, n);
}

void CastFromFp16(const float16* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(CastFromFp16Impl)(in, out, n);
}

void Sum(const float* const* in, size_t count, float* out, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SumFp32Impl)(in, count, out, n);
}

void Sum(const bfloat16* const* in, size_t count, float* out, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SumBf16Impl)(in, count, out, n);
}

void Sum(const float16* const* in, size_t count, float* out, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SumFp16Impl)(in, count, out, n);
}

void Accumulate(const float* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateFp32Impl)(in, out, n);
}

void Accumulate(const bfloat16* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateBf16Impl)(in, out, n);
}

void Accumulate(const float16* in, float* out, size_t n) {
  HWY_DYNAMIC_DISPATCH(AccumulateFp16Impl)(in, out, n);
}

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  return HWY_DYNAMIC_DISPATCH(SquaredNormImpl)(in, count, n, nonfinite);
}

void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  HWY_DYNAMIC_DISPATCH(SplitMasterImpl)(p, copy, remainder, n);
}

void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  HWY_DYNAMIC_DISPATCH(JoinMasterImpl)(copy, remainder, p, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
