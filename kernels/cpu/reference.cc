// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cpu/reference_element.h"

namespace zerod::kernels::reference {
namespace {

constexpr size_t kLanes = 16;  // of the norm's tree

constexpr uint32_t kMagnitudeMask = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;

uint32_t Bits(float x) { return std::bit_cast<uint32_t>(x); }
float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

// kernels.h says why NaNs are treated apart.
void Split(float x, bfloat16* copy, uint16_t* remainder) {
  const uint32_t bits = Bits(x);
  const uint32_t magnitude = bits & kMagnitudeMask;
  uint32_t addend = 0x8000;
  if (magnitude >= 0x7f808000) addend = 0x7f8000;
  if (magnitude >= 0x7f810000) addend = 0;
  *copy = static_cast<bfloat16>((bits + addend) >> 16);
  *remainder = static_cast<uint16_t>(bits);
}

float Join(bfloat16 copy, uint16_t remainder) {
  const uint32_t high = static_cast<uint32_t>(copy) << 16;
  if ((high & kMagnitudeMask) > kInfinity) return FromBits(high | remainder);
  // The remainder is a signed distance from the copy.
  const uint32_t bits = high + remainder - ((remainder & 0x8000u) << 1);
  return FromBits((bits & kMagnitudeMask) >= 0x7fff8000 ? bits - 0x7f0000 : bits);
}

// The sum of squares by lanes.
class Squares {
 public:
  void Add(size_t i, float x) {
    const double wide = static_cast<double>(x);
    lanes_[i % kLanes] += wide * wide;
  }
  double Total() const {
    double lanes[kLanes];
    std::copy(lanes_, lanes_ + kLanes, lanes);
    for (size_t half = kLanes / 2; half > 0; half /= 2) {
      for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

 private:
  double lanes_[kLanes] = {};
};

float LambUpdate(const LambScalars& s, float p, float m, float v) {
  const float denominator = s.eps_inside_sqrt ? std::sqrt(v + s.eps) : std::sqrt(v) + s.eps;
  return std::fma(s.weight_decay, p, m / denominator);
}

float UpdateAt(const AdamWScalars& s, float sum, float p, float* m, float* v) {
  const float g = Gradient(sum, s.grad_scale, s.l2, p);
  *m = Lerp(*m, g, s.one_minus_beta1);
  *v = std::fma(s.one_minus_beta2 * g, g, s.beta2 * *v);
  const float denominator = std::fma(std::sqrt(*v), s.inverse_sqrt_bias2, s.eps);
  return p * s.decay - (s.step_size * *m) / denominator;
}

}  // namespace

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  Squares squares;
  for (size_t i = 0; i < n; ++i) {
    const float g = SumAt(in, count, i);
    if ((Bits(g) & kMagnitudeMask) >= kInfinity) *nonfinite = true;
    squares.Add(i, g);
  }
  return squares.Total();
}

void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    p[i] = UpdateAt(s, SumAt(grads, count, i), p[i], &m[i], &v[i]);
    Store(copy, i, p[i]);
  }
}

void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n) {
  for (size_t i = 0; i < n; ++i) Split(p[i], &copy[i], &remainder[i]);
}

void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n) {
  for (size_t i = 0; i < n; ++i) p[i] = Join(copy[i], remainder[i]);
}

void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float p = UpdateAt(s, SumAt(grads, count, i), Join(copy[i], remainder[i]), &m[i], &v[i]);
    Split(p, &copy[i], &remainder[i]);
  }
}

void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, 0, p[i]);
    const float u = std::fma(s.one_minus_beta1, g, s.beta1 * m[i]);
    m[i] = std::fma(s.one_minus_beta2, g, s.beta2 * m[i]);
    p[i] = p[i] * s.decay - (std::fabs(u) > 0 ? std::copysign(s.lr, u) : u);
    Store(copy, i, p[i]);
  }
}

void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    sum[i] = std::fma(g, g, sum[i]);
    p[i] = p[i] - (s.clr * g) / (std::sqrt(sum[i]) + s.eps);
    Store(copy, i, p[i]);
  }
}

void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    if (b != nullptr) {
      b[i] = std::fma(s.weight, g, s.momentum * b[i]);
      g = s.nesterov ? std::fma(s.momentum, b[i], g) : b[i];
    }
    p[i] = std::fma(s.negative_lr, g, p[i]);
    Store(copy, i, p[i]);
  }
}

float LambMomentsAt(const LambScalars& s, float sum, float p, float* m, float* v) {
  const float g = sum * s.grad_scale;
  *m = std::fma(s.one_minus_beta1, g, s.beta1 * *m);
  *v = std::fma(s.one_minus_beta2 * g, g, s.beta2 * *v);
  return LambUpdate(s, p, *m, *v);
}

LambSquares LambMoments(const LambScalars& s, const float* const* grads, size_t count,
                        const float* p, float* m, float* v, size_t n) {
  Squares p_squares, u_squares;
  for (size_t i = 0; i < n; ++i) {
    p_squares.Add(i, p[i]);
    u_squares.Add(i, LambMomentsAt(s, SumAt(grads, count, i), p[i], &m[i], &v[i]));
  }
  return {p_squares.Total(), u_squares.Total()};
}

void LambApply(const LambScalars& s, float trust_ratio, float* p, const float* m, const float* v,
               Copy copy, size_t n) {
  const float rate = s.step_size * trust_ratio;
  for (size_t i = 0; i < n; ++i) {
    p[i] = std::fma(-rate, LambUpdate(s, p[i], m[i], v[i]), p[i]);
    Store(copy, i, p[i]);
  }
}

void MuonMomentum(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                  float* u, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = SumAt(grads, count, i) * s.grad_scale;
    m[i] = Lerp(m[i], g, s.one_minus_momentum);
    u[i] = s.nesterov ? Lerp(g, m[i], s.momentum) : m[i];
  }
}

void MuonApply(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    p[i] = std::fma(s.negative_lr, u[i], p[i] * s.decay);
    Store(copy, i, p[i]);
  }
}

}  // namespace zerod::kernels::reference
