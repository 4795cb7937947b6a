// SPDX-License-Identifier: Apache-2.0
//
// Arrays for the tests of kernels: random and special values, odd alignments, guards.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kernels.h"

namespace zerod::kernels {

inline constexpr size_t kSizes[] = {0,  1,  2,  3,  7,   15,  16,   17,   31,   32,   33,
                             47, 63, 64, 65, 127, 500, 1023, 1024, 1025, 2081, 4099};
inline constexpr size_t kCounts[] = {1, 2, 3, 4, 5, kSourcesMax};
inline constexpr size_t kGuard = 70;  // elements on either side, which nobody may change

inline uint32_t Bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

// Ordinary values, and among them, where `special`, one in four from the edges of the format.
inline std::vector<float> RandomFloats(size_t n, uint32_t seed, bool special) {
  static const float kSpecial[] = {
      0.0f, -0.0f, FromBits(1), FromBits(0x80000001), FromBits(0x007fffff), FromBits(0x00800000),
      std::numeric_limits<float>::max(), -std::numeric_limits<float>::max(),
      std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
      FromBits(0x7fc00000), FromBits(0xffc00000), FromBits(0x7fffffff), FromBits(0x7f800001),
      1e-30f, 1e30f, 1.00390625f, 1.01171875f};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) {
    value = normal(random) * std::ldexp(1.0f, static_cast<int>(random() % 20) - 10);
    if (special && random() % 4 == 0) value = kSpecial[random() % std::size(kSpecial)];
  }
  return values;
}

// An array with guards around [0, n), begun `shift` elements off.
template <class T>
struct Guarded {
  Guarded(size_t n, size_t shift, uint32_t seed, bool special = false)
      : data(n + 2 * kGuard + shift), begin(kGuard + shift) {
    const std::vector<float> values = RandomFloats(data.size(), seed, special);
    for (size_t i = 0; i < data.size(); ++i) {
      if constexpr (sizeof(T) == 4) {
        data[i] = values[i];
      } else {
        data[i] = T{static_cast<uint16_t>(Bits(values[i]) >> 16)};
      }
    }
  }
  T* ptr() { return data.data() + begin; }

  std::vector<T> data;
  size_t begin;
};

// Equal bits; where arithmetic gave a NaN, its payload is the hardware's.
inline void ExpectSame(const std::vector<float>& actual, const std::vector<float>& expected,
                       const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    ASSERT_EQ(Bits(actual[i]), Bits(expected[i]))
        << what << " at " << i << ": " << actual[i] << " vs " << expected[i];
  }
}

inline uint16_t Word(bfloat16 x) { return x; }
inline uint16_t Word(float16 x) { return x.bits; }
inline bool IsNan(bfloat16 x) { return (x & 0x7fff) > 0x7f80; }
inline bool IsNan(float16 x) { return (x.bits & 0x7fff) > 0x7c00; }

// Equal 16-bit values; two NaNs are equal.
template <class T>
void ExpectSame16(const std::vector<T>& actual, const std::vector<T>& expected, const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (IsNan(actual[i]) && IsNan(expected[i])) continue;
    ASSERT_EQ(Word(actual[i]), Word(expected[i])) << what << " at " << i;
  }
}

// `count` sources of elements, each at an alignment of its own.
template <class T>
struct SourcesOf {
  SourcesOf(size_t count, size_t n, bool special) {
    for (size_t k = 0; k < count; ++k) {
      arrays.emplace_back(n, k % 5, static_cast<uint32_t>(1000 + k), special);
    }
    for (auto& array : arrays) pointers.push_back(array.ptr());
  }
  std::vector<Guarded<T>> arrays;
  std::vector<const T*> pointers;
};
using Gradients = SourcesOf<float>;

// One test per target; skipped where the CPU has none such.
class TargetTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!ForceTarget(GetParam())) GTEST_SKIP() << GetParam() << " is not on this CPU";
  }
  void TearDown() override { ForceTarget(""); }
};

inline std::string ParamName(const testing::TestParamInfo<const char*>& info) { return info.param; }

}  // namespace zerod::kernels
