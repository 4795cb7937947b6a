// SPDX-License-Identifier: Apache-2.0
//
// Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/): momentum whose matrix is made
// nearly orthogonal by a Newton-Schulz iteration. Three parts, of which the second needs a whole
// matrix, and gives the same bits wherever it runs:
//   MuonMomentum -> Orthogonalize -> MuonApply
//
// Notation, bits, alignment and threads as in optimizers.h; m begins as zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/optimizers.h"

namespace zerod::kernels {

//   g = (sum of in) * grad_scale
//   m = lerp(m, g, 1 - momentum)                      (as AdamW's m)
//   u = m, with Nesterov's momentum lerp(g, m, momentum)
//   p = fma(-lr, orthogonalized u, p * decay)
struct MuonScalars {
  float grad_scale;
  float momentum;
  float one_minus_momentum;
  bool nesterov;
  float decay;            // 1 - lr * weight_decay
  float negative_lr;
};
MuonScalars MakeMuonScalars(double lr, double momentum, bool nesterov, double weight_decay,
                            double grad_scale);

// Updates m and writes u.
void MuonMomentum(const MuonScalars& s, const float* const* grads, size_t count, float* m,
                  float* u, size_t n);

// How the iteration is carried out. kGram computes it in the Gram matrix of the shorter side, with
// fewer operations the longer the other side is; the same in exact arithmetic. It begins
// anew from the matrix after two of the five rounds, which keeps what rounding does to small
// singular values small. For a square matrix it is kStandard.
enum class NewtonSchulz { kStandard, kGram };

// The floats of scratch that Orthogonalize needs.
size_t OrthogonalizeScratch(NewtonSchulz method, size_t rows, size_t columns);

// Five rounds of X = aX + (bA + cA^2)X, A = XX', in fp32, from X = u / (||u||_F + 1e-7), and the
// result times sqrt(max(1, rows / columns)). u is dense, rows x columns, rows the first dimension
// of the parameter and columns all others; it is read and overwritten. One thread.
void Orthogonalize(NewtonSchulz method, float* u, size_t rows, size_t columns, float* scratch);

// Moves p by the orthogonalized u, and writes the copy.
void MuonApply(const MuonScalars& s, const float* u, float* p, Copy copy, size_t n);

}  // namespace zerod::kernels
