// SPDX-License-Identifier: Apache-2.0
//
// The golden values were computed with another binding of XXH3 (Python's `xxhash`) over the bytes
// that hash.h promises, so they hold in every process, on every machine and for every version.
#include "base/hash.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace zerod {
namespace {

TEST(HashTest, GoldenValues) {
  EXPECT_EQ(Hasher().Finish().Hex(), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(Hasher().Add(uint64_t{1}).Finish().Hex(), "bdc94bce2eda264dbc08dc21994df8a2");
  EXPECT_EQ(Hasher().Add("abc").Finish().Hex(), "45bcdc88efffd44520b986a5e7fe1438");
  EXPECT_EQ(Hasher().Add("").Finish().Hex(), "2c0a8a99dc147d5445c3b49d035665b2");
  EXPECT_EQ(Hasher().Add(1.5).Finish().Hex(), "8e19d0c57481c05d6d22fe9c07fa4107");
  EXPECT_EQ(Hasher().Add("blocks.0").Add(uint64_t{786432}).Add(0.01).Finish().Hex(),
            "45e3a7aef85dafe96389d4b1ebd46713");
}

TEST(HashTest, LongInputIsFedInPieces) {
  Hasher hasher;
  for (uint64_t i = 0; i < 1000; ++i) hasher.Add(i);
  EXPECT_EQ(hasher.Finish().Hex(), "5b70cd737fec0b6929462356e2d9061a");
}

TEST(HashTest, ZerosDifferAndAllNansAreOne) {
  EXPECT_EQ(Hasher().Add(0.0).Finish().Hex(), "2c0a8a99dc147d5445c3b49d035665b2");
  EXPECT_EQ(Hasher().Add(-0.0).Finish().Hex(), "5e7cddf0bb0f028812de6347328b719b");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (double v : {nan, -nan, std::nan("0x123"), std::numeric_limits<double>::signaling_NaN()}) {
    EXPECT_EQ(Hasher().Add(v).Finish().Hex(), "bf8c655e1d469c5001496f760121fd3f");
  }
}

TEST(HashTest, StringsDoNotRunIntoEachOther) {
  EXPECT_NE(Hasher().Add("ab").Add("c").Finish(), Hasher().Add("a").Add("bc").Finish());
  EXPECT_NE(Hasher().Add("").Add("a").Finish(), Hasher().Add("a").Add("").Finish());
  EXPECT_NE(Hasher().Add(absl::string_view("a\0", 2)).Finish(), Hasher().Add("a").Finish());
}

TEST(HashTest, FinishLeavesTheHasherUsable) {
  Hasher hasher;
  hasher.Add("a");
  const Hash128 first = hasher.Finish();
  EXPECT_EQ(hasher.Finish(), first);
  EXPECT_EQ(hasher.Add("b").Finish(), Hasher().Add("a").Add("b").Finish());
}

TEST(HashTest, HexIsBigEndianAndBytesAreLittleEndian) {
  const Hash128 hash{.low = 0x0123456789abcdef, .high = 0xfedcba9876543210};
  EXPECT_EQ(hash.Hex(), "fedcba98765432100123456789abcdef");
  EXPECT_EQ(hash.Bytes(), "\xef\xcd\xab\x89\x67\x45\x23\x01\x10\x32\x54\x76\x98\xba\xdc\xfe");
}

}  // namespace
}  // namespace zerod
