// SPDX-License-Identifier: Apache-2.0
//
// The optimizer with C names, for Python's ctypes: tests and benchmarks beside torch.
#include "kernels/cpu/kernels.h"

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
                         size_t count, float* p, float* m, float* v, uint16_t* copy, size_t n) {
  const zerod::kernels::AdamWScalars s = zerod::kernels::MakeAdamWScalars(
      o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t, o->grad_scale);
  zerod::kernels::AdamW(s, grads, count, p, m, v, copy, n);
}

void zerod_kernels_adamw_split(const AdamWOptions* o, uint64_t t, const float* const* grads,
                               size_t count, uint16_t* copy, uint16_t* remainder, float* m,
                               float* v, size_t n) {
  const zerod::kernels::AdamWScalars s = zerod::kernels::MakeAdamWScalars(
      o->lr, o->beta1, o->beta2, o->eps, o->weight_decay, t, o->grad_scale);
  zerod::kernels::AdamWSplit(s, grads, count, copy, remainder, m, v, n);
}

}  // extern "C"
