// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/window.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "tests/core/models.h"

namespace zerod::core {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kChunk = 16 * 1024;  // elements

// Records calls; units in `held` are claimed.
class FakePort : public WindowPort {
 public:
  void Map(UnitIndex u, const std::vector<uint32_t>& given) override {
    ++maps[u];
    chunks[u] = given;
  }
  void Publish(UnitIndex u, Step version) override { published[u] = version; }
  void Retract(UnitIndex u) override { published.erase(u); }
  bool TryUnmap(UnitIndex u) override {
    if (held.count(u)) return false;
    published.erase(u);
    unmapped.push_back(u);
    return true;
  }
  absl::Status Grow(uint64_t to) override {
    grown = to;
    return grow_status;
  }
  std::vector<SlotIndex> Holders(UnitIndex u) override {
    return held.count(u) ? std::vector<SlotIndex>{1} : std::vector<SlotIndex>{};
  }

  std::map<UnitIndex, int> maps;
  std::map<UnitIndex, std::vector<uint32_t>> chunks;
  std::map<UnitIndex, Step> published;
  std::vector<UnitIndex> unmapped;
  std::set<UnitIndex> held;
  uint64_t grown = 0;
  absl::Status grow_status;
};

class WindowTest : public ::testing::Test {
 protected:
  // Four units of one chunk and one of two.
  WindowTest() : layout_(Units({kChunk, kChunk, kChunk, kChunk, 2 * kChunk})) {
    spec_.base_chunks = 2;
    spec_.max_chunks = 3;
    spec_.pinned.assign(5, false);
    spec_.resident.assign(5, false);
    for (UnitIndex u = 0; u < 5; ++u) next_use_[u] = u;
  }
  void Make() { window_ = std::make_unique<Window>(spec_, &layout_, &port_); }
  Window::Room Reserve(UnitIndex u, bool demand = true) {
    return window_->Reserve(u, demand, [this](UnitIndex v) { return next_use_[v]; }, &error_);
  }
  void Gather(UnitIndex u, Step version = 0) {
    ASSERT_EQ(Reserve(u), Window::Room::kReserved);
    window_->Publish(u, version);
  }

  const Layout layout_;
  WindowSpec spec_;
  FakePort port_;
  std::map<UnitIndex, uint64_t> next_use_;
  std::unique_ptr<Window> window_;
  absl::Status error_;
};

TEST_F(WindowTest, EvictsWhatIsNeededLast) {
  Make();
  Gather(0);
  Gather(1);
  next_use_ = {{0, 9}, {1, 2}, {2, 0}};
  Gather(2);
  EXPECT_EQ(port_.unmapped, std::vector<UnitIndex>{0});
  EXPECT_TRUE(window_->Valid(1, 0));
  EXPECT_EQ(window_->copy(0), Window::Copy::kAbsent);
}

TEST_F(WindowTest, WorthlessCopiesGoFirst) {
  Make();
  Gather(0);
  Gather(1);
  next_use_ = {{0, 9}, {1, 1}};
  window_->Retract(1, /*refill=*/false);
  Gather(2);
  EXPECT_EQ(port_.unmapped, std::vector<UnitIndex>{1});
}

TEST_F(WindowTest, HeldCopiesStayAndTheWindowGrows) {
  Make();
  Gather(0);
  Gather(1);
  port_.held = {0, 1};
  Gather(2);
  EXPECT_TRUE(port_.unmapped.empty());
  EXPECT_EQ(port_.grown, 3u);
  EXPECT_EQ(window_->growths(), 1u);
  port_.held = {0, 1, 2};
  EXPECT_EQ(Reserve(3), Window::Room::kNone);
  EXPECT_TRUE(absl::IsResourceExhausted(error_));
  EXPECT_THAT(std::string(error_.message()), HasSubstr("'u1' (local rank 1)"));
  // Held: three chunks, and one more.
  EXPECT_THAT(std::string(error_.message()), HasSubstr("A window of 262144 bytes would do"));
  EXPECT_EQ(window_->copy(3), Window::Copy::kAbsent);
  port_.held = {0, 1};
  EXPECT_EQ(Reserve(3), Window::Room::kReserved);
}

TEST_F(WindowTest, MemoryThatIsNotThereIsAnError) {
  Make();
  Gather(0);
  Gather(1);
  port_.held = {0, 1};
  port_.grow_status = absl::ResourceExhaustedError("the node has no more");
  EXPECT_EQ(Reserve(2), Window::Room::kNone);
  EXPECT_EQ(error_, port_.grow_status);
  EXPECT_EQ(window_->chunks(), 2u);
}

TEST_F(WindowTest, WaitsOnlyForCopiesOnTheirWay) {
  Make();
  ASSERT_EQ(Reserve(0), Window::Room::kReserved);
  Gather(1);
  port_.held = {1};
  EXPECT_EQ(Reserve(2), Window::Room::kLater);
  window_->Publish(0, 0);
  EXPECT_EQ(Reserve(2), Window::Room::kReserved);
  EXPECT_EQ(port_.unmapped, std::vector<UnitIndex>{0});
}

TEST_F(WindowTest, AForecastTakesOnlyWhatIsNeededLater) {
  Make();
  Gather(0);
  Gather(1);
  next_use_ = {{0, 1}, {1, 2}, {2, 3}};
  EXPECT_EQ(Reserve(2, /*demand=*/false), Window::Room::kLater);
  next_use_[1] = 4;
  EXPECT_EQ(Reserve(2, /*demand=*/false), Window::Room::kReserved);
  EXPECT_EQ(port_.unmapped, std::vector<UnitIndex>{1});
  port_.held = {0};
  next_use_ = {{0, 9}};
  EXPECT_EQ(Reserve(3, /*demand=*/false), Window::Room::kLater);
  EXPECT_EQ(port_.grown, 0u);
}

TEST_F(WindowTest, PinnedUnitsKeepTheirChunks) {
  spec_.pinned[0] = spec_.resident[0] = true;
  Make();
  EXPECT_EQ(port_.maps[0], 1);
  window_->Publish(0, 0);
  Gather(1);
  next_use_[0] = 100;
  Gather(2);
  EXPECT_EQ(port_.unmapped, std::vector<UnitIndex>{1});
  EXPECT_TRUE(window_->Valid(0, 0));
}

TEST_F(WindowTest, SteadyStateRemapsNothing) {
  spec_.base_chunks = 6;
  spec_.max_chunks = 6;
  Make();
  for (Step step = 0; step < 5; ++step) {
    for (UnitIndex u : {0u, 4u, 1u, 3u, 2u}) {
      Gather(u, step);
    }
    for (UnitIndex u = 0; u < 5; ++u) window_->Retract(u, /*refill=*/false);
  }
  for (UnitIndex u = 0; u < 5; ++u) EXPECT_EQ(port_.maps[u], 1) << u;
}

TEST_F(WindowTest, AUnitComesBackToItsOldChunksInATightWindow) {
  spec_.max_chunks = 2;
  Make();
  std::map<UnitIndex, std::vector<uint32_t>> first;
  for (int round = 0; round < 3; ++round) {
    for (UnitIndex u : {4u, 0u, 1u}) {
      // The unit used before is not needed for long.
      for (UnitIndex v = 0; v < 5; ++v) next_use_[v] = (u + 5 - v) % 5;
      Gather(u);
      if (round == 0) first[u] = port_.chunks[u];
      EXPECT_EQ(port_.chunks[u], first[u]) << "unit " << u << " in round " << round;
    }
  }
}

}  // namespace
}  // namespace zerod::core
