// SPDX-License-Identifier: Apache-2.0
//
// The same functions as kernels.h and optimizers.h, as plain loops over one element at a time: what
// the tests compare with, what a CPU without a target of ours runs, and what the vector code calls
// for the few elements before its first and after its last whole vector. Same contracts, same bits.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/optimizers.h"

namespace zerod::kernels::reference {

void CastToBf16(const float* in, bfloat16* out, size_t n);
void CastFromBf16(const bfloat16* in, float* out, size_t n);

void Sum(const float* const* in, size_t count, float* out, size_t n);
void Accumulate(const float* in, float* out, size_t n);

double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite);

void AdamW(const AdamWScalars& s, const float* const* grads, size_t count, float* p, float* m,
           float* v, bfloat16* copy, size_t n);

void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n);
void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n);
void AdamWSplit(const AdamWScalars& s, const float* const* grads, size_t count, bfloat16* copy,
                uint16_t* remainder, float* m, float* v, size_t n);
void Lion(const LionScalars& s, const float* const* grads, size_t count, float* p, float* m,
          bfloat16* copy, size_t n);
void Adagrad(const AdagradScalars& s, const float* const* grads, size_t count, float* p,
             float* sum, bfloat16* copy, size_t n);
void Sgd(const SgdScalars& s, const float* const* grads, size_t count, float* p, float* b,
         bfloat16* copy, size_t n);

}  // namespace zerod::kernels::reference
