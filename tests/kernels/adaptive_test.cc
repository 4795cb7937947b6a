// SPDX-License-Identifier: Apache-2.0
//
// The kernels of adaptive.h and asgd_rprop.h on every target that this CPU has, beside the plain
// reference. What the reference computes is checked against torch (optimizers_vs_torch.py).
#include "kernels/cpu/adaptive.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/asgd_rprop.h"
#include "kernels/cpu/reference.h"
#include "tests/kernels/arrays.h"

namespace zerod::kernels {
namespace {

using AdaptiveTest = TargetTest;

INSTANTIATE_TEST_SUITE_P(Targets, AdaptiveTest,
                         testing::Values("SCALAR", "NEON", "AVX2", "AVX3"), ParamName);

using Step = std::function<void(const float* const* grads, size_t count, float* p, float* a,
                                float* b, float* c, Copy copy, size_t n)>;

// The master and three states, each at an alignment of its own; a step takes those that it has.
struct State {
  State(size_t n, size_t shift, bool special)
      : p(n, shift, 41, special), a(n, shift / 2, 42, special), b(n, 2, 43), c(n, 3, 44, special) {
    for (float& x : b.data) x = std::fabs(x);
  }
  void Run(const Step& step, const Gradients& grads, size_t count, Copy copy, size_t n) {
    step(grads.pointers.data(), count, p.ptr(), a.ptr(), b.ptr(), c.ptr(), copy, n);
  }
  void ExpectEqual(const State& other, const char* what) const {
    SCOPED_TRACE(what);
    ExpectSame(p.data, other.p.data, "p");
    ExpectSame(a.data, other.a.data, "the first state");
    ExpectSame(b.data, other.b.data, "the second state");
    ExpectSame(c.data, other.c.data, "the third state");
  }
  Guarded<float> p, a, b, c;
};

void ExpectMatches(const Step& step, const Step& reference) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (size_t shift : {0, 1, 35}) {
        const bool special = shift == 1;
        Gradients grads(count, n, special);
        Guarded<bfloat16> copy(n, shift, 45), copy_expected = copy;
        Guarded<float16> fp16(n, shift, 46), fp16_expected = fp16;
        State expected(n, shift, special), with_copy = expected, alone = expected,
                                           with_fp16 = expected;
        expected.Run(reference, grads, count, copy_expected.ptr(), n);
        with_copy.Run(step, grads, count, copy.ptr(), n);
        with_copy.ExpectEqual(expected, "with a copy");
        ExpectSame16(copy.data, copy_expected.data, "copy");
        alone.Run(step, grads, count, nullptr, n);
        alone.ExpectEqual(expected, "without copy");
        with_fp16.Run(step, grads, count, fp16.ptr(), n);
        with_fp16.ExpectEqual(expected, "with a float16 copy");
        reference::CastTo(expected.p.ptr(), fp16_expected.ptr(), n);
        ExpectSame16(fp16.data, fp16_expected.data, "float16 copy");
      }
    }
  }
}

template <class Scalars>
Step Of(void (*function)(const Scalars&, const float* const*, size_t, float*, float*, float*, Copy,
                         size_t),
        const Scalars& s) {
  return [=](const float* const* grads, size_t count, float* p, float* a, float* b, float*,
             Copy copy, size_t n) { function(s, grads, count, p, a, b, copy, n); };
}

TEST_P(AdaptiveTest, RmsPropMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    for (const bool momentum : {false, true}) {
      for (const bool centered : {false, true}) {
        const RmsPropScalars s = MakeRmsPropScalars(
            {1e-2, weight_decay == 0 ? 0.9 : 0.3, 1e-8, weight_decay, momentum ? 0.9 : 0}, 0.25);
        const auto of = [&](auto function) {
          return [=](const float* const* grads, size_t count, float* p, float* a, float* b,
                     float* c, Copy copy, size_t n) {
            function(s, grads, count, p, b, momentum ? a : nullptr, centered ? c : nullptr, copy,
                     n);
          };
        };
        ExpectMatches(of(&RmsProp), of(&reference::RmsProp));
      }
    }
  }
}

TEST_P(AdaptiveTest, RmsPropByHand) {
  // Gradient 8 scaled to 2.
  const RmsPropScalars s = MakeRmsPropScalars({0.5, 0.75, 1.0, 0.0, 0.5}, 0.25);
  const size_t n = 100;
  std::vector<float> g(n, 8.0f), p(n, 1.0f), v(n, 0.0f), b(n, 4.0f);
  const float* grads[] = {g.data()};
  RmsProp(s, grads, 1, p.data(), v.data(), b.data(), nullptr, nullptr, n);
  EXPECT_THAT(v, testing::Each(1.0f));
  EXPECT_THAT(b, testing::Each(3.0f));  // 0.5 * 4 + 2 / (1 + 1)
  EXPECT_THAT(p, testing::Each(-0.5f));
}

TEST_P(AdaptiveTest, AdadeltaMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    const AdadeltaScalars s = MakeAdadeltaScalars(0.5, 0.9, 1e-6, weight_decay, 0.25);
    ExpectMatches(Of(&Adadelta, s), Of(&reference::Adadelta, s));
  }
}

TEST_P(AdaptiveTest, AdamaxMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    const AdamaxScalars s = MakeAdamaxScalars(2e-3, 0.9, 0.99, 1e-8, weight_decay, 3, 0.25);
    ExpectMatches(Of(&Adamax, s), Of(&reference::Adamax, s));
  }
}

TEST_P(AdaptiveTest, NAdamMatchesReference) {
  for (const bool decoupled : {false, true}) {
    const NAdamScalars s =
        MakeNAdamScalars({2e-3, 0.9, 0.99, 1e-8, 0.1, 4e-3, decoupled}, 3, 0.25);
    ExpectMatches(Of(&NAdam, s), Of(&reference::NAdam, s));
  }
}

// Beside the product that torch keeps.
TEST(NAdamScalarsTest, TheMomentaMultiplyUp) {
  for (const double beta1 : {0.0, 0.5, 0.9, 0.999}) {
    for (const double momentum_decay : {0.0, 1e-12, 4e-3, 1.0, 1e4}) {
      double product = 1;
      for (uint64_t t = 1; t <= 2000; ++t) {
        const auto mu = [&](uint64_t i) {
          return beta1 * (1 - 0.5 * std::pow(0.96, static_cast<double>(i) * momentum_decay));
        };
        product *= mu(t);
        const NAdamScalars s =
            MakeNAdamScalars({1.0, beta1, 0.9, 0.0, 0.0, momentum_decay, false}, t, 1.0);
        const double gradient_step = (1 - mu(t)) / (1 - product);
        const double momentum_step = mu(t + 1) / (1 - product * mu(t + 1));
        ASSERT_NEAR(s.gradient_step, gradient_step, 1e-7 * gradient_step) << beta1 << " " << t;
        ASSERT_NEAR(s.momentum_step, momentum_step, 1e-7 * momentum_step) << beta1 << " " << t;
      }
    }
  }
  // As soon for a job that was restored to the largest count.
  const NAdamScalars s = MakeNAdamScalars({1.0, 0.5, 0.9}, uint64_t{1} << 53, 1.0);
  EXPECT_FLOAT_EQ(s.gradient_step, 0.5f);
}

TEST_P(AdaptiveTest, RAdamMatchesReference) {
  for (const bool decoupled : {false, true}) {
    for (const uint64_t t : {2, 100}) {
      const RAdamScalars s = MakeRAdamScalars({1e-3, 0.9, 0.99, 1e-8, 0.1, decoupled}, t, 0.25);
      EXPECT_EQ(s.rectified, t == 100);
      ExpectMatches(Of(&RAdam, s), Of(&reference::RAdam, s));
    }
  }
}

TEST_P(AdaptiveTest, AsgdMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    for (const double t0 : {1e6, 2.0}) {
      const AsgdScalars s = MakeAsgdScalars({1e-2, 2e-2, 0.1, 0.75, t0, weight_decay}, 10, 0.25);
      EXPECT_EQ(s.mu == 1, t0 == 1e6);
      const auto of = [&](auto function) {
        return [=](const float* const* grads, size_t count, float* p, float* a, float*, float*,
                   Copy copy, size_t n) { function(s, grads, count, p, a, copy, n); };
      };
      ExpectMatches(of(&Asgd), of(&reference::Asgd));
    }
  }
}

TEST(AsgdScalarsTest, ARateIsMadeOfTheStepBefore) {
  const AsgdOptions options{.lr = 0.5, .lr_before = 0.25, .lambd = 4, .alpha = 1, .t0 = 1};
  const AsgdScalars first = MakeAsgdScalars(options, 1, 1);
  EXPECT_EQ(first.negative_eta, -0.5f);
  EXPECT_EQ(first.mu, 1.0f);
  const AsgdScalars fourth = MakeAsgdScalars(options, 4, 1);
  EXPECT_EQ(fourth.negative_eta, -0.0625f);  // 0.25 / (1 + 4 * 0.25 * 3)
  EXPECT_EQ(fourth.decay, 0.75f);
  EXPECT_EQ(fourth.mu, 0.5f);
}

TEST_P(AdaptiveTest, RpropMatchesReference) {
  const RpropScalars s = MakeRpropScalars(0.5, 1.2, 0.01, 2, 0.25);
  ExpectMatches(Of(&Rprop, s), Of(&reference::Rprop, s));
}

TEST_P(AdaptiveTest, RpropByHand) {
  const RpropScalars s = MakeRpropScalars(0.5, 2.0, 0.5, 3.0, 1.0);
  std::vector<float> g = {1, 1, -1, 0, 1, -1}, prev = {1, -1, -1, 1, 0, 1};
  std::vector<float> step = {1, 1, 2, 1, 1, 0.75}, p(6, 10.0f);
  const float* grads[] = {g.data()};
  Rprop(s, grads, 1, p.data(), prev.data(), step.data(), nullptr, 6);
  EXPECT_THAT(step, testing::ElementsAre(2, 0.5, 3, 1, 1, 0.5));
  EXPECT_THAT(p, testing::ElementsAre(8, 10, 13, 10, 9, 10));
  EXPECT_THAT(prev, testing::ElementsAre(1, 0, -1, 0, 1, 0));
}

}  // namespace
}  // namespace zerod::kernels
