// SPDX-License-Identifier: Apache-2.0
//
// The same functions as kernels.h, optimizers.h, adaptive.h, asgd_rprop.h, lamb.h and muon.h, as
// plain loops over one element at a time: what the tests compare with, what a CPU without a target
// of ours runs, and what the vector code calls for the few elements before its first and after its
// last whole vector. Same contracts, same bits.
#pragma once

#include "kernels/cpu/adaptive.h"
#include "kernels/cpu/asgd_rprop.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/lamb.h"
#include "kernels/cpu/muon.h"
#include "kernels/cpu/optimizers.h"
#include "kernels/cpu/scalar_casts.h"

namespace zerod::kernels::reference {

template <class T>
void CastTo(const float* in, T* out, size_t n) {
  for (size_t i = 0; i < n; ++i) Narrow(in[i], &out[i]);
}
template <class T>
void CastFrom(const T* in, float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = Widen(in[i]);
}
inline void CastToBf16(const float* in, bfloat16* out, size_t n) { CastTo(in, out, n); }
inline void CastFromBf16(const bfloat16* in, float* out, size_t n) { CastFrom(in, out, n); }
inline void CastToFp16(const float* in, float16* out, size_t n) { CastTo(in, out, n); }
inline void CastFromFp16(const float16* in, float* out, size_t n) { CastFrom(in, out, n); }

template <class T>
float SumAt(const T* const* in, size_t count, size_t i) {
  float sum = Widen(in[0][i]);
  for (size_t k = 1; k < count; ++k) sum += Widen(in[k][i]);
  return sum;
}
template <class T>
void Sum(const T* const* in, size_t count, float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = SumAt(in, count, i);
}
template <class T>
void Accumulate(const T* in, float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] += Widen(in[i]);
}

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite);

void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);

void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n);
void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n);
void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n);
void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          Copy copy, size_t n);
void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, Copy copy, size_t n);
void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         Copy copy, size_t n);

void RmsProp(const RmsPropScalars& s, const float* const* grads, size_t count, float* p, float* v,
             float* b, float* a, Copy copy, size_t n);
void Adadelta(const AdadeltaScalars& s, const float* const* grads, size_t count, float* p,
              float* v, float* u, Copy copy, size_t n);
void Adamax(const AdamaxScalars& s, const float* const* grads, size_t count, float* p, float* m,
            float* u, Copy copy, size_t n);
void NAdam(const NAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);
void RAdam(const RAdamScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, Copy copy, size_t n);
void Rprop(const RpropScalars& s, const float* const* grads, size_t count, float* p, float* prev,
           float* step, Copy copy, size_t n);
void Asgd(const AsgdScalars& s, const float* const* grads, size_t count, float* p, float* ax,
          Copy copy, size_t n);

// One element: updates m and v and returns u.
float LambMomentsAt(const LambScalars& s, float sum, float p, float* m, float* v);
LambSquares LambMoments(const LambScalars& s, const float* const* grads, size_t count,
                        const float* p, float* m, float* v, size_t n);
void LambApply(const LambScalars& s, float trust_ratio, float* p, const float* m, const float* v,
               Copy copy, size_t n);

void MuonMomentum(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                  float* u, size_t n);
void MuonApply(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n);

}  // namespace zerod::kernels::reference
