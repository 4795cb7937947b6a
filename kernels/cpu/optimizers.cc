// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/optimizers.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/optimizers.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/pass_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  reference::AdamW(s, grads, count, p, m, v, copy, n);
}
void AdamWSplitImpl(const AdamWScalars& s, const float* const* grads, size_t count,
                    bfloat16* copy, uint16_t* remainder, float* m, float* v, size_t n) {
  reference::AdamWSplit(s, grads, count, copy, remainder, m, v, n);
}
void LionImpl(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
              Copy copy, size_t n) {
  reference::Lion(s, grads, count, p, m, copy, n);
}
void AdagradImpl(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
                 float* sum, Copy copy, size_t n) {
  reference::Adagrad(s, grads, count, p, sum, copy, n);
}
void SgdImpl(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
             Copy copy, size_t n) {
  reference::Sgd(s, grads, count, p, b, copy, n);
}

#else

// --- Rules: what becomes of one vector. reference.cc has the same lines for one element. --------

template <bool kL2>
struct AdamWRule {
  static constexpr int kStates = 2;
  explicit AdamWRule(const AdamWScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        decay(Splat(s.decay)),
        to_gradient(s.one_minus_beta1),
        beta2(Splat(s.beta2)),
        one_minus_beta2(Splat(s.one_minus_beta2)),
        eps(Splat(s.eps)),
        step_size(Splat(s.step_size)),
        inverse_sqrt_bias2(Splat(s.inverse_sqrt_bias2)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* v_at) const {
    const DF d;
    const VF g = gradient(sum, p);
    const VF m = to_gradient(hn::LoadU(d, m_at), g);
    const VF v =
        hn::MulAdd(hn::Mul(one_minus_beta2, g), g, hn::Mul(beta2, hn::LoadU(d, v_at)));
    hn::StoreU(m, d, m_at);
    hn::StoreU(v, d, v_at);
    const VF denominator = hn::MulAdd(hn::Sqrt(v), inverse_sqrt_bias2, eps);
    return hn::Sub(hn::Mul(p, decay), hn::Div(hn::Mul(step_size, m), denominator));
  }

  Gradient<kL2> gradient;
  VF decay;
  Lerp to_gradient;
  VF beta2, one_minus_beta2, eps, step_size, inverse_sqrt_bias2;
};

struct LionRule {
  static constexpr int kStates = 1;
  explicit LionRule(const LionScalars& s)
      : gradient{Splat(s.grad_scale), Splat(0)},
        decay(Splat(s.decay)),
        lr(Splat(s.lr)),
        beta1(Splat(s.beta1)),
        one_minus_beta1(Splat(s.one_minus_beta1)),
        beta2(Splat(s.beta2)),
        one_minus_beta2(Splat(s.one_minus_beta2)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float*) const {
    const DF d;
    const VF g = gradient(sum, p);
    const VF m = hn::LoadU(d, m_at);
    const VF u = hn::MulAdd(one_minus_beta1, g, hn::Mul(beta1, m));
    hn::StoreU(hn::MulAdd(one_minus_beta2, g, hn::Mul(beta2, m)), d, m_at);
    const VF step = hn::IfThenElse(hn::Gt(hn::Abs(u), hn::Zero(d)), hn::CopySign(lr, u), u);
    return hn::Sub(hn::Mul(p, decay), step);
  }

  Gradient<false> gradient;
  VF decay, lr, beta1, one_minus_beta1, beta2, one_minus_beta2;
};

template <bool kL2>
struct AdagradRule {
  static constexpr int kStates = 1;
  explicit AdagradRule(const AdagradScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)}, clr(Splat(s.clr)), eps(Splat(s.eps)) {}

  HWY_INLINE VF Update(VF in, VF p, float* sum_at, float*) const {
    const DF d;
    const VF g = gradient(in, p);
    const VF sum = hn::MulAdd(g, g, hn::LoadU(d, sum_at));
    hn::StoreU(sum, d, sum_at);
    return hn::Sub(p, hn::Div(hn::Mul(clr, g), hn::Add(hn::Sqrt(sum), eps)));
  }

  Gradient<kL2> gradient;
  VF clr, eps;
};

template <bool kL2, bool kMomentum, bool kNesterov>
struct SgdRule {
  static constexpr int kStates = kMomentum ? 1 : 0;
  explicit SgdRule(const SgdScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        negative_lr(Splat(s.negative_lr)),
        momentum(Splat(s.momentum)),
        weight(Splat(s.weight)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* b_at, float*) const {
    const DF d;
    VF g = gradient(sum, p);
    if constexpr (kMomentum) {
      const VF b = hn::MulAdd(weight, g, hn::Mul(momentum, hn::LoadU(d, b_at)));
      hn::StoreU(b, d, b_at);
      g = kNesterov ? hn::MulAdd(momentum, b, g) : b;
    }
    return hn::MulAdd(negative_lr, g, p);
  }

  Gradient<kL2> gradient;
  VF negative_lr, momentum, weight;
};

// --- The functions ---------------------------------------------------------------------------

void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::AdamW(s, shifted, count, p + at, m + at, v + at, copy.At(at), size);
  };
  if (s.l2 == 0) {
    Pass(AdamWRule<false>(s), grads, count, p, m, v, copy, n, edge);
  } else {
    Pass(AdamWRule<true>(s), grads, count, p, m, v, copy, n, edge);
  }
}

template <class Rule>
void SplitBody(const Rule& rule, const float* const* grads, size_t count, bfloat16* copy,
               uint16_t* remainder, float* m, float* v, const Edges& edges) {
  Body(rule, grads, count, MasterSplit{copy, remainder}, m, v, edges.begin, edges.end);
}

void AdamWSplitImpl(const AdamWScalars& s, const float* const* grads, size_t count,
                    bfloat16* copy, uint16_t* remainder, float* m, float* v, size_t n) {
  const Edges edges = FindEdges(copy, n);
  AtEdges(edges, n, grads, count, [&](const float* const* shifted, size_t at, size_t size) {
    reference::AdamWSplit(s, shifted, count, copy + at, remainder + at, m + at, v + at, size);
  });
  if (s.l2 == 0) {
    SplitBody(AdamWRule<false>(s), grads, count, copy, remainder, m, v, edges);
  } else {
    SplitBody(AdamWRule<true>(s), grads, count, copy, remainder, m, v, edges);
  }
}

void LionImpl(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
              Copy copy, size_t n) {
  Pass(LionRule(s), grads, count, p, m, nullptr, copy, n,
       [&](const float* const* shifted, size_t at, size_t size) {
         reference::Lion(s, shifted, count, p + at, m + at, copy.At(at), size);
       });
}

void AdagradImpl(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
                 float* sum, Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Adagrad(s, shifted, count, p + at, sum + at, copy.At(at), size);
  };
  if (s.l2 == 0) {
    Pass(AdagradRule<false>(s), grads, count, p, sum, nullptr, copy, n, edge);
  } else {
    Pass(AdagradRule<true>(s), grads, count, p, sum, nullptr, copy, n, edge);
  }
}

template <bool kL2>
void SgdWith(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
             Copy copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Sgd(s, shifted, count, p + at, b == nullptr ? nullptr : b + at, copy.At(at), size);
  };
  if (b == nullptr) {
    Pass(SgdRule<kL2, false, false>(s), grads, count, p, b, nullptr, copy, n, edge);
  } else if (s.nesterov) {
    Pass(SgdRule<kL2, true, true>(s), grads, count, p, b, nullptr, copy, n, edge);
  } else {
    Pass(SgdRule<kL2, true, false>(s), grads, count, p, b, nullptr, copy, n, edge);
  }
}

void SgdImpl(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
             Copy copy, size_t n) {
  if (s.l2 == 0) {
    SgdWith<false>(s, grads, count, p, b, copy, n);
  } else {
    SgdWith<true>(s, grads, count, p, b, copy, n);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(AdamWImpl);
HWY_EXPORT(AdamWSplitImpl);
HWY_EXPORT(LionImpl);
HWY_EXPORT(AdagradImpl);
HWY_EXPORT(SgdImpl);

AdamWScalars MakeAdamWScalars(double lr, double beta1, double beta2, double eps,
                              double weight_decay, uint64_t t, double grad_scale, bool decoupled,
                              bool bias_correction) {
  const double step = static_cast<double>(t);
  const double bias1 = bias_correction ? 1.0 - std::pow(beta1, step) : 1.0;
  const double bias2 = bias_correction ? 1.0 - std::pow(beta2, step) : 1.0;
  AdamWScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  s.decay = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  s.step_size = static_cast<float>(lr / bias1);
  s.inverse_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(bias2));
  return s;
}

LionScalars MakeLionScalars(double lr, double beta1, double beta2, double weight_decay,
                            double grad_scale) {
  LionScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.lr = static_cast<float>(lr);
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  return s;
}

AdagradScalars MakeAdagradScalars(double lr, double lr_decay, double eps, double weight_decay,
                                  uint64_t t, double grad_scale) {
  AdagradScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(weight_decay);
  s.clr = static_cast<float>(lr / (1.0 + (static_cast<double>(t) - 1.0) * lr_decay));
  s.eps = static_cast<float>(eps);
  return s;
}

SgdScalars MakeSgdScalars(double lr, double momentum, double dampening, double weight_decay,
                          bool nesterov, uint64_t t, double grad_scale) {
  SgdScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = static_cast<float>(weight_decay);
  s.negative_lr = static_cast<float>(-lr);
  s.momentum = static_cast<float>(momentum);
  s.weight = t == 1 ? 1.0f : static_cast<float>(1.0 - dampening);
  s.nesterov = nesterov;
  return s;
}

void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWImpl)(s, grads, count, p, m, v, copy, n);
}

void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWSplitImpl)(s, grads, count, copy, remainder, m, v, n);
}

void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(LionImpl)(s, grads, count, p, m, copy, n);
}

void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdagradImpl)(s, grads, count, p, sum, copy, n);
}

void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         Copy copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SgdImpl)(s, grads, count, p, b, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
