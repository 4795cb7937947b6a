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
#include "kernels/cpu/vector_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, bfloat16* copy, size_t n) {
  reference::AdamW(s, grads, count, p, m, v, copy, n);
}
void AdamWSplitImpl(const AdamWScalars& s, const float* const* grads, size_t count,
                    bfloat16* copy, uint16_t* remainder, float* m, float* v, size_t n) {
  reference::AdamWSplit(s, grads, count, copy, remainder, m, v, n);
}
void LionImpl(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
              bfloat16* copy, size_t n) {
  reference::Lion(s, grads, count, p, m, copy, n);
}
void AdagradImpl(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
                 float* sum, bfloat16* copy, size_t n) {
  reference::Adagrad(s, grads, count, p, sum, copy, n);
}
void SgdImpl(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
             bfloat16* copy, size_t n) {
  reference::Sgd(s, grads, count, p, b, copy, n);
}

#else

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

// --- Rules: what becomes of one vector. reference.cc has the same lines for one element. --------

HWY_INLINE VF Splat(float x) { return hn::Set(DF(), x); }

// The scaled gradient, with L2 regularization where kL2.
template <bool kL2>
struct Gradient {
  HWY_INLINE VF operator()(VF sum, VF p) const {
    const VF g = hn::Mul(sum, grad_scale);
    if constexpr (!kL2) return g;
    return hn::MulAdd(l2, p, g);
  }
  VF grad_scale, l2;
};

template <bool kL2>
struct AdamWRule {
  static constexpr int kStates = 2;
  explicit AdamWRule(const AdamWScalars& s)
      : gradient{Splat(s.grad_scale), Splat(s.l2)},
        decay(Splat(s.decay)),
        weight(Splat(s.one_minus_beta1 < 0.5f ? s.one_minus_beta1 : s.one_minus_beta1 - 1.0f)),
        from_gradient(hn::RebindMask(
            DF(), hn::Ne(hn::Set(DU(), s.one_minus_beta1 < 0.5f ? 0 : 1), hn::Zero(DU())))),
        beta2(Splat(s.beta2)),
        one_minus_beta2(Splat(s.one_minus_beta2)),
        eps(Splat(s.eps)),
        step_size(Splat(s.step_size)),
        inverse_sqrt_bias2(Splat(s.inverse_sqrt_bias2)) {}

  HWY_INLINE VF Update(VF sum, VF p, float* m_at, float* v_at) const {
    const DF d;
    const VF g = gradient(sum, p);
    VF m = hn::LoadU(d, m_at);
    VF v = hn::LoadU(d, v_at);
    m = hn::MulAdd(weight, hn::Sub(g, m), hn::IfThenElse(from_gradient, g, m));
    v = hn::MulAdd(hn::Mul(one_minus_beta2, g), g, hn::Mul(beta2, v));
    hn::StoreU(m, d, m_at);
    hn::StoreU(v, d, v_at);
    const VF denominator = hn::MulAdd(hn::Sqrt(v), inverse_sqrt_bias2, eps);
    return hn::Sub(hn::Mul(p, decay), hn::Div(hn::Mul(step_size, m), denominator));
  }

  Gradient<kL2> gradient;
  VF decay, weight;
  hn::Mask<DF> from_gradient;
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

// --- The pass --------------------------------------------------------------------------------

template <bool kThere>
HWY_INLINE float* StateAt(float* state, size_t i) {
  if constexpr (!kThere) return nullptr;
  return state + i;
}

// g (+ h, where kSources is 2) are the gradients of elements [begin, end), a multiple of two
// vectors; the others are indexed from 0. `a` and `b`: the rule's states.
template <size_t kSources, class Rule, class Master>
HWY_INLINE void Run(const Rule& rule, const float* g, const float* h, const Master& master,
                    float* a, float* b, size_t begin, size_t end) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  const auto sum_at = [&](size_t i) HWY_ATTR {
    const VF first = hn::LoadU(d, g + (i - begin));
    if constexpr (kSources == 1) return first;
    return hn::Add(first, hn::LoadU(d, h + (i - begin)));
  };
  const auto update = [&](size_t i) HWY_ATTR {
    return rule.Update(sum_at(i), master.Load(i), StateAt<(Rule::kStates > 0)>(a, i),
                       StateAt<(Rule::kStates > 1)>(b, i));
  };
  for (size_t i = begin; i < end; i += 2 * lanes) {
    for (size_t j = i; j < i + 2 * lanes; j += 64 / sizeof(float)) {
      PrefetchAhead(g + (j - begin));
      if constexpr (kSources == 2) PrefetchAhead(h + (j - begin));
      if constexpr (Rule::kStates > 0) PrefetchAhead(a + j);
      if constexpr (Rule::kStates > 1) PrefetchAhead(b + j);
      master.Prefetch(j);
    }
    const VF low = update(i);
    const VF high = update(i + lanes);
    master.Store(i, low, high);
  }
}

template <class Rule, class Master>
void Body(const Rule& rule, const float* const* grads, size_t count, const Master& master,
          float* a, float* b, size_t begin, size_t end) {
  if (count == 1) {
    Run<1>(rule, grads[0] + begin, nullptr, master, a, b, begin, end);
  } else if (count == 2) {
    Run<2>(rule, grads[0] + begin, grads[1] + begin, master, a, b, begin, end);
  } else {
    alignas(64) float buffer[kBlock];
    for (size_t at = begin; at < end; at += kBlock) {
      const size_t size = std::min(kBlock, end - at);
      SumBlock(grads, count, at, buffer, size);
      Run<1>(rule, buffer, nullptr, master, a, b, at, at + size);
    }
  }
}

// The elements before the first whole pair of vectors that is aligned in `copy` (all n where it
// has none), and the first after the last.
struct Edges {
  size_t begin;
  size_t end;
};
inline Edges FindEdges(const bfloat16* copy, size_t n) {
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

// The whole of [0, n): `edge(gradients, begin, size)` is the plain reference.
template <class Rule, class Edge>
void Pass(const Rule& rule, const float* const* grads, size_t count, float* p, float* a, float* b,
          bfloat16* copy, size_t n, const Edge& edge) {
  const Edges edges = FindEdges(copy, n);
  AtEdges(edges, n, grads, count, edge);
  if (copy == nullptr) {
    Body(rule, grads, count, MasterAlone{p}, a, b, edges.begin, edges.end);
  } else {
    Body(rule, grads, count, MasterWithCopy{p, copy}, a, b, edges.begin, edges.end);
    hwy::FlushStream();
  }
}

void AdamWImpl(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
               float* v, bfloat16* copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::AdamW(s, shifted, count, p + at, m + at, v + at,
                     copy == nullptr ? nullptr : copy + at, size);
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
              bfloat16* copy, size_t n) {
  Pass(LionRule(s), grads, count, p, m, nullptr, copy, n,
       [&](const float* const* shifted, size_t at, size_t size) {
         reference::Lion(s, shifted, count, p + at, m + at, copy == nullptr ? nullptr : copy + at,
                         size);
       });
}

void AdagradImpl(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
                 float* sum, bfloat16* copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Adagrad(s, shifted, count, p + at, sum + at,
                       copy == nullptr ? nullptr : copy + at, size);
  };
  if (s.l2 == 0) {
    Pass(AdagradRule<false>(s), grads, count, p, sum, nullptr, copy, n, edge);
  } else {
    Pass(AdagradRule<true>(s), grads, count, p, sum, nullptr, copy, n, edge);
  }
}

template <bool kL2>
void SgdWith(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
             bfloat16* copy, size_t n) {
  const auto edge = [&](const float* const* shifted, size_t at, size_t size) {
    reference::Sgd(s, shifted, count, p + at, b == nullptr ? nullptr : b + at,
                   copy == nullptr ? nullptr : copy + at, size);
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
             bfloat16* copy, size_t n) {
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
           float* v, bfloat16* copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWImpl)(s, grads, count, p, m, v, copy, n);
}

void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdamWSplitImpl)(s, grads, count, copy, remainder, m, v, n);
}

void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          bfloat16* copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(LionImpl)(s, grads, count, p, m, copy, n);
}

void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, bfloat16* copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(AdagradImpl)(s, grads, count, p, sum, copy, n);
}

void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         bfloat16* copy, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(SgdImpl)(s, grads, count, p, b, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
