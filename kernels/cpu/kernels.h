// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic on shards, for CPUs: Highway code chosen at run time (AVX2, AVX-512). Each
// function gives the same bits on every target, because each element is computed by the same
// sequence of correctly rounded operations (mul, add, fma, sqrt, div), and each reduction by a
// fixed tree of 16 lanes whatever the vector width. The plain references in reference.h have the
// same bits too and are what the tests compare with. Two things are the hardware's or the
// caller's: the payload of a NaN that arithmetic gives, and that denormals are not flushed
// (MXCSR as a thread starts with).
//
// All pointers are to at least `n` elements, aligned to their element type, and do not overlap
// unless said otherwise. n == 0 is allowed. Functions are thread-safe as far as callers use
// disjoint outputs; none allocates or spawns: the engine cuts work into pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zerod::kernels {

using bfloat16 = uint16_t;  // the upper 16 bits of an IEEE binary32

struct float16 {  // an IEEE binary16; a type of its own, so that neither is taken for the other
  uint16_t bits;
  friend bool operator==(float16 a, float16 b) = default;
};
static_assert(sizeof(float16) == 2 && alignof(float16) == 2);

inline constexpr size_t kSourcesMax = 64;  // gradients that one call can sum

// The target that the dispatch chose: "AVX2", "AVX3", ... For logs and tests.
const char* TargetName();
// Tests: restricts dispatch to one target by name; false, and nothing changed, where this CPU has
// none such. "SCALAR" is the plain reference. Empty: back to the best. For the whole process.
bool ForceTarget(const char* name);

// --- Casts -----------------------------------------------------------------------------------
// Round to nearest even; a NaN stays a NaN (quiet, sign kept). What rounds to more than 65504, the
// largest float16, is an infinity there: a gradient that overflowed is still found afterwards.
// Subnormals are kept. To fp32 the casts are exact; CastFromFp16 makes a signalling NaN quiet.
void CastToBf16(const float* in, bfloat16* out, size_t n);
void CastFromBf16(const bfloat16* in, float* out, size_t n);
void CastToFp16(const float* in, float16* out, size_t n);
void CastFromFp16(const float16* in, float* out, size_t n);

// --- Sums of gradients -----------------------------------------------------------------------
// out[i] = ((in[0][i] + in[1][i]) + in[2][i]) + ...; count 1..kSourcesMax. `out` may be in[0].
// 16-bit sources are widened first: all sums are fp32's.
void Sum(const float* const* in, size_t count, float* out, size_t n);
void Sum(const bfloat16* const* in, size_t count, float* out, size_t n);
void Sum(const float16* const* in, size_t count, float* out, size_t n);
// out[i] += in[i].
void Accumulate(const float* in, float* out, size_t n);
void Accumulate(const bfloat16* in, float* out, size_t n);
void Accumulate(const float16* in, float* out, size_t n);

// --- Norm ------------------------------------------------------------------------------------
// The sum of squares, in fp64, of g[i] = (in[0][i] + in[1][i] + ...) as Sum gives it, over
// elements [0, n): lane l (0..15) adds the squares of the elements i with i % 16 == l, in order
// of i; the lanes are added as a binary tree: (l, l+8), (l, l+4), (l, l+2), (l, l+1).
// A caller gets bits that do not depend on its own cutting by calling it once per block.
// *nonfinite is set to true where a g[i] is Inf or NaN, else left alone.
double SquaredNorm(const float* const* in, size_t count, size_t n, bool* nonfinite);

// --- The master as two halves ----------------------------------------------------------------
// The fp32 master kept as its bf16 copy plus a 16-bit remainder, the low half of its
// bits: p = Join(copy, remainder), exact for each of the 2^32 patterns. Split rounds half away from
// zero, so a finite `copy` differs from CastToBf16 in ties alone.
//
// Rounding would carry NaNs with the highest payloads (0x7fffffff) into zeros, so a NaN is
// truncated. As 2^32 codes are all in use, 65535 NaNs of each sign have copies that are not NaN:
// 0x7f800001..0x7f807fff infinity, 0x7f808000..0x7f80ffff zero. They are signalling, and
// arithmetic gives quiet NaNs alone: no AdamWSplit (optimizers.h) makes one.
void SplitMaster(const float* p, bfloat16* copy, uint16_t* remainder, size_t n);
void JoinMaster(const bfloat16* copy, const uint16_t* remainder, float* p, size_t n);

}  // namespace zerod::kernels
