// SPDX-License-Identifier: Apache-2.0
//
// Every optimizer on every target that this CPU has, beside the plain reference, as in
// kernels_test.cc. What the reference computes is checked against torch (optimizers_vs_torch.py).
#include "kernels/cpu/optimizers.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/reference.h"
#include "tests/kernels/arrays.h"

namespace zerod::kernels {
namespace {

using OptimizersTest = TargetTest;

INSTANTIATE_TEST_SUITE_P(Targets, OptimizersTest,
                         testing::Values("SCALAR", "NEON", "AVX2", "AVX3"), ParamName);

AdamWScalars Scalars(double beta1) {
  return MakeAdamWScalars(1e-3, beta1, 0.999, 1e-8, 0.01, 3, 0.25);
}

TEST_P(OptimizersTest, AdamWMatchesReference) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (size_t shift : {0, 1, 35}) {
        const bool special = shift == 1;
        const AdamWScalars s = Scalars(shift == 35 ? 0.4 : 0.9);
        Gradients grads(count, n, special);
        Guarded<float> p(n, shift, 21, special), m(n, shift / 2, 22, special), v(n, 2, 23);
        for (float& x : v.data) x = std::fabs(x);
        Guarded<bfloat16> copy(n, shift, 24);
        Guarded<float16> fp16(n, shift, 25), fp16_expected = fp16;
        auto p2 = p, m2 = m, v2 = v, p3 = p, m3 = m, v3 = v, p4 = p, m4 = m, v4 = v;
        auto copy2 = copy;
        AdamW(s, grads.pointers.data(), count, p.ptr(), m.ptr(), v.ptr(), copy.ptr(), n);
        reference::AdamW(s, grads.pointers.data(), count, p2.ptr(), m2.ptr(), v2.ptr(),
                         copy2.ptr(), n);
        ExpectSame(p.data, p2.data, "p");
        ExpectSame(m.data, m2.data, "m");
        ExpectSame(v.data, v2.data, "v");
        ExpectSame16(copy.data, copy2.data, "copy");
        AdamW(s, grads.pointers.data(), count, p3.ptr(), m3.ptr(), v3.ptr(), nullptr, n);
        ExpectSame(p3.data, p2.data, "p without copy");
        ExpectSame(m3.data, m2.data, "m without copy");
        ExpectSame(v3.data, v2.data, "v without copy");
        AdamW(s, grads.pointers.data(), count, p4.ptr(), m4.ptr(), v4.ptr(), fp16.ptr(), n);
        reference::CastTo(p2.ptr(), fp16_expected.ptr(), n);
        ExpectSame(p4.data, p2.data, "p with a float16 copy");
        ExpectSame(m4.data, m2.data, "m with a float16 copy");
        ExpectSame(v4.data, v2.data, "v with a float16 copy");
        ExpectSame16(fp16.data, fp16_expected.data, "float16 copy");
      }
    }
  }
}

TEST_P(OptimizersTest, AdamWByHand) {
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

TEST_P(OptimizersTest, AdamWSplitFollowsAdamW) {
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
        ExpectSame16(copy.data, copy2.data, "copy");
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

// An optimizer with one state, or none where `state` is null, and its reference.
using Step = std::function<void(const float* const* grads, size_t count, float* p, float* state,
                                Copy copy, size_t n)>;

void ExpectMatches(const Step& step, const Step& expected, bool has_state) {
  for (size_t n : kSizes) {
    for (size_t count : kCounts) {
      for (size_t shift : {0, 1, 35}) {
        const bool special = shift == 1;
        Gradients grads(count, n, special);
        Guarded<float> p(n, shift, 41, special), state(n, shift / 2, 42);
        for (float& x : state.data) x = std::fabs(x);
        Guarded<bfloat16> copy(n, shift, 43);
        Guarded<float16> fp16(n, shift, 44), fp16_expected = fp16;
        auto p2 = p, state2 = state, p3 = p, state3 = state, p4 = p, state4 = state;
        auto copy2 = copy;
        const auto of = [&](Guarded<float>& s) { return has_state ? s.ptr() : nullptr; };
        step(grads.pointers.data(), count, p.ptr(), of(state), copy.ptr(), n);
        expected(grads.pointers.data(), count, p2.ptr(), of(state2), copy2.ptr(), n);
        ExpectSame(p.data, p2.data, "p");
        ExpectSame(state.data, state2.data, "state");
        ExpectSame16(copy.data, copy2.data, "copy");
        step(grads.pointers.data(), count, p3.ptr(), of(state3), nullptr, n);
        ExpectSame(p3.data, p2.data, "p without copy");
        ExpectSame(state3.data, state2.data, "state without copy");
        step(grads.pointers.data(), count, p4.ptr(), of(state4), fp16.ptr(), n);
        reference::CastTo(p2.ptr(), fp16_expected.ptr(), n);
        ExpectSame(p4.data, p2.data, "p with a float16 copy");
        ExpectSame(state4.data, state2.data, "state with a float16 copy");
        ExpectSame16(fp16.data, fp16_expected.data, "float16 copy");
      }
    }
  }
}

template <class Scalars>
Step Of(void (*function)(const Scalars&, const float* const*, size_t, float*, float*, Copy, size_t),
        const Scalars& s) {
  return [function, s](const float* const* grads, size_t count, float* p, float* state, Copy copy,
                       size_t n) { function(s, grads, count, p, state, copy, n); };
}

TEST_P(OptimizersTest, AdamWithL2MatchesReference) {
  const AdamWScalars s = MakeAdamWScalars(1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 0.25, false, false);
  EXPECT_EQ(s.decay, 1.0f);
  EXPECT_EQ(s.inverse_sqrt_bias2, 1.0f);
  for (size_t n : kSizes) {
    Gradients grads(3, n, false);
    Guarded<float> p(n, 1, 51), m(n, 2, 52), v(n, 3, 53);
    for (float& x : v.data) x = std::fabs(x);
    auto p2 = p, m2 = m, v2 = v;
    AdamW(s, grads.pointers.data(), 3, p.ptr(), m.ptr(), v.ptr(), nullptr, n);
    reference::AdamW(s, grads.pointers.data(), 3, p2.ptr(), m2.ptr(), v2.ptr(), nullptr, n);
    ExpectSame(p.data, p2.data, "p");
    ExpectSame(m.data, m2.data, "m");
    ExpectSame(v.data, v2.data, "v");
  }
}

TEST_P(OptimizersTest, LionMatchesReference) {
  const LionScalars s = MakeLionScalars(1e-3, 0.9, 0.99, 0.1, 0.25);
  ExpectMatches(Of(&Lion, s), Of(&reference::Lion, s), true);
}

TEST_P(OptimizersTest, LionStandsStillWithoutASign) {
  const LionScalars s = MakeLionScalars(0.5, 0.5, 0.5, 0.0, 1.0);
  std::vector<float> g(40, 0.0f), p(40, 1.0f), m(40, 0.0f);
  g[3] = 2.0f;
  g[4] = -2.0f;
  const float* grads[] = {g.data()};
  Lion(s, grads, 1, p.data(), m.data(), nullptr, p.size());
  EXPECT_EQ(p[2], 1.0f);
  EXPECT_EQ(p[3], 0.5f);
  EXPECT_EQ(p[4], 1.5f);
  EXPECT_EQ(m[4], -1.0f);
}

TEST_P(OptimizersTest, AdagradMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    const AdagradScalars s = MakeAdagradScalars(1e-2, 0.01, 1e-10, weight_decay, 3, 0.25);
    ExpectMatches(Of(&Adagrad, s), Of(&reference::Adagrad, s), true);
  }
}

TEST_P(OptimizersTest, SgdMatchesReference) {
  for (const double weight_decay : {0.0, 0.1}) {
    for (const bool nesterov : {false, true}) {
      const SgdScalars s = MakeSgdScalars(1e-2, 0.9, 0.0, weight_decay, nesterov, 3, 0.25);
      ExpectMatches(Of(&Sgd, s), Of(&reference::Sgd, s), true);
      ExpectMatches(Of(&Sgd, s), Of(&reference::Sgd, s), false);
    }
  }
}

TEST_P(OptimizersTest, DampeningDoesNotDampenTheFirstStep) {
  EXPECT_EQ(MakeSgdScalars(0.1, 0.9, 0.25, 0, false, 1, 1).weight, 1.0f);
  EXPECT_EQ(MakeSgdScalars(0.1, 0.9, 0.25, 0, false, 2, 1).weight, 0.75f);
}

}  // namespace
}  // namespace zerod::kernels
