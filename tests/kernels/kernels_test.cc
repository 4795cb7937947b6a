// SPDX-License-Identifier: Apache-2.0
//
// Every function on every target that this CPU has, beside the plain reference: same bits, for
// odd sizes, pointers that are aligned to nothing but their elements, special values, and nothing
// written outside [0, n). What the reference itself computes is checked by examples worked out by
// hand, and against torch (optimizers_vs_torch.py).
#include "kernels/cpu/kernels.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/reference.h"
#include "tests/kernels/arrays.h"

namespace zerod::kernels {
namespace {

using KernelsTest = TargetTest;

INSTANTIATE_TEST_SUITE_P(Targets, KernelsTest, testing::Values("SCALAR", "NEON", "AVX2", "AVX3"),
                         ParamName);

TEST(DispatchTest, NamesTheTargetAndRefusesOthers) {
  const std::string best = TargetName();
  EXPECT_FALSE(ForceTarget("SSE4"));
  EXPECT_FALSE(ForceTarget("nonsense"));
  EXPECT_EQ(TargetName(), best);
#if defined(__x86_64__)
  ASSERT_TRUE(ForceTarget("SCALAR"));
  EXPECT_STREQ(TargetName(), "SCALAR");
  // A CPU with AVX2 must not be served by the plain loops.
  EXPECT_EQ(ForceTarget("AVX2"), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
  EXPECT_TRUE(ForceTarget(""));
  EXPECT_EQ(TargetName(), best);
}

TEST_P(KernelsTest, ForcedTargetIsUsed) { EXPECT_STREQ(TargetName(), GetParam()); }

TEST_P(KernelsTest, CastToBf16ByHand) {
  struct Example {
    uint32_t in;
    uint16_t out;
  };
  const Example examples[] = {
      {0x3f800000, 0x3f80},                         // 1
      {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82},   // ties go to even
      {0x3f808001, 0x3f81}, {0x3f807fff, 0x3f80},   // beside a tie
      {0x7f7fffff, 0x7f80}, {0x7f7f7fff, 0x7f7f},   // overflow to infinity, and just not
      {0x7f800000, 0x7f80}, {0xff800000, 0xff80},   // infinities
      {0x7f800001, 0x7fc0}, {0xff800001, 0xffc0},   // NaNs that truncation makes infinities
      {0x7fffffff, 0x7fff}, {0xffffffff, 0xffff},   // NaNs that rounding makes zeros
      {0x00000001, 0x0000}, {0x80000000, 0x8000}, {0x00008001, 0x0001}};
  // Repeated, so that whole vectors and edges both see each.
  for (const Example& example : examples) {
    std::vector<float> in(37, FromBits(example.in));
    std::vector<bfloat16> out(37);
    CastToBf16(in.data(), out.data(), in.size());
    EXPECT_THAT(out, testing::Each(example.out)) << std::hex << example.in;
  }
}

template <class T>
void ExpectCastsMatch(Guarded<float> in, size_t n, size_t shift,
                      void (*cast_to)(const float*, T*, size_t),
                      void (*cast_from)(const T*, float*, size_t)) {
  Guarded<T> out(n, 2 * shift + 1, 2), expected = out;
  cast_to(in.ptr(), out.ptr(), n);
  reference::CastTo(in.ptr(), expected.ptr(), n);
  ASSERT_EQ(out.data, expected.data) << n;

  Guarded<float> back(n, shift + 1, 3), back_expected = back;
  cast_from(out.ptr(), back.ptr(), n);
  reference::CastFrom(out.ptr(), back_expected.ptr(), n);
  for (size_t i = 0; i < back.data.size(); ++i) {
    ASSERT_EQ(Bits(back.data[i]), Bits(back_expected.data[i])) << n << " at " << i;
  }
}

TEST_P(KernelsTest, CastsMatchReferenceBitForBit) {
  for (size_t n : kSizes) {
    for (size_t shift : {0, 1, 3}) {
      const Guarded<float> in(n, shift, 1, true);
      ExpectCastsMatch<bfloat16>(in, n, shift, &CastToBf16, &CastFromBf16);
      ExpectCastsMatch<float16>(in, n, shift, &CastToFp16, &CastFromFp16);
    }
  }
}

TEST_P(KernelsTest, EveryBf16SurvivesTheRoundTrip) {
  std::vector<bfloat16> all(65536), back(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<bfloat16>(i);
  std::vector<float> wide(all.size());
  CastFromBf16(all.data(), wide.data(), all.size());
  CastToBf16(wide.data(), back.data(), all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const bool nan = (i & 0x7fff) > 0x7f80;
    ASSERT_EQ(back[i], nan ? (i | 0x40) : i);
  }
}

TEST_P(KernelsTest, CastToFp16ByHand) {
  struct Example {
    uint32_t in;
    uint16_t out;
  };
  const Example examples[] = {
      {0x3f800000, 0x3c00}, {0xc0000000, 0xc000},   // 1, -2
      {0x3f801000, 0x3c00}, {0x3f803000, 0x3c02},   // ties go to even
      {0x3f801001, 0x3c01}, {0x3f800fff, 0x3c00},   // beside a tie
      {0x477fe000, 0x7bff}, {0x477fefff, 0x7bff},   // 65504, the largest, and what rounds to it
      {0x477ff000, 0x7c00}, {0x47800000, 0x7c00},   // 65520 and 65536 overflow to infinity
      {0x7f7fffff, 0x7c00}, {0xff7fffff, 0xfc00},   // as does the largest float
      {0x7f800000, 0x7c00}, {0xff800000, 0xfc00},   // infinities
      {0x7f800001, 0x7e00}, {0xff800001, 0xfe00},   // NaNs that truncation makes infinities
      {0x7fffffff, 0x7fff}, {0xffc02000, 0xfe01},   // payloads are cut
      {0x38800000, 0x0400}, {0x387fc000, 0x03ff},   // the smallest normal, the largest subnormal
      {0x33800000, 0x0001}, {0x33000001, 0x0001},   // 2^-24, and just over its half
      {0x33000000, 0x0000}, {0xb3000000, 0x8000},   // half of it is a tie
      {0x33c00000, 0x0002}, {0x387fe000, 0x0400},   // ties among subnormals, and out of them
      {0x00000001, 0x0000}, {0x80000000, 0x8000}};
  for (const Example& example : examples) {
    std::vector<float> in(37, FromBits(example.in));
    std::vector<float16> out(37);
    CastToFp16(in.data(), out.data(), in.size());
    EXPECT_THAT(out, testing::Each(float16{example.out})) << std::hex << example.in;
  }
}

// What a pattern is worth, from the definition of binary16; not for NaNs.
double Fp16Value(uint32_t pattern) {
  const int exponent = static_cast<int>(pattern >> 10 & 31);
  const int fraction = static_cast<int>(pattern & 1023);
  double value = std::numeric_limits<double>::infinity();
  if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else if (exponent < 31) {
    value = std::ldexp(1024 + fraction, exponent - 25);
  }
  return (pattern & 0x8000) != 0 ? -value : value;
}

TEST_P(KernelsTest, EveryFp16IsWidenedExactlyAndSurvivesTheRoundTrip) {
  std::vector<float16> all(65536), back(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
  std::vector<float> wide(all.size());
  CastFromFp16(all.data(), wide.data(), all.size());
  CastToFp16(wide.data(), back.data(), all.size());
  for (uint32_t i = 0; i < all.size(); ++i) {
    if (IsNan(all[i])) {
      const uint32_t sign = (i & 0x8000) << 16;
      ASSERT_EQ(Bits(wide[i]), sign | 0x7fc00000 | (i & 0x3ff) << 13) << i;
      ASSERT_EQ(back[i].bits, i | 0x200);
    } else {
      ASSERT_EQ(Bits(wide[i]), Bits(static_cast<float>(Fp16Value(i)))) << i;
      ASSERT_EQ(back[i].bits, i);
    }
  }
}

// Between each two neighbours (infinity, as if it were 65536, is the last): the halfway point goes
// to the even one, and the floats on either side of it to the nearer one.
TEST_P(KernelsTest, EveryRoundingBoundaryOfFp16) {
  std::vector<float> in;
  std::vector<float16> expected;
  const auto add = [&](float value, uint32_t pattern) {
    for (uint32_t sign : {0u, 0x8000u}) {
      in.push_back(sign == 0 ? value : -value);
      expected.push_back({static_cast<uint16_t>(pattern | sign)});
    }
  };
  for (uint32_t low = 0; low < 0x7c00; ++low) {
    const double next = low + 1 == 0x7c00 ? 65536.0 : Fp16Value(low + 1);
    const auto middle = static_cast<float>((Fp16Value(low) + next) / 2);  // exact
    add(std::nextafter(static_cast<float>(Fp16Value(low)), 1e9f), low);
    add(std::nextafter(middle, 0.0f), low);
    add(middle, low + low % 2);
    add(std::nextafter(middle, 1e9f), low + 1);
    add(std::nextafter(static_cast<float>(next), 0.0f), low + 1);
  }
  std::vector<float16> out(in.size());
  CastToFp16(in.data(), out.data(), in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    ASSERT_EQ(out[i].bits, expected[i].bits) << std::hexfloat << in[i];
  }
}

TEST_P(KernelsTest, ManyFloatsNarrowToFp16AsTheReferenceDoes) {
  constexpr uint32_t kStride = 251;  // of all patterns, coprime to the vectors
  std::vector<float> in(1 << 14);
  std::vector<float16> out(in.size()), expected(in.size());
  for (uint64_t first = 0; first >> 32 == 0; first += uint64_t{kStride} * in.size()) {
    for (size_t i = 0; i < in.size(); ++i) {
      in[i] = FromBits(static_cast<uint32_t>(first + i * kStride));
    }
    CastToFp16(in.data(), out.data(), in.size());
    reference::CastToFp16(in.data(), expected.data(), in.size());
    ASSERT_EQ(out, expected) << first;
  }
}

TEST_P(KernelsTest, SumMatchesReference) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (bool special : {false, true}) {
        Gradients in(count, n, special);
        Guarded<float> out(n, 1, 7), expected = out;
        Sum(in.pointers.data(), count, out.ptr(), n);
        reference::Sum(in.pointers.data(), count, expected.ptr(), n);
        ExpectSame(out.data, expected.data, "sum");
        // The first may be summed into.
        Sum(in.pointers.data(), count, in.arrays[0].ptr(), n);
        const std::vector<float> result(out.ptr(), out.ptr() + n);
        const std::vector<float> in_place(in.arrays[0].ptr(), in.arrays[0].ptr() + n);
        ExpectSame(in_place, result, "sum in place");
      }
    }
  }
}

template <class T>
void ExpectNarrowSumsMatch() {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (bool special : {false, true}) {
        SourcesOf<T> in(count, n, special);
        Guarded<float> out(n, 1, 7), expected = out;
        Sum(in.pointers.data(), count, out.ptr(), n);
        reference::Sum(in.pointers.data(), count, expected.ptr(), n);
        ExpectSame(out.data, expected.data, "sum");
        Accumulate(in.pointers[0], out.ptr(), n);
        reference::Accumulate(in.pointers[0], expected.ptr(), n);
        ExpectSame(out.data, expected.data, "accumulate");
      }
    }
  }
}

TEST_P(KernelsTest, SumsOf16BitsMatchReference) {
  ExpectNarrowSumsMatch<bfloat16>();
  ExpectNarrowSumsMatch<float16>();
}

// Sums are fp32's: neither rounded to 16 bits on the way nor kept within their range; and what was
// infinite or no number before still is.
TEST_P(KernelsTest, SumsOf16BitsAreWide) {
  const std::vector<float16> most(33, float16{0x7bff}), least(33, float16{0x0001});
  const float16* in[] = {most.data(), most.data(), least.data()};
  std::vector<float> out(33);
  Sum(in, 2, out.data(), out.size());
  EXPECT_THAT(out, testing::Each(131008.0f));
  Sum(in + 2, 1, out.data(), out.size());
  EXPECT_THAT(out, testing::Each(0x1p-24f));
  std::fill(out.begin(), out.end(), 1.0f);
  Accumulate(least.data(), out.data(), out.size());
  EXPECT_THAT(out, testing::Each(1.0f));  // a tie, to even
  Accumulate(most.data(), out.data(), out.size());
  EXPECT_THAT(out, testing::Each(65505.0f));

  const std::vector<float16> infinite(33, float16{0xfc00}), nan(33, float16{0x7c01});
  Accumulate(infinite.data(), out.data(), out.size());
  EXPECT_THAT(out, testing::Each(-std::numeric_limits<float>::infinity()));
  Accumulate(nan.data(), out.data(), out.size());
  EXPECT_THAT(out, testing::Each(testing::IsNan()));
}

TEST_P(KernelsTest, SumGoesFromLeftToRight) {
  const std::vector<float> big(33, 16777216.0f), one(33, 1.0f), minus(33, -16777216.0f);
  const float* in[] = {big.data(), one.data(), one.data(), minus.data()};
  std::vector<float> out(33);
  Sum(in, 4, out.data(), out.size());  // each one is lost beside 2^24
  EXPECT_THAT(out, testing::Each(0.0f));
}

TEST_P(KernelsTest, AccumulateMatchesReference) {
  for (size_t n : kSizes) {
    Guarded<float> in(n, 3, 11, true), out(n, 1, 12, true), expected = out;
    Accumulate(in.ptr(), out.ptr(), n);
    reference::Accumulate(in.ptr(), expected.ptr(), n);
    ExpectSame(out.data, expected.data, "accumulate");
  }
}

TEST_P(KernelsTest, NormMatchesReference) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      Gradients in(count, n, false);
      bool nonfinite = false, expected_nonfinite = false;
      const double actual = SquaredNorm(in.pointers.data(), count, n, &nonfinite);
      const double expected =
          reference::SquaredNorm(in.pointers.data(), count, n, &expected_nonfinite);
      ASSERT_EQ(std::bit_cast<uint64_t>(actual), std::bit_cast<uint64_t>(expected)) << n;
      ASSERT_FALSE(nonfinite);
      ASSERT_FALSE(expected_nonfinite);
    }
  }
}

TEST_P(KernelsTest, NormAddsInSixteenLanes) {
  std::vector<float> g(40, 0.0f);
  g[0] = 134217728.0f;  // squared 2^54, whose neighbour is 2^54 + 4
  g[16] = 1.0f;         // lost in lane 0
  g[32] = 1.25f;        // lost too
  g[8] = 1.0f;          // lane 8 has 2.5625 before it meets lane 0
  g[24] = 1.25f;
  const float* in[] = {g.data()};
  bool nonfinite = false;
  EXPECT_EQ(SquaredNorm(in, 1, g.size(), &nonfinite), 18014398509481988.0);
}

TEST_P(KernelsTest, NormFindsNonfiniteAnywhere) {
  for (float bad : {std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity(), FromBits(0x7fc00000),
                    FromBits(0xff800001)}) {
    for (size_t count : {1, 3}) {
      const size_t n = 1061;
      for (size_t at = 0; at < n; at += at < 70 || at > 1010 ? 1 : 13) {
        std::vector<float> zero(n, 0.0f), g(n, 1.0f);
        g[at] = bad;
        const float* in[] = {g.data(), zero.data(), zero.data()};
        bool nonfinite = false;
        SquaredNorm(in, count, n, &nonfinite);
        ASSERT_TRUE(nonfinite) << bad << " at " << at;
      }
    }
  }
  // Finite gradients whose sum is not, and a flag that was already set.
  const std::vector<float> huge(3, std::numeric_limits<float>::max());
  const float* in[] = {huge.data(), huge.data()};
  bool nonfinite = false;
  SquaredNorm(in, 1, 3, &nonfinite);
  EXPECT_FALSE(nonfinite);
  SquaredNorm(in, 2, 3, &nonfinite);
  EXPECT_TRUE(nonfinite);
  SquaredNorm(in, 1, 3, &nonfinite);
  EXPECT_TRUE(nonfinite);
}

}  // namespace
}  // namespace zerod::kernels
