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

TEST_P(KernelsTest, CastsMatchReferenceBitForBit) {
  for (size_t n : kSizes) {
    for (size_t shift : {0, 1, 3}) {
      Guarded<float> in(n, shift, 1, true);
      Guarded<uint16_t> out(n, 2 * shift + 1, 2), expected = out;
      CastToBf16(in.ptr(), out.ptr(), n);
      reference::CastToBf16(in.ptr(), expected.ptr(), n);
      ASSERT_EQ(out.data, expected.data) << n;

      Guarded<float> back(n, shift + 1, 3), back_expected = back;
      CastFromBf16(out.ptr(), back.ptr(), n);
      reference::CastFromBf16(out.ptr(), back_expected.ptr(), n);
      for (size_t i = 0; i < back.data.size(); ++i) {
        ASSERT_EQ(Bits(back.data[i]), Bits(back_expected.data[i])) << n << " at " << i;
      }
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
