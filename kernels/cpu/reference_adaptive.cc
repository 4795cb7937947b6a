// SPDX-License-Identifier: Apache-2.0
//
// Of adaptive.h and asgd_rprop.h.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/reference.h"
#include "kernels/cpu/reference_element.h"

namespace zerod::kernels::reference {

void RmsProp(const RmsPropScalars& s, const float* const* grads, size_t count, float* p, float* v,
             float* b, float* a, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    v[i] = std::fma(s.one_minus_alpha * g, g, s.alpha * v[i]);
    float square = v[i];
    if (a != nullptr) {
      a[i] = Lerp(a[i], g, s.one_minus_alpha);
      square = std::fma(-a[i], a[i], square);
    }
    const float avg = std::sqrt(square) + s.eps;
    if (b != nullptr) {
      b[i] = s.momentum * b[i] + g / avg;
      p[i] = std::fma(-s.lr, b[i], p[i]);
    } else {
      p[i] = p[i] - (s.lr * g) / avg;
    }
    Store(copy, i, p[i]);
  }
}

void Adadelta(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
              float* v, float* u, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    v[i] = std::fma(s.one_minus_rho * g, g, s.rho * v[i]);
    const float delta = std::sqrt(u[i] + s.eps) / std::sqrt(v[i] + s.eps) * g;
    u[i] = std::fma(s.one_minus_rho * delta, delta, s.rho * u[i]);
    p[i] = std::fma(s.negative_lr, delta, p[i]);
    Store(copy, i, p[i]);
  }
}

void Adamax(const AdamaxScalars& s, const float* const* grads, size_t count, float* p, float* m,
            float* u, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    m[i] = Lerp(m[i], g, s.one_minus_beta1);
    const float before = s.beta2 * u[i];
    const float now = std::fabs(g) + s.eps;
    u[i] = before > now || std::isnan(before) ? before : now;
    p[i] = p[i] - (s.step_size * m[i]) / u[i];
    Store(copy, i, p[i]);
  }
}

void NAdam(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    m[i] = Lerp(m[i], g, s.one_minus_beta1);
    v[i] = std::fma(s.one_minus_beta2 * g, g, s.beta2 * v[i]);
    const float denominator = std::fma(std::sqrt(v[i]), s.inverse_sqrt_bias2, s.eps);
    p[i] = p[i] * s.decay - std::fma(s.gradient_step, g, s.momentum_step * m[i]) / denominator;
    Store(copy, i, p[i]);
  }
}

void RAdam(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    m[i] = Lerp(m[i], g, s.one_minus_beta1);
    v[i] = std::fma(s.one_minus_beta2 * g, g, s.beta2 * v[i]);
    p[i] = s.rectified ? p[i] * s.decay - (s.step_size * m[i]) / (std::sqrt(v[i]) + s.eps)
                       : std::fma(-s.step_size, m[i], p[i] * s.decay);
    Store(copy, i, p[i]);
  }
}

void Rprop(const RpropScalars& s, const float* const* grads, size_t count, float* p, float* prev,
           float* step, Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    float g = Gradient(SumAt(grads, count, i), s.grad_scale, 0, p[i]);
    const float product = g * prev[i];
    if (product > 0) step[i] *= s.eta_plus;
    if (product < 0) step[i] *= s.eta_minus;
    step[i] = step[i] < s.step_min ? s.step_min : step[i];
    step[i] = step[i] > s.step_max ? s.step_max : step[i];
    if (product < 0) g = 0;
    p[i] = p[i] - (std::fabs(g) > 0 ? std::copysign(step[i], g) : 0.0f);
    prev[i] = g;
    Store(copy, i, p[i]);
  }
}

void Asgd(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
          Copy copy, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float g = Gradient(SumAt(grads, count, i), s.grad_scale, s.l2, p[i]);
    p[i] = std::fma(s.negative_eta, g, p[i] * s.decay);
    ax[i] = s.mu == 1 ? p[i] : ax[i] + (p[i] - ax[i]) * s.mu;
    Store(copy, i, p[i]);
  }
}

}  // namespace zerod::kernels::reference
