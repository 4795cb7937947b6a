// SPDX-License-Identifier: Apache-2.0
//
// Every function on every target that this CPU has, beside the plain reference: same bits, for
// odd sizes, pointers that are aligned to nothing but their elements, special values, and nothing
// written outside [0, n). What the reference itself computes is checked by examples worked out by
// hand, and against torch (adamw_vs_torch.py).
#include "kernels/cpu/kernels.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/reference.h"

namespace zerod::kernels {
namespace {

constexpr size_t kSizes[] = {0,  1,  2,  3,  7,   15,  16,   17,   31,   32,   33,
                             47, 63, 64, 65, 127, 500, 1023, 1024, 1025, 2081, 4099};
constexpr size_t kCounts[] = {1, 2, 3, 4, 5, kSourcesMax};
constexpr size_t kGuard = 70;  // elements on either side, which nobody may change

uint32_t Bits(float x) { return std::bit_cast<uint32_t>(x); }
float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

// Ordinary values, and among them, where `special`, one in four from the edges of the format.
std::vector<float> RandomFloats(size_t n, uint32_t seed, bool special) {
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
        data[i] = static_cast<T>(Bits(values[i]) >> 16);
      }
    }
  }
  T* ptr() { return data.data() + begin; }

  std::vector<T> data;
  size_t begin;
};

// Equal bits; where arithmetic gave a NaN, its payload is the hardware's.
void ExpectSame(const std::vector<float>& actual, const std::vector<float>& expected,
                const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    ASSERT_EQ(Bits(actual[i]), Bits(expected[i]))
        << what << " at " << i << ": " << actual[i] << " vs " << expected[i];
  }
}

// Equal 16-bit values; two NaNs are equal.
void ExpectSameBf16(const std::vector<uint16_t>& actual, const std::vector<uint16_t>& expected,
                    const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if ((actual[i] & 0x7fff) > 0x7f80 && (expected[i] & 0x7fff) > 0x7f80) continue;
    ASSERT_EQ(actual[i], expected[i]) << what << " at " << i;
  }
}

// `count` gradients, each at an alignment of its own.
struct Gradients {
  Gradients(size_t count, size_t n, bool special) {
    for (size_t k = 0; k < count; ++k) {
      arrays.emplace_back(n, k % 5, static_cast<uint32_t>(1000 + k), special);
    }
    for (auto& array : arrays) pointers.push_back(array.ptr());
  }
  std::vector<Guarded<float>> arrays;
  std::vector<const float*> pointers;
};

class KernelsTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!ForceTarget(GetParam())) GTEST_SKIP() << GetParam() << " is not on this CPU";
  }
  void TearDown() override { ForceTarget(""); }
};

std::string ParamName(const testing::TestParamInfo<const char*>& info) { return info.param; }

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

AdamWScalars Scalars(double beta1) {
  return MakeAdamWScalars(1e-3, beta1, 0.999, 1e-8, 0.01, 3, 0.25);
}

TEST_P(KernelsTest, AdamWMatchesReference) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (size_t shift : {0, 1, 35}) {
        const bool special = shift == 1;
        const AdamWScalars s = Scalars(shift == 35 ? 0.4 : 0.9);
        Gradients grads(count, n, special);
        Guarded<float> p(n, shift, 21, special), m(n, shift / 2, 22, special), v(n, 2, 23);
        for (float& x : v.data) x = std::fabs(x);
        Guarded<uint16_t> copy(n, shift, 24);
        auto p2 = p, m2 = m, v2 = v, p3 = p, m3 = m, v3 = v;
        auto copy2 = copy;
        AdamW(s, grads.pointers.data(), count, p.ptr(), m.ptr(), v.ptr(), copy.ptr(), n);
        reference::AdamW(s, grads.pointers.data(), count, p2.ptr(), m2.ptr(), v2.ptr(),
                         copy2.ptr(), n);
        ExpectSame(p.data, p2.data, "p");
        ExpectSame(m.data, m2.data, "m");
        ExpectSame(v.data, v2.data, "v");
        ExpectSameBf16(copy.data, copy2.data, "copy");
        AdamW(s, grads.pointers.data(), count, p3.ptr(), m3.ptr(), v3.ptr(), nullptr, n);
        ExpectSame(p3.data, p2.data, "p without copy");
        ExpectSame(m3.data, m2.data, "m without copy");
        ExpectSame(v3.data, v2.data, "v without copy");
      }
    }
  }
}

TEST_P(KernelsTest, AdamWByHand) {
  // Gradient 8 scaled to 2; one step from zero moments moves by lr, after the decay.
  const AdamWScalars s = MakeAdamWScalars(0.125, 0.75, 0.75, 0.0, 0.5, 1, 0.25);
  const size_t n = 100;
  std::vector<float> g(n, 8.0f), p(n, 1.0f), m(n, 0.0f), v(n, 0.0f);
  std::vector<bfloat16> copy(n);
  const float* grads[] = {g.data()};
  AdamW(s, grads, 1, p.data(), m.data(), v.data(), copy.data(), n);
  EXPECT_THAT(m, testing::Each(0.5f));
  EXPECT_THAT(v, testing::Each(1.0f));
  EXPECT_THAT(p, testing::Each(0.9375f - 0.125f));
  EXPECT_THAT(copy, testing::Each(0x3f50));
}

TEST_P(KernelsTest, AdamWSplitFollowsAdamW) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (size_t shift : {0, 1, 35}) {
        const bool special = shift == 1;
        const AdamWScalars s = Scalars(0.9);
        Gradients grads(count, n, special);
        Guarded<float> p(n, shift, 31, special), m(n, 1, 32), v(n, 2, 33);
        for (float& x : v.data) x = std::fabs(x);
        Guarded<uint16_t> copy(n, shift, 34), remainder(n, shift / 2, 35);
        SplitMaster(p.ptr(), copy.ptr(), remainder.ptr(), n);
        auto m2 = m, v2 = v, joined = p;
        auto copy2 = copy, remainder2 = remainder;
        AdamWSplit(s, grads.pointers.data(), count, copy.ptr(), remainder.ptr(), m.ptr(), v.ptr(),
                   n);
        // With a master of 32 bits.
        AdamW(s, grads.pointers.data(), count, p.ptr(), m2.ptr(), v2.ptr(), nullptr, n);
        JoinMaster(copy.ptr(), remainder.ptr(), joined.ptr(), n);
        ExpectSame(joined.data, p.data, "joined master");
        ExpectSame(m.data, m2.data, "m");
        ExpectSame(v.data, v2.data, "v");
        // With the reference, guards too.
        Guarded<float> m3(n, 1, 32), v3(n, 2, 33);
        for (float& x : v3.data) x = std::fabs(x);
        reference::AdamWSplit(s, grads.pointers.data(), count, copy2.ptr(), remainder2.ptr(),
                              m3.ptr(), v3.ptr(), n);
        ExpectSameBf16(copy.data, copy2.data, "copy");
        for (size_t i = 0; i < n; ++i) {
          if (std::isnan(p.ptr()[i])) continue;
          ASSERT_EQ(remainder.ptr()[i], remainder2.ptr()[i]) << i;
        }
        for (size_t i = 0; i < remainder.data.size(); ++i) {
          if (i >= remainder.begin && i < remainder.begin + n) continue;
          ASSERT_EQ(remainder.data[i], remainder2.data[i]) << "guard " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace zerod::kernels
