// SPDX-License-Identifier: Apache-2.0
//
// One pass over a shard: what the optimizers' vector code shares. A Rule says what becomes of one
// vector, a Master where the weights are. Compiled once for each target: no pragma once.
#if defined(ZEROD_KERNELS_CPU_PASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZEROD_KERNELS_CPU_PASS_INL_H_
#undef ZEROD_KERNELS_CPU_PASS_INL_H_
#else
#define ZEROD_KERNELS_CPU_PASS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/optimizers.h"
#include "kernels/cpu/vector_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {
#if HWY_TARGET != HWY_SCALAR

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

template <class T>
struct MasterWithCopy {
  float* p;
  T* copy;  // aligned to a pair of vectors
  HWY_INLINE void Prefetch(size_t i) const { PrefetchAhead(p + i); }
  HWY_INLINE VF Load(size_t i) const { return hn::LoadU(DF(), p + i); }
  HWY_INLINE void Store(size_t i, VF low, VF high) const {
    hn::StoreU(low, DF(), p + i);
    hn::StoreU(high, DF(), p + i + hn::Lanes(DF()));
    // Nobody here reads the copy: going past the caches saves fetching the lines to overwrite.
    hn::Stream(hn::Combine(DH2(), NarrowTo<T>(high), NarrowTo<T>(low)), DH2(), Words(copy + i));
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

HWY_INLINE VF Splat(float x) { return hn::Set(DF(), x); }

// start + weight * (end - start), from whichever end is nearer.
struct Lerp {
  explicit Lerp(float weight)
      : factor(Splat(weight < 0.5f ? weight : weight - 1.0f)),
        from_end(hn::RebindMask(
            DF(), hn::Ne(hn::Set(DU(), weight < 0.5f ? 0 : 1), hn::Zero(DU())))) {}
  HWY_INLINE VF operator()(VF start, VF end) const {
    return hn::MulAdd(factor, hn::Sub(end, start), hn::IfThenElse(from_end, end, start));
  }
  VF factor;
  hn::Mask<DF> from_end;
};

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

// --- The pass --------------------------------------------------------------------------------

template <bool kThere, class State>
HWY_INLINE State* StateAt(State* state, size_t i) {
  if constexpr (!kThere) return nullptr;
  return state + i;
}

// g (+ h, where kSources is 2) are the gradients of elements [begin, end), a multiple of two
// vectors; the others are indexed from 0. `a`, `b` and `c`: the rule's states, const where it only
// reads them; a rule of three is given the third one too.
template <size_t kSources, class Rule, class Master, class State>
HWY_INLINE void Run(const Rule& rule, const float* g, const float* h, const Master& master,
                    State* a, State* b, State* c, size_t begin, size_t end) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  const auto sum_at = [&](size_t i) HWY_ATTR {
    const VF first = hn::LoadU(d, g + (i - begin));
    if constexpr (kSources == 1) return first;
    return hn::Add(first, hn::LoadU(d, h + (i - begin)));
  };
  const auto update = [&](size_t i) HWY_ATTR {
    if constexpr (Rule::kStates > 2) {
      return rule.Update(sum_at(i), master.Load(i), a + i, b + i, c + i);
    } else {
      return rule.Update(sum_at(i), master.Load(i), StateAt<(Rule::kStates > 0)>(a, i),
                         StateAt<(Rule::kStates > 1)>(b, i));
    }
  };
  for (size_t i = begin; i < end; i += 2 * lanes) {
    for (size_t j = i; j < i + 2 * lanes; j += 64 / sizeof(float)) {
      PrefetchAhead(g + (j - begin));
      if constexpr (kSources == 2) PrefetchAhead(h + (j - begin));
      if constexpr (Rule::kStates > 0) PrefetchAhead(a + j);
      if constexpr (Rule::kStates > 1) PrefetchAhead(b + j);
      if constexpr (Rule::kStates > 2) PrefetchAhead(c + j);
      master.Prefetch(j);
    }
    const VF low = update(i);
    const VF high = update(i + lanes);
    master.Store(i, low, high);
  }
}

template <class Rule, class Master, class State>
void Body(const Rule& rule, const float* const* grads, size_t count, const Master& master,
          State* a, std::type_identity_t<State>* b, size_t begin, size_t end,
          std::type_identity_t<State>* c = nullptr) {
  if (count == 1) {
    Run<1>(rule, grads[0] + begin, nullptr, master, a, b, c, begin, end);
  } else if (count == 2) {
    Run<2>(rule, grads[0] + begin, grads[1] + begin, master, a, b, c, begin, end);
  } else {
    alignas(64) float buffer[kBlock];
    for (size_t at = begin; at < end; at += kBlock) {
      const size_t size = std::min(kBlock, end - at);
      SumBlock(grads, count, at, buffer, size);
      Run<1>(rule, buffer, nullptr, master, a, b, c, at, at + size);
    }
  }
}

// The elements before the first whole pair of vectors that is aligned in `copy` (all n where it
// has none), and the first after the last.
struct Edges {
  size_t begin;
  size_t end;
};
inline Edges FindEdges(const void* copy, size_t n) {
  const size_t pair = 2 * hn::Lanes(DF());
  const size_t over = reinterpret_cast<uintptr_t>(copy) / sizeof(uint16_t) % pair;
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
template <class Rule, class State, class Edge>
void Pass(const Rule& rule, const float* const* grads, size_t count, float* p, State* a,
          std::type_identity_t<State>* b, Copy copy, size_t n, const Edge& edge,
          std::type_identity_t<State>* c = nullptr) {
  const Edges edges = FindEdges(copy.data(), n);
  AtEdges(edges, n, grads, count, edge);
  const auto body = [&](const auto& master) {
    Body(rule, grads, count, master, a, b, edges.begin, edges.end, c);
  };
  if (copy.data() == nullptr) return body(MasterAlone{p});
  if (copy.fp16 != nullptr) {
    body(MasterWithCopy<float16>{p, copy.fp16});
  } else {
    body(MasterWithCopy<bfloat16>{p, copy.bf16});
  }
  hwy::FlushStream();
}

#endif  // HWY_TARGET != HWY_SCALAR
}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#endif  // per target
