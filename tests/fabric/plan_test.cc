// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/plan.h"

#include <set>

#include <gtest/gtest.h>

#include "tests/fabric/map_rendezvous.h"

namespace zerod::fabric {
namespace {

TEST(SlotTest, DiffersByTagOrderAndSize) {
  std::set<uint64_t> slots;
  size_t count = 0;
  for (uint64_t tag = 0; tag < 200; ++tag) {
    for (uint32_t order = 0; order < 20; ++order) {
      for (size_t bytes : {size_t{1}, size_t{2}, size_t{4096}, size_t{1} << 40}) {
        slots.insert(SlotOf(tag, order, bytes));
        ++count;
      }
    }
  }
  EXPECT_EQ(slots.size(), count);
}

TEST(LaneTest, CutsTransfersIntoSegmentsInOrder) {
  char first[10], second[3];
  Lane lane(1, true);
  lane.Add(7, Transfer{1, first, 10});
  lane.Add(7, Transfer{1, nullptr, 0});
  lane.Add(7, Transfer{1, second, 3});
  std::vector<Segment> pieces;
  while (!lane.exhausted()) pieces.push_back(lane.Next(4));
  ASSERT_EQ(pieces.size(), 4u);
  EXPECT_EQ(pieces[0].data, first);
  EXPECT_EQ(pieces[2].data, first + 8);
  EXPECT_EQ(pieces[2].bytes, 2u);
  EXPECT_EQ(pieces[2].slot, SlotOf(7, 0, 10));
  EXPECT_EQ(pieces[3].data, second);
  EXPECT_EQ(pieces[3].slot, SlotOf(7, 2, 3)) << "an empty transfer keeps its place";
}

TEST(PlanTest, RefusesWhatCannotBeCarriedOut) {
  char data[8];
  auto code = [&](uint64_t tag, std::vector<Transfer> sends, std::vector<Transfer> receives) {
    return MakePlan(1, 3, tag, sends, receives).status().code();
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code(1, {{3, data, 8}}, {}), kInvalid) << "no such member";
  EXPECT_EQ(code(1, {}, {{9, data, 8}}), kInvalid) << "no such member";
  EXPECT_EQ(code(uint64_t{1} << 63, {}, {}), kInvalid) << "reserved tag";
  EXPECT_EQ(code(1, {{0, nullptr, 8}}, {}), kInvalid) << "no memory";
  EXPECT_EQ(code(1, {{1, data, 8}}, {}), kInvalid) << "half a copy";
  EXPECT_EQ(code(1, {{1, data, 8}}, {{1, data, 7}}), kInvalid) << "unequal copy";
  EXPECT_EQ(code(1, {{1, data, 8}, {0, nullptr, 0}}, {{1, data, 8}}), absl::StatusCode::kOk);
}

TEST(MapRendezvousTest, KeepsValuesAndEndsWaits) {
  MapRendezvous map;
  EXPECT_TRUE(map.Set("a", "1").ok());
  EXPECT_TRUE(map.Set("a", "1").ok());
  EXPECT_EQ(map.Set("a", "2").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(*map.Get("a", absl::ZeroDuration()), "1");
  EXPECT_EQ(map.Get("b", absl::Milliseconds(1)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  map.Close();
  EXPECT_EQ(map.Get("a", absl::Hours(1)).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace zerod::fabric
