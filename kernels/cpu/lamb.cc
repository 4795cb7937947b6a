// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/lamb.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/lamb.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/norm_inl.h"
#include "kernels/cpu/pass_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

LambSquares LambMomentsImpl(const LambScalars& s, const float* const* grads, size_t count,
                            const float* p, float* m, float* v, size_t n) {
  return reference::LambMoments(s, grads, count, p, m, v, n);
}
void LambApplyImpl(const LambScalars& s, float trust_ratio, float* p, const float* m,
                   const float* v, Copy copy, size_t n) {
  reference::LambApply(s, trust_ratio, p, m, v, copy, n);
}

#else

template <bool kEpsInside>
struct LambUpdate {
  explicit LambUpdate(const LambScalars& s) : eps(Splat(s.eps)), decay(Splat(s.weight_decay)) {}

  HWY_INLINE VF operator()(VF p, VF m, VF v) const {
    const VF denominator =
        kEpsInside ? hn::Sqrt(hn::Add(v, eps)) : hn::Add(hn::Sqrt(v), eps);
    return hn::MulAdd(decay, p, hn::Div(m, denominator));
  }

  VF eps, decay;
};

// --- The first pass --------------------------------------------------------------------------

// One block, which stays in the first-level cache until its squares have been added. Updates m and
// v of its whole vectors, and gives u; returns how many elements those are.
template <bool kEpsInside>
HWY_INLINE size_t MomentsBlock(const LambScalars& s, const float* g_at, const float* p_at,
                               float* m_at, float* v_at, float* u_at, size_t n) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  const LambUpdate<kEpsInside> update(s);
  const VF grad_scale = Splat(s.grad_scale);
  const VF beta1 = Splat(s.beta1), one_minus_beta1 = Splat(s.one_minus_beta1);
  const VF beta2 = Splat(s.beta2), one_minus_beta2 = Splat(s.one_minus_beta2);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    PrefetchAhead(g_at + i);
    PrefetchAhead(p_at + i);
    PrefetchAhead(m_at + i);
    PrefetchAhead(v_at + i);
    const VF g = hn::Mul(hn::LoadU(d, g_at + i), grad_scale);
    const VF m = hn::MulAdd(one_minus_beta1, g, hn::Mul(beta1, hn::LoadU(d, m_at + i)));
    const VF v =
        hn::MulAdd(hn::Mul(one_minus_beta2, g), g, hn::Mul(beta2, hn::LoadU(d, v_at + i)));
    hn::StoreU(m, d, m_at + i);
    hn::StoreU(v, d, v_at + i);
    hn::StoreU(update(hn::LoadU(d, p_at + i), m, v), d, u_at + i);
  }
  return i;
}

template <bool kEpsInside>
LambSquares Moments(const LambScalars& s, const float* const* grads, size_t count, const float* p,
                    float* m, float* v, size_t n) {
  alignas(64) float sums[kBlock];
  alignas(64) float u[kBlock];
  NormState p_state, u_state;
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t size = std::min(kBlock, n - at);
    const float* g = grads[0] + at;
    if (count > 1) {
      SumBlock(grads, count, at, sums, size);
      g = sums;
    }
    const size_t done = MomentsBlock<kEpsInside>(s, g, p + at, m + at, v + at, u, size);
    for (size_t i = done; i < size; ++i) {
      u[i] = reference::LambMomentsAt(s, g[i], p[at + i], &m[at + i], &v[at + i]);
    }
    AddSquares(p + at, size, &p_state);
    AddSquares(u, size, &u_state);
  }
  return {Total(p_state), Total(u_state)};
}

LambSquares LambMomentsImpl(const LambScalars& s, const float* const* grads, size_t count,
                            const float* p, float* m, float* v, size_t n) {
  return s.eps_inside_sqrt ? Moments<true>(s, grads, count, p, m, v, n)
                           : Moments<false>(s, grads, count, p, m, v, n);
}

// --- The second pass: its only source is m, its only state v, which it reads. ------------------

template <bool kEpsInside>
struct LambApplyRule {
  static constexpr int kStates = 1;
  LambApplyRule(const LambScalars& s, float trust_ratio)
      : update(s), negative_rate(Splat(-(s.step_size * trust_ratio))) {}

  HWY_INLINE VF Update(VF m, VF p, const float* v_at, const float*) const {
    return hn::MulAdd(negative_rate, update(p, m, hn::LoadU(DF(), v_at)), p);
  }

  LambUpdate<kEpsInside> update;
  VF negative_rate;
};

void LambApplyImpl(const LambScalars& s, float trust_ratio, float* p, const float* m,
                   const float* v, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::LambApply(s, trust_ratio, p + at, shifted[0], v + at, copy.At(at), size);
  };
  if (s.eps_inside_sqrt) {
    Pass(LambApplyRule<true>(s, trust_ratio), &m, 1, p, v, nullptr, copy, n, edge);
  } else {
    Pass(LambApplyRule<false>(s, trust_ratio), &m, 1, p, v, nullptr, copy, n, edge);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(LambMomentsImpl);
HWY_EXPORT(LambApplyImpl);

LambScalars MakeLambScalars(const LambOptions& options, uint64_t t, double grad_scale) {
  const double step = static_cast<double>(t);
  double step_size = options.lr;
  if (options.bias_correction) {
    step_size *= std::sqrt(1.0 - std::pow(options.beta2, step)) /
                 (1.0 - std::pow(options.beta1, step));
  }
  LambScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.beta1 = static_cast<float>(options.beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - options.beta1);
  s.beta2 = static_cast<float>(options.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - options.beta2);
  s.eps = static_cast<float>(options.eps);
  s.eps_inside_sqrt = options.eps_inside_sqrt;
  s.weight_decay = static_cast<float>(options.weight_decay);
  s.step_size = static_cast<float>(step_size);
  return s;
}

LambSquares LambMoments(const LambScalars& s, const float* const* grads, size_t count,
                        const float* p, float* m, float* v, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  return HWY_DYNAMIC_DISPATCH(LambMomentsImpl)(s, grads, count, p, m, v, n);
}

float LambTrustRatio(const LambSquares& tensor, double min_coeff, double max_coeff) {
  if (tensor.p == 0 || tensor.u == 0) return 1.0f;
  const double ratio = std::sqrt(tensor.p) / std::sqrt(tensor.u);
  if (ratio < min_coeff) return static_cast<float>(min_coeff);
  if (ratio > max_coeff) return static_cast<float>(max_coeff);
  return static_cast<float>(ratio);
}

void LambApply(const LambScalars& s, float trust_ratio, float* p, const float* m, const float* v,
               Copy copy, size_t n) {
  HWY_DYNAMIC_DISPATCH(LambApplyImpl)(s, trust_ratio, p, m, v, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
