// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "base/config.h"

namespace zerod {
namespace {

TEST(NearestWordTest, PicksTheNearestWithinHalfOfTheWord) {
  const struct {
    const char* word;
    std::vector<std::string> known;
    const char* nearest;
  } cases[] = {
      {"stage", {"stage", "state"}, "stage"},
      {"optimiser", {"scheduler", "optimizer"}, "optimizer"},
      {"zero_optimisation", {"optimizer", "zero_optimization"}, "zero_optimization"},
      {"lr", {"betas", "lrs"}, "lrs"},      // one insertion in two letters
      {"abcd", {"abxy"}, "abxy"},           // exactly half
      {"abcd", {"axyz"}, ""},               // more than half
      {"abcde", {"abxyz"}, ""},             // 3 of 5
      {"cat", {"cut", "car"}, "cut"},       // the first of equals
      {"Stage", {"stage"}, "stage"},        // case counts as a replacement
      {"kitten", {"sitting"}, "sitting"},   // the textbook's distance of 3
      {"x", {"y"}, ""},
      {"x", {}, ""},
      {"", {"a"}, ""},
      {"", {""}, ""},
  };
  for (const auto& c : cases) EXPECT_EQ(NearestWord(c.word, c.known), c.nearest) << c.word;
}

TEST(NearestWordTest, LongWordsAreNobodysTypo) {
  const std::string word(100000, 'a');
  EXPECT_EQ(NearestWord(word, {word}), "");
}

}  // namespace
}  // namespace zerod
