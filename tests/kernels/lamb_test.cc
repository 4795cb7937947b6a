// SPDX-License-Identifier: Apache-2.0
//
// LAMB on every target that this CPU has, beside the plain reference, as in kernels_test.cc; and
// on a tensor that is cut into blocks, beside the paper's formula in fp64.
#include "kernels/cpu/lamb.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "gtest/gtest.h"
#include "kernels/cpu/reference.h"
#include "tests/kernels/arrays.h"

namespace zerod::kernels {
namespace {

using LambTest = TargetTest;

INSTANTIATE_TEST_SUITE_P(Targets, LambTest, testing::Values("SCALAR", "NEON", "AVX2", "AVX3"),
                         ParamName);

LambScalars Scalars(bool eps_inside_sqrt, double weight_decay) {
  return MakeLambScalars({.eps = 1e-6,
                          .eps_inside_sqrt = eps_inside_sqrt,
                          .weight_decay = weight_decay},
                         /*t=*/3, /*grad_scale=*/0.25);
}

void ExpectSameSquares(double actual, double expected, const char* what) {
  if (std::isnan(actual) && std::isnan(expected)) return;
  ASSERT_EQ(std::bit_cast<uint64_t>(actual), std::bit_cast<uint64_t>(expected)) << what;
}

void ExpectFirstPassMatches(const LambScalars& s, size_t n, size_t count, size_t shift) {
  const bool special = shift == 1;
  Gradients grads(count, n, special);
  Guarded<float> p(n, shift, 61, special), m(n, shift / 2, 62, special), v(n, 2, 63);
  for (float& x : v.data) x = std::fabs(x);
  auto p2 = p, m2 = m, v2 = v;
  const LambSquares squares =
      LambMoments(s, grads.pointers.data(), count, p.ptr(), m.ptr(), v.ptr(), n);
  const LambSquares expected =
      reference::LambMoments(s, grads.pointers.data(), count, p2.ptr(), m2.ptr(), v2.ptr(), n);
  ExpectSame(m.data, m2.data, "m");
  ExpectSame(v.data, v2.data, "v");
  ExpectSame(p.data, p2.data, "p, which the first pass leaves");
  ExpectSameSquares(squares.p, expected.p, "squares of p");
  ExpectSameSquares(squares.u, expected.u, "squares of u");
}

template <class T>
void ExpectSecondPassMatches(const LambScalars& s, size_t n, size_t shift) {
  const bool special = shift == 1;
  Guarded<float> p(n, shift, 61, special), m(n, shift / 2, 62, special), v(n, 2, 63);
  for (float& x : v.data) x = std::fabs(x);
  Guarded<T> copy(n, shift, 64), copy2 = copy;
  auto p2 = p, p3 = p;
  const auto m_before = m, v_before = v;
  LambApply(s, 0.75f, p.ptr(), m.ptr(), v.ptr(), copy.ptr(), n);
  reference::LambApply(s, 0.75f, p2.ptr(), m.ptr(), v.ptr(), copy2.ptr(), n);
  ExpectSame(p.data, p2.data, "p");
  ExpectSame16(copy.data, copy2.data, "copy");
  LambApply(s, 0.75f, p3.ptr(), m.ptr(), v.ptr(), nullptr, n);
  ExpectSame(p3.data, p2.data, "p without copy");
  ExpectSame(m.data, m_before.data, "m, which the second pass leaves");
  ExpectSame(v.data, v_before.data, "v, which the second pass leaves");
}

TEST_P(LambTest, MatchesReference) {
  for (const bool eps_inside_sqrt : {false, true}) {
    const LambScalars s = Scalars(eps_inside_sqrt, 0.01);
    for (size_t n : kSizes) {
      for (size_t shift : {0, 1, 35}) {
        for (size_t count : kCounts) ExpectFirstPassMatches(s, n, count, shift);
        ExpectSecondPassMatches<bfloat16>(s, n, shift);
        ExpectSecondPassMatches<float16>(s, n, shift);
      }
    }
  }
}

// From weights of 0 a step of 1 without decay goes to -u: its squares are those that the first pass
// gave.
TEST_P(LambTest, BothPassesComputeTheSameUpdate) {
  const LambScalars s =
      MakeLambScalars({.lr = 1, .bias_correction = false}, /*t=*/1, /*grad_scale=*/1);
  ASSERT_EQ(s.step_size, 1.0f);
  const size_t n = 1003;
  Gradients grads(1, n, false);
  Guarded<float> m(n, 0, 72), v(n, 0, 73);
  for (float& x : v.data) x = std::fabs(x);
  std::vector<float> p(n, 0.0f);
  const LambSquares squares =
      LambMoments(s, grads.pointers.data(), 1, p.data(), m.ptr(), v.ptr(), n);
  LambApply(s, 1.0f, p.data(), m.ptr(), v.ptr(), nullptr, n);
  const float* in = p.data();
  bool nonfinite = false;
  EXPECT_EQ(squares.p, 0.0);
  EXPECT_GT(squares.u, 0.0);
  EXPECT_EQ(squares.u, SquaredNorm(&in, 1, n, &nonfinite));
}

// The paper's Algorithm 2 with DeepSpeed's clamp and correction.
struct Textbook {
  LambOptions o;
  double min_coeff, max_coeff;
  std::vector<double> p, m, v;

  void Step(const std::vector<double>& g, int t) {
    double p_squares = 0, u_squares = 0;
    std::vector<double> u(p.size());
    for (size_t i = 0; i < p.size(); ++i) {
      m[i] = o.beta1 * m[i] + (1 - o.beta1) * g[i];
      v[i] = o.beta2 * v[i] + (1 - o.beta2) * g[i] * g[i];
      const double d = o.eps_inside_sqrt ? std::sqrt(v[i] + o.eps) : std::sqrt(v[i]) + o.eps;
      u[i] = m[i] / d + o.weight_decay * p[i];
      p_squares += p[i] * p[i];
      u_squares += u[i] * u[i];
    }
    double ratio = 1;
    if (p_squares > 0 && u_squares > 0) {
      ratio = std::clamp(std::sqrt(p_squares / u_squares), min_coeff, max_coeff);
    }
    double rate = o.lr * ratio;
    if (o.bias_correction) {
      rate *= std::sqrt(1 - std::pow(o.beta2, t)) / (1 - std::pow(o.beta1, t));
    }
    for (size_t i = 0; i < p.size(); ++i) p[i] -= rate * u[i];
  }
};

// 20 steps; the tensor is cut at each of `cuts`, as shards and blocks cut it.
void ExpectFollowsTextbook(const LambOptions& options, double scale, double min_coeff,
                           double max_coeff) {
  const size_t cuts[] = {0, 1024, 2048, 2500, 3001};
  const size_t n = 3001;
  std::vector<float> p = RandomFloats(n, 81, false), m(n, 0.0f), v(n, 0.0f);
  for (float& x : p) x = static_cast<float>(x * scale);
  Textbook book{options, min_coeff, max_coeff, {p.begin(), p.end()},
                std::vector<double>(n), std::vector<double>(n)};
  double moved = 0;
  for (int t = 1; t <= 20; ++t) {
    const std::vector<float> in = RandomFloats(n, 90 + t, false);
    book.Step({in.begin(), in.end()}, t);
    const LambScalars s = MakeLambScalars(options, t, 1.0);
    LambSquares squares{0, 0};
    for (size_t k = 0; k + 1 < std::size(cuts); ++k) {
      const size_t at = cuts[k];
      const float* grads[] = {in.data() + at};
      const LambSquares part =
          LambMoments(s, grads, 1, &p[at], &m[at], &v[at], cuts[k + 1] - at);
      squares.p += part.p;
      squares.u += part.u;
    }
    const float ratio = LambTrustRatio(squares, min_coeff, max_coeff);
    moved += s.step_size * ratio * 5;
    for (size_t k = 0; k + 1 < std::size(cuts); ++k) {
      const size_t at = cuts[k];
      LambApply(s, ratio, &p[at], &m[at], &v[at], nullptr, cuts[k + 1] - at);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    ASSERT_NEAR(p[i], book.p[i], 2e-6 * (std::fabs(book.p[i]) + moved)) << i;
  }
}

TEST_P(LambTest, FollowsTheTextbook) {
  ExpectFollowsTextbook({.lr = 1e-2}, 1.0, 0.01, 10.0);
  ExpectFollowsTextbook({.lr = 1e-2, .weight_decay = 0.1}, 1.0, 0.01, 1e9);
  ExpectFollowsTextbook({.eps = 1e-3, .eps_inside_sqrt = true, .weight_decay = 0.1}, 1.0, 0.01,
                        10.0);
  ExpectFollowsTextbook({.lr = 1e-2, .bias_correction = false}, 1e-4, 0.01, 10.0);
  ExpectFollowsTextbook({.lr = 1e-2, .weight_decay = 0.01}, 0.0, 0.01, 10.0);
}

TEST(LambTrustRatioTest, IsClampedAndOneWithoutANorm) {
  EXPECT_EQ(LambTrustRatio({9.0, 4.0}, 0.01, 10.0), 1.5f);
  EXPECT_EQ(LambTrustRatio({900.0, 4.0}, 0.01, 10.0), 10.0f);
  EXPECT_EQ(LambTrustRatio({1e-6, 4.0}, 0.01, 10.0), 0.01f);
  EXPECT_EQ(LambTrustRatio({0.0, 4.0}, 0.01, 10.0), 1.0f);
  EXPECT_EQ(LambTrustRatio({9.0, 0.0}, 0.01, 10.0), 1.0f);
  EXPECT_EQ(LambTrustRatio({0.0, 0.0}, 2.0, 10.0), 1.0f);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(std::isnan(LambTrustRatio({nan, 4.0}, 0.01, 10.0)));
  EXPECT_TRUE(std::isnan(LambTrustRatio({9.0, nan}, 0.01, 10.0)));
}

}  // namespace
}  // namespace zerod::kernels
