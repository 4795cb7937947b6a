// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/reference.h"

#include <bit>
#include <cmath>

namespace zerod::kernels::reference {
namespace {

constexpr size_t kLanes = 16;  // of the norm's tree

constexpr uint32_t kMagnitudeMask = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;

uint32_t Bits(float x) { return std::bit_cast<uint32_t>(x); }
float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

void Store(const Copy& copy, size_t i, float p) {
  if (copy.bf16 != nullptr) Narrow(p, &copy.bf16[i]);
  if (copy.fp16 != nullptr) Narrow(p, &copy.fp16[i]);
}

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

float Gradient(float sum, float grad_scale, float l2, float p) {
  const float g = sum * grad_scale;
  return l2 == 0 ? g : std::fma(l2, p, g);
}

float UpdateAt(const AdamWScalars& s, float sum, float p, float* m, float* v) {
  const float g = Gradient(sum, s.grad_scale, s.l2, p);
  const float distance = g - *m;
  *m = s.one_minus_beta1 < 0.5f ? std::fma(s.one_minus_beta1, distance, *m)
                                : std::fma(s.one_minus_beta1 - 1.0f, distance, g);
  *v = std::fma(s.one_minus_beta2 * g, g, s.beta2 * *v);
  const float denominator = std::fma(std::sqrt(*v), s.inverse_sqrt_bias2, s.eps);
  return p * s.decay - (s.step_size * *m) / denominator;
}

}  // namespace

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite) {
  double lanes[kLanes] = {};
  for (size_t i = 0; i < n; ++i) {
    const float g = SumAt(in, count, i);
    if ((Bits(g) & kMagnitudeMask) >= kInfinity) *nonfinite = true;
    const double wide = static_cast<double>(g);
    lanes[i % kLanes] += wide * wide;
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
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

}  // namespace zerod::kernels::reference
