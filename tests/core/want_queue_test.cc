// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/want_queue.h"

#include "gmock/gmock.h"
#include "tests/core/models.h"

namespace zerod::core {
namespace {

constexpr MemberSet kBoth = 0b11;
constexpr uint64_t kLimit = 100;

// Four units, each with just over half of what may be on its way.
class WantQueueTest : public ::testing::Test {
 protected:
  WantQueueTest() : queue_(&layout_, kLimit) {}

  std::vector<std::pair<UnitIndex, MemberSet>> Begin() {
    std::vector<std::pair<UnitIndex, MemberSet>> begun;
    while (const auto next = queue_.Next()) {
      begun.emplace_back(next->unit, next->wants);
      queue_.Begun(next->unit);
    }
    return begun;
  }

  const Layout layout_ = Units({60, 60, 60, 60});
  WantQueue queue_;
};

using Gathers = std::vector<std::pair<UnitIndex, MemberSet>>;

TEST_F(WantQueueTest, WhatAllExpectIsGatheredTogetherInTheOrderAsked) {
  queue_.Restart(kBoth);
  queue_.Add(1, 0, /*demand=*/false);
  queue_.Add(0, 0, false);
  queue_.Announced(0);
  EXPECT_EQ(Begin(), Gathers{});  // member 1 has not said what it needs
  queue_.Add(1, 1, false);
  queue_.Add(2, 1, false);
  queue_.Announced(1);
  EXPECT_EQ(Begin(), (Gathers{{1, 0b11}, {0, 0b01}}));
  queue_.Ended(1);
  EXPECT_EQ(Begin(), (Gathers{{2, 0b10}}));
}

TEST_F(WantQueueTest, DemandOvertakesForecastAndKeepsItsOwnOrder) {
  queue_.Restart(0);
  queue_.Begun(0);
  queue_.Begun(0);
  queue_.Add(1, 0, false);
  queue_.Add(2, 0, false);
  queue_.Add(3, 1, true);
  queue_.Add(2, 1, true);
  queue_.Add(3, 0, false);
  EXPECT_EQ(Begin(), Gathers{});
  queue_.Ended(0);
  EXPECT_EQ(Begin(), (Gathers{{3, 0b11}}));
  queue_.Ended(0);
  EXPECT_EQ(Begin(), (Gathers{{2, 0b11}}));
  queue_.Ended(3);
  EXPECT_EQ(Begin(), (Gathers{{1, 0b01}}));
}

TEST_F(WantQueueTest, WhatIsWaitedForOvertakesOthersForecastOnceOnly) {
  queue_.Restart(0);
  queue_.Begun(0);
  queue_.Begun(0);
  queue_.Add(1, 0, false);
  queue_.Add(2, 0, false);
  queue_.Promote(2);
  queue_.Promote(3);  // has begun already
  queue_.Ended(0);
  EXPECT_EQ(Begin(), (Gathers{{2, 0b01}}));
  queue_.Promote(2);
  queue_.Ended(0);
  EXPECT_EQ(Begin(), (Gathers{{1, 0b01}}));
}

TEST_F(WantQueueTest, AnotherVersionForgetsWhatWaitedAndNotWhatMoves) {
  queue_.Restart(0);
  queue_.Begun(0);
  queue_.Begun(1);
  queue_.Add(2, 0, true);
  queue_.Restart(0b10);
  queue_.Add(3, 0, true);
  queue_.Ended(0);
  queue_.Ended(1);
  EXPECT_EQ(Begin(), Gathers{});
  queue_.Announced(1);
  EXPECT_EQ(Begin(), (Gathers{{3, 0b01}}));
}

}  // namespace
}  // namespace zerod::core
