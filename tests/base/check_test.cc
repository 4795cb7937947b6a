// SPDX-License-Identifier: Apache-2.0
#include "base/check.h"

#include <gtest/gtest.h>

#include "base/status.h"

namespace zerod {
namespace {

TEST(CheckTest, TrueConditionsPassAndStreamNothing) {
  int streamed = 0;
  const auto count = [&streamed] { return ++streamed; };
  CHECK(true) << count();
  CHECK_EQ(2, 2) << count();
  CHECK_NE(1, 2) << count();
  CHECK_LT(1, 2) << count();
  CHECK_LE(2, 2) << count();
  CHECK_GT(2, 1) << count();
  CHECK_GE(2, 2) << count();
  DCHECK(true) << count();
  EXPECT_EQ(streamed, 0);
}

TEST(CheckTest, BindsToItsOwnIf) {
  bool reached_else = false;
  if (false)
    CHECK(false) << "not reached";
  else
    reached_else = true;
  EXPECT_TRUE(reached_else);
}

TEST(CheckDeathTest, FailureNamesPlaceConditionValuesAndText) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const int held = 3;
  EXPECT_DEATH(CHECK(held < 2) << "unit " << held,
               "check_test.cc:[0-9]+: CHECK failed: held < 2 unit 3");
  EXPECT_DEATH(CHECK_EQ(held, 4), "\\(held\\) == \\(4\\) \\(3 vs 4\\)");
  EXPECT_DEATH(CHECK_GE(held, 4) << "late", "\\(3 vs 4\\) late");
}

TEST(CheckDeathTest, FailureAborts) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(CHECK(false), testing::KilledBySignal(SIGABRT), "CHECK failed: false");
}

absl::StatusOr<int> Half(int v) {
  if (v % 2 != 0) return absl::InvalidArgumentError("odd");
  return v / 2;
}

absl::StatusOr<int> Quarter(int v) {
  RETURN_IF_ERROR(Half(v).status());
  ASSIGN_OR_RETURN(const int half, Half(v));
  ASSIGN_OR_RETURN(const int quarter, Half(half));
  return quarter;
}

TEST(StatusMacrosTest, ReturnTheFirstError) {
  EXPECT_EQ(*Quarter(8), 2);
  EXPECT_EQ(Quarter(6).status(), absl::InvalidArgumentError("odd"));
  EXPECT_EQ(Quarter(5).status(), absl::InvalidArgumentError("odd"));
}

}  // namespace
}  // namespace zerod
