// SPDX-License-Identifier: Apache-2.0
//
// The product of two fp32 matrices, as Muon needs it. Each element is summed in one order whatever
// the vector width, so the bits are the same on every target:
//   out_ij = addend_scale * addend_ij                      (0 without an addend)
//   out_ij = out_ij + run, for each run of kProductDepth values of k, in order, where
//   run    = fma(a_ik, b_kj, run), k in order, from 0
#pragma once

#include <cstddef>

namespace zerod::kernels {

inline constexpr size_t kProductDepth = 256;

// Element (i, j) is data[i * row_stride + j * column_stride]; so a transpose is a view too.
struct MatrixView {
  const float* data;
  size_t row_stride;
  size_t column_stride;

  float At(size_t i, size_t j) const { return data[i * row_stride + j * column_stride]; }
  MatrixView Transposed() const { return {data, column_stride, row_stride}; }
};

struct MatrixProduct {
  MatrixView a;  // rows x depth
  MatrixView b;  // depth x columns
  size_t rows;
  size_t depth;
  size_t columns;
  const float* addend = nullptr;  // rows x columns, dense, or null
  float addend_scale = 0;
  // The product is known to be a symmetric matrix: what is on and below the diagonal is computed,
  // the rest copied from there.
  bool symmetric = false;
};

// `out` is rows x columns, dense, and overlaps nothing that is read; `scratch` has
// kProductScratch floats.
inline constexpr size_t kProductScratch = size_t{256} * 1024;
void Multiply(const MatrixProduct& product, float* out, float* scratch);

namespace reference {
void Multiply(const MatrixProduct& product, float* out);
}  // namespace reference

}  // namespace zerod::kernels
