// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/matrix.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matrix.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/cpu/vector_inl.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

void MultiplyImpl(const MatrixProduct& product, float* out, float*) {
  reference::Multiply(product, out);
}

#else

// A tile of the product, kTileRows x two vectors, is summed in registers. Its operands are packed
// so that they are read one after the other: A in panels of kTileRows rows, B in panels of two
// vectors of columns, both by k.
constexpr size_t kTileRows = 6;
constexpr size_t kTileColumnsMax = 64;
// Of A, what is packed at once stays in the second-level cache.
constexpr size_t kRowsAtOnce = 16 * kTileRows;
constexpr size_t kColumnsAtOnce = 512;  // a multiple of each target's two vectors
static_assert((kRowsAtOnce + kColumnsAtOnce) * kProductDepth <= kProductScratch);

// Panels of `width` of the indices [begin, begin + size) of the first dimension of `view`, with the
// second's [k_begin, k_begin + depth); zeros after the last.
void Pack(const MatrixView& view, size_t begin, size_t size, size_t k_begin, size_t depth,
          size_t width, float* out) {
  for (size_t at = 0; at < size; at += width, out += width * depth) {
    const size_t filled = std::min(width, size - at);
    if (filled < width) std::fill(out, out + width * depth, 0.0f);
    if (view.row_stride == 1) {
      for (size_t k = 0; k < depth; ++k) {
        const float* const from = &view.data[begin + at + (k_begin + k) * view.column_stride];
        for (size_t i = 0; i < filled; ++i) out[k * width + i] = from[i];
      }
      continue;
    }
    for (size_t i = 0; i < filled; ++i) {
      for (size_t k = 0; k < depth; ++k) {
        out[k * width + i] = view.At(begin + at + i, k_begin + k);
      }
    }
  }
}

struct TileRow {
  VF low, high;
};

// out (rows of `stride`) += the product of two panels.
HWY_INLINE void AddTile(const float* a, const float* b, size_t depth, float* out, size_t stride) {
  const DF d;
  const size_t lanes = hn::Lanes(d);
  const VF zero = hn::Zero(d);
  // Registers hold what has a name of its own.
  TileRow r0{zero, zero}, r1 = r0, r2 = r0, r3 = r0, r4 = r0, r5 = r0;
  for (size_t k = 0; k < depth; ++k, a += kTileRows, b += 2 * lanes) {
    const VF low = hn::LoadU(d, b);
    const VF high = hn::LoadU(d, b + lanes);
    const auto add = [&](TileRow& row, float x) HWY_ATTR {
      const VF all = hn::Set(d, x);
      row.low = hn::MulAdd(all, low, row.low);
      row.high = hn::MulAdd(all, high, row.high);
    };
    add(r0, a[0]);
    add(r1, a[1]);
    add(r2, a[2]);
    add(r3, a[3]);
    add(r4, a[4]);
    add(r5, a[5]);
  }
  const auto store = [&](const TileRow& row, float* at) HWY_ATTR {
    hn::StoreU(hn::Add(hn::LoadU(d, at), row.low), d, at);
    hn::StoreU(hn::Add(hn::LoadU(d, at + lanes), row.high), d, at + lanes);
  };
  store(r0, out);
  store(r1, out + stride);
  store(r2, out + 2 * stride);
  store(r3, out + 3 * stride);
  store(r4, out + 4 * stride);
  store(r5, out + 5 * stride);
}

// The same where only rows x columns of the tile are there.
void AddPartOfTile(const float* a, const float* b, size_t depth, float* out, size_t stride,
                   size_t rows, size_t columns) {
  alignas(64) float tile[kTileRows * kTileColumnsMax] = {};
  const size_t width = 2 * hn::Lanes(DF());
  for (size_t i = 0; i < rows; ++i) {
    std::copy(out + i * stride, out + i * stride + columns, tile + i * width);
  }
  AddTile(a, b, depth, tile, width);
  for (size_t i = 0; i < rows; ++i) {
    std::copy(tile + i * width, tile + i * width + columns, out + i * stride);
  }
}

// Rows [row, row + rows) x columns [column, column + columns) of the product, from packed panels.
void AddBlock(const MatrixProduct& product, const float* packed_a, const float* packed_b,
              size_t row, size_t rows, size_t column, size_t columns, size_t depth, float* out) {
  const size_t width = 2 * hn::Lanes(DF());
  for (size_t j = 0; j < columns; j += width) {
    for (size_t i = 0; i < rows; i += kTileRows) {
      const size_t rows_here = std::min(kTileRows, rows - i);
      const size_t columns_here = std::min(width, columns - j);
      if (product.symmetric && column + j > row + i + rows_here - 1) continue;
      float* const at = out + (row + i) * product.columns + column + j;
      const float* const a = packed_a + i * depth;
      const float* const b = packed_b + j * depth;
      if (rows_here == kTileRows && columns_here == width) {
        AddTile(a, b, depth, at, product.columns);
      } else {
        AddPartOfTile(a, b, depth, at, product.columns, rows_here, columns_here);
      }
    }
  }
}

void MultiplyImpl(const MatrixProduct& product, float* out, float* scratch) {
  const size_t width = 2 * hn::Lanes(DF());
  float* const packed_a = scratch;
  float* const packed_b = scratch + kRowsAtOnce * kProductDepth;
  const size_t size = product.rows * product.columns;
  if (product.addend == nullptr) {
    std::fill(out, out + size, 0.0f);
  } else {
    for (size_t i = 0; i < size; ++i) out[i] = product.addend_scale * product.addend[i];
  }
  for (size_t column = 0; column < product.columns; column += kColumnsAtOnce) {
    const size_t columns = std::min(kColumnsAtOnce, product.columns - column);
    for (size_t k = 0; k < product.depth; k += kProductDepth) {
      const size_t depth = std::min(kProductDepth, product.depth - k);
      Pack(product.b.Transposed(), column, columns, k, depth, width, packed_b);
      // Of a symmetric product, the rows above these columns are not needed.
      const size_t first = product.symmetric ? column - column % kTileRows : 0;
      for (size_t row = first; row < product.rows; row += kRowsAtOnce) {
        const size_t rows = std::min(kRowsAtOnce, product.rows - row);
        Pack(product.a, row, rows, k, depth, kTileRows, packed_a);
        AddBlock(product, packed_a, packed_b, row, rows, column, columns, depth, out);
      }
    }
  }
  if (!product.symmetric) return;
  for (size_t i = 0; i < product.rows; ++i) {
    for (size_t j = 0; j < i; ++j) out[j * product.columns + i] = out[i * product.columns + j];
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::kernels {

HWY_EXPORT(MultiplyImpl);

void Multiply(const MatrixProduct& product, float* out, float* scratch) {
  DCHECK(!product.symmetric || product.rows == product.columns);
  HWY_DYNAMIC_DISPATCH(MultiplyImpl)(product, out, scratch);
}

namespace reference {

void Multiply(const MatrixProduct& product, float* out) {
  const size_t columns = product.columns;
  for (size_t i = 0; i < product.rows; ++i) {
    for (size_t j = 0; j < (product.symmetric ? i + 1 : columns); ++j) {
      const size_t at = i * columns + j;
      float sum = product.addend == nullptr ? 0.0f : product.addend_scale * product.addend[at];
      for (size_t begin = 0; begin < product.depth; begin += kProductDepth) {
        const size_t end = std::min(product.depth, begin + kProductDepth);
        float run = 0;
        for (size_t k = begin; k < end; ++k) {
          run = std::fma(product.a.At(i, k), product.b.At(k, j), run);
        }
        sum += run;
      }
      out[at] = sum;
      if (product.symmetric) out[j * columns + i] = sum;
    }
  }
}

}  // namespace reference
}  // namespace zerod::kernels
#endif  // HWY_ONCE
