// SPDX-License-Identifier: Apache-2.0
//
// The engine's parts one by one: workers, scattered copies, window words, pieces.
#include <atomic>
#include <cstring>
#include <mutex>
#include <numeric>

#include "daemon/engine/job_spec.h"
#include "daemon/engine/movements.h"
#include "daemon/engine/window_files.h"
#include "daemon/engine/workers.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"

namespace zerod::engine::testing {
namespace {

using core::Range;

// Takes closures until `done`, as the loop would.
void DrainUntil(Mailbox* mailbox, const std::function<bool()>& done) {
  while (!done()) {
    for (const auto& closure : mailbox->Take()) closure();
  }
}

TEST(Workers, RunEveryPartOnceAndThenDone) {
  auto mailbox = *Mailbox::Create();
  Workers workers(3, 8, mailbox.get());
  std::vector<std::atomic<int>> runs(100);
  bool done = false;
  ASSERT_TRUE(workers.Run(runs.size(), [&](size_t i) { ++runs[i]; }, [&] { done = true; }).ok());
  DrainUntil(mailbox.get(), [&] { return done; });
  for (const auto& run : runs) EXPECT_EQ(run.load(), 1);
  done = false;
  ASSERT_TRUE(workers.Run(0, [](size_t) { FAIL(); }, [&] { done = true; }).ok());
  DrainUntil(mailbox.get(), [&] { return done; });
}

TEST(Workers, RefuseMoreThanTheirBound) {
  auto mailbox = *Mailbox::Create();
  std::mutex gate;
  gate.lock();
  {
    Workers workers(1, 2, mailbox.get());
    const auto wait = [&gate](size_t) { const std::lock_guard<std::mutex> lock(gate); };
    int done = 0;
    EXPECT_TRUE(workers.Run(1, wait, [&] { ++done; }).ok());
    EXPECT_TRUE(workers.Run(1, wait, [&] { ++done; }).ok());
    EXPECT_EQ(workers.Run(1, wait, [&] { ++done; }).code(),
              absl::StatusCode::kResourceExhausted);
    gate.unlock();
    DrainUntil(mailbox.get(), [&] { return done == 2; });
    EXPECT_TRUE(workers.Run(1, wait, [&] { ++done; }).ok());
    DrainUntil(mailbox.get(), [&] { return done == 3; });
  }
}

// Members compare it: "auto" may come out differently on nodes with different memory.
TEST(JobSpec, ItsHashTellsGradientPlansApart) {
  JobRequest request;
  request.layout = std::make_shared<const core::Layout>(
      *core::Layout::Build(SmallModel(core::DType::kFloat32, 2, 30), {}));
  core::JobPlan plan;
  const core::JobSpec per_rank = MakeJobSpec(request, plan);
  EXPECT_EQ(per_rank.config_hash.Hex(), MakeJobSpec(request, plan).config_hash.Hex());
  plan.node_sum = true;
  EXPECT_NE(per_rank.config_hash.Hex(), MakeJobSpec(request, plan).config_hash.Hex());
}

TEST(UnitCopy, FollowsScatteredChunks) {
  const uint64_t per_chunk = shm::kChunkBytes / sizeof(float);
  std::vector<std::byte> window(6 * shm::kChunkBytes);
  const UnitCopy copy(window.data(), {4, 5, 1, 0}, sizeof(float));
  std::vector<float> values(3 * per_chunk + 100);
  std::iota(values.begin(), values.end(), 0.0f);
  copy.Store({0, values.size()}, values.data());
  const auto* fourth = reinterpret_cast<const float*>(window.data() + 4 * shm::kChunkBytes);
  EXPECT_EQ(fourth[per_chunk + 7], static_cast<float>(per_chunk + 7));  // runs on into the fifth
  const auto* first = reinterpret_cast<const float*>(window.data() + shm::kChunkBytes);
  EXPECT_EQ(first[0], static_cast<float>(2 * per_chunk));

  EXPECT_NE(copy.Contiguous({0, 2 * per_chunk}), nullptr);
  EXPECT_EQ(copy.Contiguous({0, 2 * per_chunk + 1}), nullptr);
  EXPECT_EQ(copy.Contiguous({2 * per_chunk, 3 * per_chunk + 1}), nullptr);
  std::vector<float> back(values.size() - 50);
  copy.Load({50, values.size()}, back.data());
  EXPECT_EQ(memcmp(back.data(), values.data() + 50, back.size() * sizeof(float)), 0);
  std::vector<uint64_t> ends;
  copy.ForEach({10, values.size()}, [&](std::byte*, Range piece) { ends.push_back(piece.end); });
  EXPECT_THAT(ends, ::testing::ElementsAre(2 * per_chunk, 3 * per_chunk, values.size()));
}

class WindowFilesTest : public ::testing::Test {
 protected:
  WindowFilesTest()
      : layout_(std::make_shared<const core::Layout>(
            *core::Layout::Build(SmallModel(core::DType::kFloat32, 2, 40), {}))),
        arena_(arena::MakeSystemMemorySource(), 0) {
    spec_.base_chunks = 3;
    spec_.max_chunks = 5;
    window_ = *WindowFiles::Create(&arena_, "job", layout_, spec_);
    window_->set_holders([this] {
      return std::vector<WindowFiles::Holder>{{0, holds_[0].data()}, {1, holds_[1].data()}};
    });
    for (core::UnitIndex u = 0; u < 2; ++u) {
      chunks_[u].resize(layout_->units()[u].chunks);
      std::iota(chunks_[u].begin(), chunks_[u].end(), u == 0 ? 0 : chunks_[0].size());
    }
  }

  std::shared_ptr<const core::Layout> layout_;
  arena::Arena arena_;
  core::WindowSpec spec_;
  std::unique_ptr<WindowFiles> window_;
  std::array<std::array<std::atomic<uint32_t>, 8>, 2> holds_{};
  std::vector<uint32_t> chunks_[2];
};

TEST_F(WindowFilesTest, WhatIsHeldIsNotUnmapped) {
  window_->Map(0, chunks_[0]);
  window_->Publish(0, 7);
  holds_[1][0].store(8);
  EXPECT_FALSE(window_->TryUnmap(0));
  EXPECT_THAT(window_->Holders(0), ::testing::ElementsAre(1));
  holds_[1][0].store(7);  // another version claims nothing
  EXPECT_THAT(window_->Holders(0), ::testing::IsEmpty());
  EXPECT_TRUE(window_->TryUnmap(0));
}

TEST_F(WindowFilesTest, WhatIsNotValidCanAlwaysGo) {
  window_->Map(0, chunks_[0]);
  holds_[0][0].store(1);
  EXPECT_TRUE(window_->TryUnmap(0));
  window_->Map(0, chunks_[0]);
  window_->Publish(0, 0);
  window_->Retract(0);
  EXPECT_TRUE(window_->TryUnmap(0));
}

TEST_F(WindowFilesTest, GrowsOnlyAsFarAsTheMachineAllows) {
  EXPECT_EQ(window_->window_bytes(), 3 * shm::kChunkBytes);
  EXPECT_TRUE(window_->Grow(4).ok());
  EXPECT_EQ(window_->window_bytes(), 4 * shm::kChunkBytes);
  EXPECT_EQ(window_->growths(), 1u);
}

}  // namespace
}  // namespace zerod::engine::testing
