// SPDX-License-Identifier: Apache-2.0
//
// The optimizers with C names, for Python's ctypes: tests and benchmarks beside torch.
#include <algorithm>
#include <vector>

#include "kernels/cpu/adaptive.h"
#include "kernels/cpu/asgd_rprop.h"
#include "kernels/cpu/lamb.h"
#include "kernels/cpu/muon.h"
#include "kernels/cpu/optimizers.h"

namespace {

// `copy` may be null. It is float16 where `fp16`, else bfloat16.
zerod::kernels::Copy CopyOf(void* copy, bool fp16) {
  if (fp16) return static_cast<zerod::kernels::float16*>(copy);
  return static_cast<zerod::kernels::bfloat16*>(copy);
}

}  // namespace

extern "C" {

const char* zerod_kernels_target() { return zerod::kernels::TargetName(); }

bool zerod_kernels_force_target(const char* name) { return zerod::kernels::ForceTarget(name); }

struct AdamWOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;
};

void zerod_kernels_adamw(const AdamWOptions* o, uint64_t t, const float* const* grads,
                         size_t count, float* p, float* m, float* v, void* copy, bool fp16,
                         size_t n) {
  const zerod::kernels::AdamWScalars s = zerod::kernels::MakeAdamWScalars(
      o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t, o->grad_scale);
  zerod::kernels::AdamW(s, grads, count, p, m, v, CopyOf(copy, fp16), n);
}

void zerod_kernels_adamw_split(const AdamWOptions* o, uint64_t t, const float* const* grads,
                               size_t count, uint16_t* copy, uint16_t* remainder, float* m,
                               float* v, size_t n) {
  const zerod::kernels::AdamWScalars s = zerod::kernels::MakeAdamWScalars(
      o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t, o->grad_scale);
  zerod::kernels::AdamWSplit(s, grads, count, copy, remainder, m, v, n);
}

void zerod_kernels_adam(const AdamWOptions* o, uint64_t t, const float* const* grads, size_t count,
                        float* p, float* m, float* v, void* copy, bool fp16, size_t n) {
  const zerod::kernels::AdamWScalars s =
      zerod::kernels::MakeAdamWScalars(o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t,
                                       o->grad_scale, /*decoupled=*/false);
  zerod::kernels::AdamW(s, grads, count, p, m, v, CopyOf(copy, fp16), n);
}

void zerod_kernels_lion(double lr, double beta1, double beta2, double weight_decay,
                        double grad_scale, const float* const* grads, size_t count, float* p,
                        float* m, void* copy, bool fp16, size_t n) {
  zerod::kernels::Lion(
      zerod::kernels::MakeLionScalars(lr, beta1, beta2, weight_decay, grad_scale), grads, count, p,
      m, CopyOf(copy, fp16), n);
}

void zerod_kernels_adagrad(double lr, double lr_decay, double eps, double weight_decay, uint64_t t,
                           double grad_scale, const float* const* grads, size_t count, float* p,
                           float* sum, void* copy, bool fp16, size_t n) {
  zerod::kernels::Adagrad(
      zerod::kernels::MakeAdagradScalars(lr, lr_decay, eps, weight_decay, t, grad_scale), grads,
      count, p, sum, CopyOf(copy, fp16), n);
}

// No momentum: `b` is null.
void zerod_kernels_sgd(double lr, double momentum, double dampening, double weight_decay,
                       bool nesterov, uint64_t t, double grad_scale, const float* const* grads,
                       size_t count, float* p, float* b, void* copy, bool fp16,
                       size_t n) {
  zerod::kernels::Sgd(zerod::kernels::MakeSgdScalars(lr, momentum, dampening, weight_decay,
                                                     nesterov, t, grad_scale),
                      grads, count, p, b, CopyOf(copy, fp16), n);
}

// Not centered: `a` is null.
void zerod_kernels_rmsprop(double lr, double alpha, double eps, double weight_decay,
                           double momentum, double grad_scale, const float* const* grads,
                           size_t count, float* p, float* v, float* b, float* a, void* copy,
                           bool fp16, size_t n) {
  zerod::kernels::RmsProp(
      zerod::kernels::MakeRmsPropScalars({lr, alpha, eps, weight_decay, momentum}, grad_scale),
      grads, count, p, v, b, a, CopyOf(copy, fp16), n);
}

void zerod_kernels_adadelta(double lr, double rho, double eps, double weight_decay,
                            double grad_scale, const float* const* grads, size_t count, float* p,
                            float* v, float* u, void* copy, bool fp16, size_t n) {
  zerod::kernels::Adadelta(
      zerod::kernels::MakeAdadeltaScalars(lr, rho, eps, weight_decay, grad_scale), grads, count, p,
      v, u, CopyOf(copy, fp16), n);
}

void zerod_kernels_adamax(const AdamWOptions* o, uint64_t t, const float* const* grads,
                          size_t count, float* p, float* m, float* u, void* copy, bool fp16,
                          size_t n) {
  zerod::kernels::Adamax(
      zerod::kernels::MakeAdamaxScalars(o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t,
                                        o->grad_scale),
      grads, count, p, m, u, CopyOf(copy, fp16), n);
}

void zerod_kernels_nadam(const AdamWOptions* o, double momentum_decay, bool decoupled, uint64_t t,
                         const float* const* grads, size_t count, float* p, float* m, float* v,
                         void* copy, bool fp16, size_t n) {
  zerod::kernels::NAdam(
      zerod::kernels::MakeNAdamScalars(
          {o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, momentum_decay, decoupled}, t,
          o->grad_scale),
      grads, count, p, m, v, CopyOf(copy, fp16), n);
}

void zerod_kernels_radam(const AdamWOptions* o, bool decoupled, uint64_t t,
                         const float* const* grads, size_t count, float* p, float* m, float* v,
                         void* copy, bool fp16, size_t n) {
  zerod::kernels::RAdam(
      zerod::kernels::MakeRAdamScalars(
          {o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, decoupled}, t, o->grad_scale),
      grads, count, p, m, v, CopyOf(copy, fp16), n);
}

void zerod_kernels_asgd(double lr, double lr_before, double lambd, double alpha, double t0,
                        double weight_decay, uint64_t t, double grad_scale,
                        const float* const* grads, size_t count, float* p, float* ax, void* copy,
                        bool fp16, size_t n) {
  zerod::kernels::Asgd(
      zerod::kernels::MakeAsgdScalars({lr, lr_before, lambd, alpha, t0, weight_decay}, t,
                                      grad_scale),
      grads, count, p, ax, CopyOf(copy, fp16), n);
}

void zerod_kernels_rprop(double eta_minus, double eta_plus, double step_min, double step_max,
                         double grad_scale, const float* const* grads, size_t count, float* p,
                         float* prev, float* step, void* copy, bool fp16, size_t n) {
  zerod::kernels::Rprop(
      zerod::kernels::MakeRpropScalars(eta_minus, eta_plus, step_min, step_max, grad_scale), grads,
      count, p, prev, step, CopyOf(copy, fp16), n);
}

// One tensor; its squares are summed by blocks of `block` elements.
void zerod_kernels_lamb(const AdamWOptions* o, bool eps_inside_sqrt, bool bias_correction,
                        double min_coeff, double max_coeff, uint64_t t,
                        const float* const* grads, size_t count, float* p, float* m, float* v,
                        void* copy, bool fp16, size_t n, size_t block) {
  const zerod::kernels::LambScalars s = zerod::kernels::MakeLambScalars(
      {o->lr, o->beta1, o->beta2, o->eps, eps_inside_sqrt, o->weight_decay, bias_correction}, t,
      o->grad_scale);
  zerod::kernels::LambSquares squares{0, 0};
  for (size_t at = 0; at < n; at += block) {
    std::vector<const float*> shifted;
    for (size_t k = 0; k < count; ++k) shifted.push_back(grads[k] + at);
    const zerod::kernels::LambSquares part = zerod::kernels::LambMoments(
        s, shifted.data(), count, p + at, m + at, v + at, std::min(block, n - at));
    squares.p += part.p;
    squares.u += part.u;
  }
  zerod::kernels::LambApply(s, zerod::kernels::LambTrustRatio(squares, min_coeff, max_coeff), p, m,
                            v, CopyOf(copy, fp16), n);
}

// One matrix.
void zerod_kernels_muon(double lr, double momentum, bool nesterov, double weight_decay, bool gram,
                        double grad_scale, const float* const* grads, size_t count, float* p,
                        float* m, void* copy, bool fp16, size_t rows, size_t columns) {
  const auto method =
      gram ? zerod::kernels::NewtonSchulz::kGram : zerod::kernels::NewtonSchulz::kStandard;
  const size_t n = rows * columns;
  const zerod::kernels::MuonScalars s =
      zerod::kernels::MakeMuonScalars(lr, momentum, nesterov, weight_decay, grad_scale);
  std::vector<float> u(n), scratch(zerod::kernels::OrthogonalizeScratch(method, rows, columns));
  zerod::kernels::MuonMomentum(s, grads, count, m, u.data(), n);
  zerod::kernels::Orthogonalize(method, u.data(), rows, columns, scratch.data());
  zerod::kernels::MuonApply(s, u.data(), p, CopyOf(copy, fp16), n);
}

}  // extern "C"
