// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/muon.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/muon.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/pass_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void MuonMomentumImpl(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                      float* u, size_t n) {
  reference::MuonMomentum(s, grads, count, m, u, n);
}
void MuonApplyImpl(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n) {
  reference::MuonApply(s, u, p, copy, n);
}

#else

// u, in the master's place: it is written and not read.
struct UpdateOut {
  float* u;
  HWY_INLINE void Prefetch(size_t) const {}
  HWY_INLINE VF Load(size_t) const { return hn::Zero(DF()); }
  HWY_INLINE void Store(size_t i, VF low, VF high) const {
    hn::StoreU(low, DF(), u + i);
    hn::StoreU(high, DF(), u + i + hn::Lanes(DF()));
  }
};

template <bool kNesterov>
struct MuonMomentumRule {
  static constexpr int kStates = 1;
  explicit MuonMomentumRule(const MuonScalars& s)
      : grad_scale(Splat(s.grad_scale)),
        to_gradient(s.one_minus_momentum),
        to_momentum(s.momentum) {}

  HWY_INLINE VF Update(VF sum, VF, float* m_at, float*) const {
    const DF d;
    const VF g = hn::Mul(sum, grad_scale);
    const VF m = to_gradient(hn::LoadU(d, m_at), g);
    hn::StoreU(m, d, m_at);
    return kNesterov ? to_momentum(g, m) : m;
  }

  VF grad_scale;
  Lerp to_gradient, to_momentum;
};

struct MuonApplyRule {
  static constexpr int kStates = 0;
  explicit MuonApplyRule(const MuonScalars& s)
      : decay(Splat(s.decay)), negative_lr(Splat(s.negative_lr)) {}

  HWY_INLINE VF Update(VF u, VF p, float*, float*) const {
    return hn::MulAdd(negative_lr, u, hn::Mul(p, decay));
  }

  VF decay, negative_lr;
};

void MuonMomentumImpl(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                      float* u, size_t n) {
  const Edges edges = FindEdges(nullptr, n);
  AtEdges(edges, n, grads, count, [&](const float* const* shifted, size_t at, size_t size) {
    reference::MuonMomentum(s, shifted, count, m + at, u + at, size);
  });
  const auto body = [&](const auto& rule) {
    Body(rule, grads, count, UpdateOut{u}, m, nullptr, edges.begin, edges.end);
  };
  if (s.nesterov) {
    body(MuonMomentumRule<true>(s));
  } else {
    body(MuonMomentumRule<false>(s));
  }
}

void MuonApplyImpl(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n) {
  float* const no_state = nullptr;
  Pass(MuonApplyRule(s), &u, 1, p, no_state, nullptr, copy, n,
       [&](const float* const* shifted, size_t at, size_t size) {
         reference::MuonApply(s, shifted[0], p + at, copy.At(at), size);
       });
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(MuonMomentumImpl);
HWY_EXPORT(MuonApplyImpl);

namespace {

// The quintic whose slope at zero is steep: five rounds bring singular values from 0.01 to 1 to
// about 0.7 to 1.2.
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr int kRounds = 5;
constexpr int kRestart = 2;  // kGram: the round before which it begins anew from the matrix

// A matrix with its shorter side, s. The wide X, s x longer, is it or its transpose.
struct Shape {
  Shape(size_t rows_in, size_t columns_in)
      : rows(rows_in),
        columns(columns_in),
        s(std::min(rows, columns)),
        longer(std::max(rows, columns)) {}
  size_t rows, columns, s, longer;

  MatrixView Wide(const float* x) const {
    const MatrixView view{x, columns, 1};
    return rows > columns ? view.Transposed() : view;
  }
};

struct Newton {
  Shape shape;
  float* packing;

  // out = X X'
  void Gram(const float* x, float* out) const {
    const MatrixView wide = shape.Wide(x);
    Multiply({.a = wide,
              .b = wide.Transposed(),
              .rows = shape.s,
              .depth = shape.longer,
              .columns = shape.s,
              .symmetric = true},
             out, packing);
  }

  // out = scale * addend + f g, all of them polynomials in one symmetric matrix: so f g is
  // symmetric too.
  void Small(const float* f, const float* g, const float* addend, float scale, float* out) const {
    const size_t s = shape.s;
    Multiply({.a = {f, s, 1},
              .b = {g, s, 1},
              .rows = s,
              .depth = s,
              .columns = s,
              .addend = addend,
              .addend_scale = scale,
              .symmetric = true},
             out, packing);
  }

  // out = scale * X + f X; f is symmetric, so that with a tall X it is X f.
  void Apply(const float* f, const float* x, float scale, float* out) const {
    const MatrixView matrix{x, shape.columns, 1}, small{f, shape.s, 1};
    const bool tall = shape.rows > shape.columns;
    Multiply({.a = tall ? matrix : small,
              .b = tall ? small : matrix,
              .rows = shape.rows,
              .depth = shape.s,
              .columns = shape.columns,
              .addend = scale == 0 ? nullptr : x,
              .addend_scale = scale},
             out, packing);
  }

  // out = b R + c R^2
  void Polynomial(const float* r, float* out) const {
    Small(r, r, nullptr, 0, out);
    for (size_t i = 0; i < shape.s * shape.s; ++i) out[i] = kB * r[i] + kC * out[i];
  }
};

// Both begin from x, use x and `other` in turn, and return where the result is.
const float* IterateStandard(const Newton& newton, float* x, float* other, float* scratch) {
  float* const gram = scratch;
  float* const polynomial = scratch + newton.shape.s * newton.shape.s;
  for (int round = 0; round < kRounds; ++round, std::swap(x, other)) {
    newton.Gram(x, gram);
    newton.Polynomial(gram, polynomial);
    newton.Apply(polynomial, x, kA, other);
  }
  return x;
}

const float* IterateGram(const Newton& newton, float* x, float* other, float* scratch) {
  const size_t s = newton.shape.s, small = s * s;
  float* const r = scratch;
  float* q = scratch + small;
  float* const z = scratch + 2 * small;
  float* spare = scratch + 3 * small;
  newton.Gram(x, r);
  for (int round = 0; round < kRounds; ++round) {
    const bool begins = round == 0 || round == kRestart;
    if (round == kRestart) {
      newton.Apply(q, x, 0, other);
      std::swap(x, other);
      newton.Gram(x, r);
    }
    // X = (aI + Z) X, for this round: gathered in Q until X is needed.
    newton.Polynomial(r, z);
    if (begins) {
      std::copy(z, z + small, q);
      for (size_t i = 0; i < s; ++i) q[i * s + i] += kA;
    } else {
      newton.Small(z, q, q, kA, spare);
      std::swap(q, spare);
    }
    if (round + 1 == kRounds || round + 1 == kRestart) continue;
    newton.Small(z, r, r, kA, spare);  // R = (aI + Z) R (aI + Z)
    newton.Small(z, spare, spare, kA, r);
  }
  newton.Apply(q, x, 0, other);
  return other;
}

}  // namespace

MuonScalars MakeMuonScalars(double lr, double momentum, bool nesterov, double weight_decay,
                            double grad_scale) {
  MuonScalars s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.momentum = static_cast<float>(momentum);
  s.one_minus_momentum = static_cast<float>(1.0 - momentum);
  s.nesterov = nesterov;
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.negative_lr = static_cast<float>(-lr);
  return s;
}

void MuonMomentum(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                  float* u, size_t n) {
  DCHECK(count >= 1 && count <= kSourcesMax) << count;
  HWY_DYNAMIC_DISPATCH(MuonMomentumImpl)(s, grads, count, m, u, n);
}

size_t OrthogonalizeScratch(NewtonSchulz method, size_t rows, size_t columns) {
  const size_t small = std::min(rows, columns);
  const size_t matrices = method == NewtonSchulz::kGram && rows != columns ? 4 : 2;
  return rows * columns + matrices * small * small + kProductScratch;
}

void Orthogonalize(NewtonSchulz method, float* u, size_t rows, size_t columns, float* scratch) {
  const size_t n = rows * columns;
  if (n == 0) return;
  float* const other = scratch;
  float* const packing = other + n;
  float* const small = packing + kProductScratch;
  bool nonfinite = false;
  const double norm = std::sqrt(SquaredNorm(&u, 1, n, &nonfinite));
  const auto inverse = static_cast<float>(1.0 / (norm + 1e-7));
  for (size_t i = 0; i < n; ++i) u[i] *= inverse;

  const Newton newton{Shape(rows, columns), packing};
  const float* const result = method == NewtonSchulz::kGram && rows != columns
                                  ? IterateGram(newton, u, other, small)
                                  : IterateStandard(newton, u, other, small);
  const double tall = static_cast<double>(rows) / static_cast<double>(columns);
  const auto scale = static_cast<float>(std::sqrt(std::max(1.0, tall)));
  for (size_t i = 0; i < n; ++i) u[i] = result[i] * scale;
}

void MuonApply(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n) {
  HWY_DYNAMIC_DISPATCH(MuonApplyImpl)(s, u, p, copy, n);
}

}  // namespace zerod::kernels
#endif  // HWY_ONCE
