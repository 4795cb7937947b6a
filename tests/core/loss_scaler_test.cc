// SPDX-License-Identifier: Apache-2.0
//
// The traces are DeepSpeed 0.19.8's own.
#include "daemon/core/loss_scaler.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace zerod::core {
namespace {

LossScaleSpec Spec(uint32_t hysteresis, bool consecutive = false) {
  LossScaleSpec spec;
  spec.initial_scale = 16;
  spec.window = 3;
  spec.hysteresis = hysteresis;
  spec.consecutive_hysteresis = consecutive;
  return spec;
}

// The scale after each outcome: 'T' overflows, 'F' does not.
std::vector<double> Trace(LossScaler scaler, const std::string& outcomes) {
  std::vector<double> scales;
  for (char c : outcomes) {
    EXPECT_TRUE(scaler.Update(c == 'T').ok());
    scales.push_back(scaler.scale());
  }
  return scales;
}

using Scales = std::vector<double>;

TEST(LossScaler, GrowsAfterAWindowAndFirstOnTheFourthStep) {
  EXPECT_EQ(Trace(LossScaler(Spec(2)), "FFFFFFFF"), (Scales{16, 16, 16, 32, 32, 32, 64, 64}));
}

TEST(LossScaler, BearsSomeOverflowsAndIsStrictUntilItGrows) {
  EXPECT_EQ(Trace(LossScaler(Spec(2)), "TTFT"), (Scales{16, 8, 8, 4}));
  // The growth on the fifth step restores them.
  EXPECT_EQ(Trace(LossScaler(Spec(2)), "TFFFFTT"), (Scales{16, 16, 16, 16, 32, 32, 16}));
  EXPECT_EQ(Trace(LossScaler(Spec(1)), "TT"), (Scales{8, 4}));
}

TEST(LossScaler, ConsecutiveHysteresisIsRestoredByAnyGoodStep) {
  EXPECT_EQ(Trace(LossScaler(Spec(2, true)), "TFTFTT"), (Scales{16, 16, 16, 16, 16, 8}));
}

TEST(LossScaler, AnOverflowBeginsTheWindowAnew) {
  EXPECT_EQ(Trace(LossScaler(Spec(1)), "FFTFFFFF"), (Scales{16, 16, 8, 8, 8, 8, 16, 16}));
}

TEST(LossScaler, ThereIsNothingBelowTheSmallest) {
  LossScaleSpec spec = Spec(1);
  spec.min_scale = 6;
  LossScaler scaler(spec);
  EXPECT_TRUE(scaler.Update(true).ok());
  EXPECT_TRUE(scaler.Update(true).ok());
  EXPECT_EQ(scaler.scale(), 6);
  const absl::Status diverged = scaler.Update(true);
  EXPECT_TRUE(absl::IsFailedPrecondition(diverged));
  EXPECT_THAT(std::string(diverged.message()), testing::HasSubstr("fp16.min_loss_scale"));
}

TEST(LossScaler, ItsStateIsDeepSpeedsAndAllThatItDependsOn) {
  LossScaleSpec spec = Spec(2);
  spec.hysteresis = 2;
  LossScaler scaler(spec);
  const double initial = scaler.scale();
  EXPECT_TRUE(scaler.state() == (LossScalerState{initial, 0, -1, 2}));
  for (const bool overflow : {false, true, false, false}) ASSERT_TRUE(scaler.Update(overflow).ok());
  EXPECT_TRUE(scaler.state() == (LossScalerState{initial, 4, 1, 1}));
  LossScaler other(spec);
  other.Restore(scaler.state());
  for (const bool overflow : {false, false, true, true, false, false, false, true}) {
    ASSERT_TRUE(scaler.Update(overflow).ok());
    ASSERT_TRUE(other.Update(overflow).ok());
    EXPECT_TRUE(other.state() == scaler.state());
  }
  EXPECT_NE(scaler.scale(), initial);
}

TEST(LossScaler, AStaticScaleIsRestoredToItselfAlone) {
  LossScaleSpec spec = Spec(1);
  spec.static_scale = 128;
  EXPECT_TRUE(LossScaler::CheckRestore(spec, {128, 5, -1, 1}).ok());
  const absl::Status refused = LossScaler::CheckRestore(spec, {64, 5, -1, 1});
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("fp16.loss_scale"));
}

TEST(LossScaler, AStaticScaleStays) {
  LossScaleSpec spec = Spec(1);
  spec.static_scale = 128;
  EXPECT_EQ(Trace(LossScaler(spec), "TTFFFFF"), Scales(7, 128));
}

}  // namespace
}  // namespace zerod::core
