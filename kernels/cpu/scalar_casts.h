// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit types and binary32, one value at a time: what the plain references and the last few
// elements of the vector code use. kernels.h says what they do with NaNs and ties.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace zerod::kernels {

inline float Widen(float x) { return x; }

inline float Widen(bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

inline float Widen(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude > 0x7c00) {
    bits = 0x7fc00000 | magnitude << 13;  // quiet, as the hardware's conversion makes it
  } else if (magnitude == 0x7c00) {
    bits = 0x7f800000;
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + (112u << 23);  // the difference of the exponents' biases
  } else {
    bits = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return std::bit_cast<float>(sign | bits);
}

inline void Narrow(float x, bfloat16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  *out = nan ? static_cast<bfloat16>((bits >> 16) | 0x40)
             : static_cast<bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void Narrow(float x, float16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t narrow;
  if (magnitude > 0x7f800000) {
    narrow = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000) {  // 65536; what is below rounds there by itself
    narrow = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal
    const uint32_t rebiased = magnitude - (112u << 23);
    narrow = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
  } else {
    // The last place of a sum between 0.5 and 1 is 2^-24, that of a subnormal: the sum rounds.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    narrow = std::bit_cast<uint32_t>(sum) - 0x3f000000;
  }
  out->bits = static_cast<uint16_t>((bits >> 16 & 0x8000) | narrow);
}

}  // namespace zerod::kernels
