// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/asgd_rprop.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/asgd_rprop.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/pass_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void AsgdImpl(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
              Copy copy, size_t n) {
  reference::Asgd(s, grads, count, p, ax, copy, n);
}
void RpropImpl(const RpropScalars& s, const float* const* grads, size_t count, float* p,
               float* prev, float* step, Copy copy, size_t n) {
  reference::Rprop(s, grads, count, p, prev, step, copy, n);
}

#else

// Rules: what becomes of one vector. reference_adaptive.cc has the same lines for one element.

template <bool kL2, bool kAverages>
struct AsgdRule {
  static constexpr int kStates = 1;
  explicit AsgdRule(const AsgdScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        decay(Splat(s.decay)),
        negative_eta(Splat(s.negative_eta)),
        mu(Splat(s.mu)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* ax_at, float*) const {
    const DF d;
    const VF g = gradient(sum, p);
    const VF next = hn::MulAdd(negative_eta, g, hn::Mul(p, decay));
    VF ax = next;
    if constexpr (kAverages) {
      const VF before = hn::LoadU(d, ax_at);
      ax = hn::Add(before, hn::Mul(hn::Sub(next, before), mu));
    }
    hn::StoreU(ax, d, ax_at);
    return next;
  }

  Gradient<kL2> gradient;
  VF decay, negative_eta, mu;
};

struct RpropRule {
  static constexpr int kStates = 2;
  explicit RpropRule(const RpropScalars& s)
      : gradient{Splat(s.grad_scale), Splat(0)},
        eta_minus(Splat(s.eta_minus)),
        eta_plus(Splat(s.eta_plus)),
        step_min(Splat(s.step_min)),
        step_max(Splat(s.step_max)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* prev_at, float* step_at) const {
    const DF d;
    const VF zero = hn::Zero(d);
    VF g = gradient(sum, p);
    const VF product = hn::Mul(g, hn::LoadU(d, prev_at));
    const auto turned = hn::Lt(product, zero);
    VF step = hn::LoadU(d, step_at);
    step = hn::IfThenElse(hn::Gt(product, zero), hn::Mul(step, eta_plus), step);
    step = hn::IfThenElse(turned, hn::Mul(step, eta_minus), step);
    step = hn::IfThenElse(hn::Lt(step, step_min), step_min, step);
    step = hn::IfThenElse(hn::Gt(step, step_max), step_max, step);
    g = hn::IfThenElse(turned, zero, g);
    hn::StoreU(step, d, step_at);
    hn::StoreU(g, d, prev_at);
    const VF move = hn::IfThenElse(hn::Gt(hn::Abs(g), zero), hn::CopySign(step, g), zero);
    return hn::Sub(p, move);
  }

  Gradient<false> gradient;
  VF eta_minus, eta_plus, step_min, step_max;
};

template <bool kL2>
void AsgdWith(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
              Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Asgd(s, shifted, count, p + at, ax + at, copy.At(at), size);
  };
  if (s.mu == 1) {
    Pass(AsgdRule<kL2, false>(s), grads, count, p, ax, nullptr, copy, n, edge);
  } else {
    Pass(AsgdRule<kL2, true>(s), grads, count, p, ax, nullptr, copy, n, edge);
  }
}

void AsgdImpl(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
              Copy copy, size_t n) {
  if (s.l2 == 0) {
    AsgdWith<false>(s, grads, count, p, ax, copy, n);
  } else {
    AsgdWith<true>(s, grads, count, p, ax, copy, n);
  }
}

void RpropImpl(const RpropScalars& s, const float* const* grads, size_t count, float* p,
               float* prev, float* step, Copy copy, size_t n) {
  Pass(RpropRule(s), grads, count, p, prev, step, copy, n,
       [&](const float* const* shifted, size_t at, size_t size) {
         reference::Rprop(s, shifted, count, p + at, prev + at, step + at, copy.At(at), size);
       });
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(AsgdImpl);
HWY_EXPORT(RpropImpl);

AsgdScalars MakeAsgdScalars(const AsgdOptions& o, uint64_t t, double grad_scale) {
  const double before = static_cast<double>(t) - 1.0;
  double eta = o.lr;
  double mu = 1.0;
  if (t > 1) {
    eta = o.lr_before / std::pow(1.0 + o.lambd * o.lr_before * before, o.alpha);
    mu = 1.0 / std::max(1.0, before - o.t0);
  }
  const double rounded = static_cast<double>(static_cast<float>(eta));
  AsgdScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(o.weight_decay);
  s.decay = static_cast<float>(1.0 - o.lambd * rounded);
  s.negative_eta = static_cast<float>(-eta);
  s.mu = static_cast<float>(mu);
  return s;
}

RpropScalars MakeRpropScalars(double eta_minus, double eta_plus, double step_min, double step_max,
                              double grad_scale) {
  RpropScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.eta_minus = static_cast<float>(eta_minus);
  s.eta_plus = static_cast<float>(eta_plus);
  s.step_min = static_cast<float>(step_min);
  s.step_max = static_cast<float>(step_max);
  return s;
}

void Asgd(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
          Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AsgdImpl)(s, grads, count, p, ax, copy, n);
}

void Rprop(const RpropScalars& s, const float* const* grads, size_t count, float* p, float* prev,
           float* step, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(RpropImpl)(s, grads, count, p, prev, step, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
