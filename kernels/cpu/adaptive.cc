// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/adaptive.h"

#include <cmath>

#include "base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/adaptive.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/pass_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void RmsPropImpl(const RmsPropScalars& s, const float* const* grads, size_t count, float* p,
                 float* v, float* b, float* a, Copy copy, size_t n) {
  reference::RmsProp(s, grads, count, p, v, b, a, copy, n);
}
void AdadeltaImpl(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
                  float* v, float* u, Copy copy, size_t n) {
  reference::Adadelta(s, grads, count, p, v, u, copy, n);
}
void AdamaxImpl(const AdamaxScalars& s, const float* const* grads, size_t count, float* p,
                float* m, float* u, Copy copy, size_t n) {
  reference::Adamax(s, grads, count, p, m, u, copy, n);
}
void NAdamImpl(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  reference::NAdam(s, grads, count, p, m, v, copy, n);
}
void RAdamImpl(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  reference::RAdam(s, grads, count, p, m, v, copy, n);
}

#else

// --- Rules: what becomes of one vector. reference_adaptive.cc has the same lines for one element.

// fma(rest * x, x, share * average): an average of squares, kept at `at`.
HWY_INLINE VF AverageSquare(VF share, VF rest, VF x, float* at) {
  const DF d;
  const VF average = hn::MulAdd(hn::Mul(rest, x), x, hn::Mul(share, hn::LoadU(d, at)));
  hn::StoreU(average, d, at);
  return average;
}

HWY_INLINE VF AverageBy(const Lerp& lerp, VF x, float* at) {
  const DF d;
  const VF average = lerp(hn::LoadU(d, at), x);
  hn::StoreU(average, d, at);
  return average;
}

// States: v, then b where kMomentum, then a where kCentered.
template <bool kL2, bool kMomentum, bool kCentered>
struct RmsPropRule {
  static constexpr int kStates = 1 + int{kMomentum} + int{kCentered};
  explicit RmsPropRule(const RmsPropScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        to_gradient(s.one_minus_alpha),
        lr(Splat(s.lr)),
        alpha(Splat(s.alpha)),
        one_minus_alpha(Splat(s.one_minus_alpha)),
        eps(Splat(s.eps)),
        momentum(Splat(s.momentum)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* v_at, float* second, float* third = nullptr) const {
    const DF d;
    const VF g = gradient(sum, p);
    VF square = AverageSquare(alpha, one_minus_alpha, g, v_at);
    if constexpr (kCentered) {
      const VF a = AverageBy(to_gradient, g, kMomentum ? third : second);
      square = hn::NegMulAdd(a, a, square);
    }
    const VF avg = hn::Add(hn::Sqrt(square), eps);
    if constexpr (kMomentum) {
      const VF b = hn::Add(hn::Mul(momentum, hn::LoadU(d, second)), hn::Div(g, avg));
      hn::StoreU(b, d, second);
      return hn::NegMulAdd(lr, b, p);
    }
    return hn::Sub(p, hn::Div(hn::Mul(lr, g), avg));
  }

  Gradient<kL2> gradient;
  Lerp to_gradient;
  VF lr, alpha, one_minus_alpha, eps, momentum;
};

template <bool kL2>
struct AdadeltaRule {
  static constexpr int kStates = 2;
  explicit AdadeltaRule(const AdadeltaScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        negative_lr(Splat(s.negative_lr)),
        rho(Splat(s.rho)),
        one_minus_rho(Splat(s.one_minus_rho)),
        eps(Splat(s.eps)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* v_at, float* u_at) const {
    const DF d;
    const VF g = gradient(sum, p);
    const VF v = AverageSquare(rho, one_minus_rho, g, v_at);
    const VF before = hn::Sqrt(hn::Add(hn::LoadU(d, u_at), eps));
    const VF delta = hn::Mul(hn::Div(before, hn::Sqrt(hn::Add(v, eps))), g);
    AverageSquare(rho, one_minus_rho, delta, u_at);
    return hn::MulAdd(negative_lr, delta, p);
  }

  Gradient<kL2> gradient;
  VF negative_lr, rho, one_minus_rho, eps;
};

template <bool kL2>
struct AdamaxRule {
  static constexpr int kStates = 2;
  explicit AdamaxRule(const AdamaxScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        to_gradient(s.one_minus_beta1),
        beta2(Splat(s.beta2)),
        eps(Splat(s.eps)),
        step_size(Splat(s.step_size)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* u_at) const {
    const DF d;
    const VF g = gradient(sum, p);
    const VF m = AverageBy(to_gradient, g, m_at);
    const VF before = hn::Mul(beta2, hn::LoadU(d, u_at));
    const VF now = hn::Add(hn::Abs(g), eps);
    const VF u =
        hn::IfThenElse(hn::Or(hn::Gt(before, now), hn::IsNaN(before)), before, now);
    hn::StoreU(u, d, u_at);
    return hn::Sub(p, hn::Div(hn::Mul(step_size, m), u));
  }

  Gradient<kL2> gradient;
  Lerp to_gradient;
  VF beta2, eps, step_size;
};

template <bool kL2>
struct NAdamRule {
  static constexpr int kStates = 2;
  explicit NAdamRule(const NAdamScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        to_gradient(s.one_minus_beta1),
        decay(Splat(s.decay)),
        beta2(Splat(s.beta2)),
        one_minus_beta2(Splat(s.one_minus_beta2)),
        eps(Splat(s.eps)),
        gradient_step(Splat(s.gradient_step)),
        momentum_step(Splat(s.momentum_step)),
        inverse_sqrt_bias2(Splat(s.inverse_sqrt_bias2)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* v_at) const {
    const VF g = gradient(sum, p);
    const VF m = AverageBy(to_gradient, g, m_at);
    const VF v = AverageSquare(beta2, one_minus_beta2, g, v_at);
    const VF denominator = hn::MulAdd(hn::Sqrt(v), inverse_sqrt_bias2, eps);
    const VF step = hn::MulAdd(gradient_step, g, hn::Mul(momentum_step, m));
    return hn::Sub(hn::Mul(p, decay), hn::Div(step, denominator));
  }

  Gradient<kL2> gradient;
  Lerp to_gradient;
  VF decay, beta2, one_minus_beta2, eps, gradient_step, momentum_step, inverse_sqrt_bias2;
};

template <bool kL2, bool kRectified>
struct RAdamRule {
  static constexpr int kStates = 2;
  explicit RAdamRule(const RAdamScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        to_gradient(s.one_minus_beta1),
        decay(Splat(s.decay)),
        beta2(Splat(s.beta2)),
        one_minus_beta2(Splat(s.one_minus_beta2)),
        eps(Splat(s.eps)),
        step_size(Splat(s.step_size)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* v_at) const {
    const VF g = gradient(sum, p);
    const VF m = AverageBy(to_gradient, g, m_at);
    const VF v = AverageSquare(beta2, one_minus_beta2, g, v_at);
    const VF decayed = hn::Mul(p, decay);
    if constexpr (!kRectified) return hn::NegMulAdd(step_size, m, decayed);
    return hn::Sub(decayed, hn::Div(hn::Mul(step_size, m), hn::Add(hn::Sqrt(v), eps)));
  }

  Gradient<kL2> gradient;
  Lerp to_gradient;
  VF decay, beta2, one_minus_beta2, eps, step_size;
};

// --- The functions ---------------------------------------------------------------------------

// v is the first state; the others follow in the rule's order.
template <bool kL2>
void RmsPropWith(const RmsPropScalars& s, const float* const* grads, size_t count, float* p,
                 float* v, float* b, float* a, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::RmsProp(s, shifted, count, p + at, v + at, b == nullptr ? nullptr : b + at,
                       a == nullptr ? nullptr : a + at, copy.At(at), size);
  };
  if (b != nullptr && a != nullptr) {
    Pass(RmsPropRule<kL2, true, true>(s), grads, count, p, v, b, copy, n, edge, a);
  } else if (b != nullptr) {
    Pass(RmsPropRule<kL2, true, false>(s), grads, count, p, v, b, copy, n, edge);
  } else if (a != nullptr) {
    Pass(RmsPropRule<kL2, false, true>(s), grads, count, p, v, a, copy, n, edge);
  } else {
    Pass(RmsPropRule<kL2, false, false>(s), grads, count, p, v, nullptr, copy, n, edge);
  }
}

void RmsPropImpl(const RmsPropScalars& s, const float* const* grads, size_t count, float* p,
                 float* v, float* b, float* a, Copy copy, size_t n) {
  if (s.l2 == 0) {
    RmsPropWith<false>(s, grads, count, p, v, b, a, copy, n);
  } else {
    RmsPropWith<true>(s, grads, count, p, v, b, a, copy, n);
  }
}

void AdadeltaImpl(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
                  float* v, float* u, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Adadelta(s, shifted, count, p + at, v + at, u + at, copy.At(at), size);
  };
  if (s.l2 == 0) {
    Pass(AdadeltaRule<false>(s), grads, count, p, v, u, copy, n, edge);
  } else {
    Pass(AdadeltaRule<true>(s), grads, count, p, v, u, copy, n, edge);
  }
}

void AdamaxImpl(const AdamaxScalars& s, const float* const* grads, size_t count, float* p,
                float* m, float* u, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Adamax(s, shifted, count, p + at, m + at, u + at, copy.At(at), size);
  };
  if (s.l2 == 0) {
    Pass(AdamaxRule<false>(s), grads, count, p, m, u, copy, n, edge);
  } else {
    Pass(AdamaxRule<true>(s), grads, count, p, m, u, copy, n, edge);
  }
}

void NAdamImpl(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::NAdam(s, shifted, count, p + at, m + at, v + at, copy.At(at), size);
  };
  if (s.l2 == 0) {
    Pass(NAdamRule<false>(s), grads, count, p, m, v, copy, n, edge);
  } else {
    Pass(NAdamRule<true>(s), grads, count, p, m, v, copy, n, edge);
  }
}

template <bool kL2>
void RAdamWith(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::RAdam(s, shifted, count, p + at, m + at, v + at, copy.At(at), size);
  };
  if (s.rectified) {
    Pass(RAdamRule<kL2, true>(s), grads, count, p, m, v, copy, n, edge);
  } else {
    Pass(RAdamRule<kL2, false>(s), grads, count, p, m, v, copy, n, edge);
  }
}

void RAdamImpl(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  if (s.l2 == 0) {
    RAdamWith<false>(s, grads, count, p, m, v, copy, n);
  } else {
    RAdamWith<true>(s, grads, count, p, m, v, copy, n);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(RmsPropImpl);
HWY_EXPORT(AdadeltaImpl);
HWY_EXPORT(AdamaxImpl);
HWY_EXPORT(NAdamImpl);
HWY_EXPORT(RAdamImpl);

namespace {

// mu(1) * ... * mu(t) of NAdam, in as many operations for any t. With q = 0.96^momentum_decay and
// log(1 - x) = -sum x^n / n, the logarithms of 1 - q^i / 2 add up to
// -sum over n of 2^-n / n * (q^n + q^2n + ... + q^tn), which is soon exact.
double MomentumProduct(double beta1, double momentum_decay, double t) {
  constexpr int kTerms = 64;
  const double log_q = momentum_decay * std::log(0.96);
  double logarithm = t * std::log(beta1);
  double half = 1.0;
  for (int n = 1; n <= kTerms; ++n) {
    half *= 0.5;
    const double rate = n * log_q;
    const double sum = rate == 0 ? t : std::exp(rate) * std::expm1(rate * t) / std::expm1(rate);
    logarithm -= half / n * sum;
  }
  return std::exp(logarithm);
}

}  // namespace

RmsPropScalars MakeRmsPropScalars(const RmsPropOptions& o, double grad_scale) {
  RmsPropScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(o.weight_decay);
  s.lr = static_cast<float>(o.lr);
  s.alpha = static_cast<float>(o.alpha);
  s.one_minus_alpha = static_cast<float>(1.0 - o.alpha);
  s.eps = static_cast<float>(o.eps);
  s.momentum = static_cast<float>(o.momentum);
  return s;
}

AdadeltaScalars MakeAdadeltaScalars(double lr, double rho, double eps, double weight_decay,
                                    double grad_scale) {
  AdadeltaScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(weight_decay);
  s.negative_lr = static_cast<float>(-lr);
  s.rho = static_cast<float>(rho);
  s.one_minus_rho = static_cast<float>(1.0 - rho);
  s.eps = static_cast<float>(eps);
  return s;
}

AdamaxScalars MakeAdamaxScalars(double lr, double beta1, double beta2, double eps,
                                double weight_decay, uint64_t t, double grad_scale) {
  AdamaxScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(weight_decay);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.eps = static_cast<float>(eps);
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(t))));
  return s;
}

NAdamScalars MakeNAdamScalars(const NAdamOptions& o, uint64_t t, double grad_scale) {
  const double step = static_cast<double>(t);
  const auto mu = [&](double i) {
    return o.beta1 * (1.0 - 0.5 * std::pow(0.96, i * o.momentum_decay));
  };
  const double product = MomentumProduct(o.beta1, o.momentum_decay, step);
  const double next = mu(step + 1.0);
  NAdamScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = o.decoupled ? 0.0f : static_cast<float>(o.weight_decay);
  s.decay = o.decoupled ? static_cast<float>(1.0 - o.lr * o.weight_decay) : 1.0f;
  s.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  s.beta2 = static_cast<float>(o.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  s.eps = static_cast<float>(o.eps);
  s.gradient_step = static_cast<float>(o.lr * (1.0 - mu(step)) / (1.0 - product));
  s.momentum_step = static_cast<float>(o.lr * next / (1.0 - product * next));
  s.inverse_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  return s;
}

RAdamScalars MakeRAdamScalars(const RAdamOptions& o, uint64_t t, double grad_scale) {
  const double step = static_cast<double>(t);
  const double beta2_power = std::pow(o.beta2, step);
  const double bias2 = 1.0 - beta2_power;
  const double rho_inf = 2.0 / (1.0 - o.beta2) - 1.0;
  const double rho = rho_inf - 2.0 * step * beta2_power / bias2;
  RAdamScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = o.decoupled ? 0.0f : static_cast<float>(o.weight_decay);
  s.decay = o.decoupled ? static_cast<float>(1.0 - o.lr * o.weight_decay) : 1.0f;
  s.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  s.beta2 = static_cast<float>(o.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  s.eps = static_cast<float>(o.eps);
  s.rectified = rho > 5.0;
  double step_size = o.lr / (1.0 - std::pow(o.beta1, step));
  if (s.rectified) {
    step_size *= std::sqrt(bias2) * std::sqrt((rho - 4.0) * (rho - 2.0) * rho_inf /
                                              ((rho_inf - 4.0) * (rho_inf - 2.0) * rho));
  }
  s.step_size = static_cast<float>(step_size);
  return s;
}

void RmsProp(const RmsPropScalars& s, const float* const* grads, size_t count, float* p, float* v,
             float* b, float* a, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(RmsPropImpl)(s, grads, count, p, v, b, a, copy, n);
}

void Adadelta(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
              float* v, float* u, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdadeltaImpl)(s, grads, count, p, v, u, copy, n);
}

void Adamax(const AdamaxScalars& s, const float* const* grads, size_t count, float* p, float* m,
            float* u, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamaxImpl)(s, grads, count, p, m, u, copy, n);
}

void NAdam(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(NAdamImpl)(s, grads, count, p, m, v, copy, n);
}

void RAdam(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(RAdamImpl)(s, grads, count, p, m, v, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
