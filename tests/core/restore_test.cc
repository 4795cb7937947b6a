// SPDX-License-Identifier: Apache-2.0
//
// What a checkpoint puts back: state tensors, the optimizer's counts and the loss scale.
#include <limits>

#include "tests/core/job_fixture.h"

namespace zerod::core {
namespace {

using ::testing::HasSubstr;

JobSpec Fp16(uint32_t local_world) {
  JobSpec spec = Spec(1, local_world);
  spec.skip_nonfinite = true;
  spec.loss_scale = LossScaleSpec{};
  spec.loss_scale->initial_scale = 64;
  return spec;
}

OptimizerProgress Some() { return {{5, 0, 7}, LossScalerState{256, 9, 3, 1}}; }

class RestoreTest : public JobTest {
 protected:
  OptimizerProgress Read() {
    job_->OnReadProgress(0, ++cookie_);
    EXPECT_TRUE(Answer(cookie_).ok());
    return *answers_.at(cookie_).progress;
  }
  // One step in which unit 1 has a gradient.
  absl::Status Step(uint32_t clients, double loss_scale) {
    HyperParameters hyper = Hyper(1);
    hyper.loss_scale = loss_scale;
    const core::Step step = job_->committed() + 1;
    for (SlotIndex i = 0; i < clients; ++i) {
      job_->OnScatter(i, 0, 1, step, /*last=*/true, 0, {true});
      job_->OnStep(i, ++cookie_, step, hyper, {});
    }
    RunEngine();
    return Answer(cookie_);
  }
  uint64_t cookie_ = 100;
};

TEST_F(RestoreTest, IsDoneOnceAllRanksHaveAsked) {
  Make(Fp16(2));
  Attach(2);
  ASSERT_TRUE(Step(2, 64).ok());
  EXPECT_TRUE(Read() == (OptimizerProgress{{0, 1, 0}, LossScalerState{64, 1, -1, 2}}));
  job_->OnRestore(0, 11, Some());
  EXPECT_TRUE(absl::IsUnknown(Answer(11)));
  EXPECT_EQ(job_->last_step().next_loss_scale, 64);
  job_->OnRestore(1, 12, Some());
  EXPECT_TRUE(Answer(11).ok());
  EXPECT_TRUE(Answer(12).ok());
  EXPECT_EQ(answers_.at(12).loss_scale, 256);
  EXPECT_TRUE(Read() == Some());
  // The next step goes on from there.
  EXPECT_TRUE(absl::IsInvalidArgument(Step(2, 64)));
  ASSERT_TRUE(Step(2, 256).ok());
  EXPECT_TRUE(Read() == (OptimizerProgress{{5, 1, 7}, LossScalerState{256, 10, 3, 1}}));
}

TEST_F(RestoreTest, WithoutALossScalerThatOfTheJobStays) {
  Make(Fp16(1));
  Attach(1);
  ASSERT_TRUE(Step(1, 64).ok());
  job_->OnRestore(0, 11, {{3, 4, 5}, {}});
  EXPECT_TRUE(Answer(11).ok());
  EXPECT_EQ(answers_.at(11).loss_scale, 64);
  EXPECT_TRUE(Read() == (OptimizerProgress{{3, 4, 5}, LossScalerState{64, 1, -1, 2}}));
}

TEST_F(RestoreTest, OutlivesTheGeneration) {
  Make(Fp16(1));
  Attach(1);
  job_->OnRestore(0, 11, Some());
  job_->OnClientGone(0, "it died");
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  EXPECT_EQ(job_->generation(), 2u);
  EXPECT_EQ(job_->last_step().next_loss_scale, 256);
  EXPECT_TRUE(Read() == Some());
  ASSERT_TRUE(Step(1, 256).ok());
  EXPECT_TRUE(Read() == (OptimizerProgress{{5, 1, 7}, LossScalerState{256, 10, 3, 1}}));
}

TEST_F(RestoreTest, OfADeadRankCountsForNothing) {
  Make(Fp16(2));
  Attach(2);
  job_->OnRestore(0, 11, Some());
  job_->OnClientGone(0, "it died");
  job_->OnClientGone(1, "its launcher ended it");
  for (SlotIndex i = 0; i < 2; ++i) ASSERT_TRUE(job_->OnAttach(i, i).ok());
  job_->OnRestore(1, 12, Some());
  EXPECT_TRUE(absl::IsUnknown(Answer(12)));
  EXPECT_FALSE(Read() == Some());
  job_->OnRestore(0, 13, Some());
  EXPECT_TRUE(Answer(12).ok());
  EXPECT_TRUE(Read() == Some());
}

TEST_F(RestoreTest, RanksThatDifferAllHearOfIt) {
  Make(Fp16(2));
  Attach(2);
  const OptimizerProgress before = Read();
  OptimizerProgress other = Some();
  other.loss_scaler->iterations = 10;
  job_->OnRestore(0, 11, Some());
  job_->OnRestore(1, 12, other);
  for (const uint64_t cookie : {11, 12}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Answer(cookie)));
    EXPECT_THAT(std::string(Answer(cookie).message()), HasSubstr("the ranks 0 and 1 restore"));
  }
  EXPECT_TRUE(Read() == before);
  job_->OnRestore(0, 13, Some());
  job_->OnScalar(1, 14, {});
  EXPECT_THAT(std::string(Answer(13).message()),
              HasSubstr("rank 0 calls restore where rank 1 calls all_reduce or barrier"));
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(14)));
  EXPECT_TRUE(Read() == before);
  job_->OnScalar(0, 15, {});
  job_->OnScalar(1, 16, {});
  EXPECT_TRUE(Answer(16).ok());
}

TEST_F(RestoreTest, NonsenseIsItsOwnersError) {
  Make(Fp16(1));
  Attach(1);
  const OptimizerProgress before = Read();
  const auto refused = [&](auto change) {
    OptimizerProgress progress = Some();
    change(&progress);
    job_->OnRestore(0, ++cookie_, progress);
    return absl::IsInvalidArgument(Answer(cookie_));
  };
  EXPECT_TRUE(refused([](auto* p) { p->parameter_steps.pop_back(); }));
  EXPECT_TRUE(refused([](auto* p) { p->parameter_steps[1] = kCountMax + 1; }));
  EXPECT_TRUE(refused([](auto* p) { p->loss_scaler->scale = 0; }));
  EXPECT_TRUE(refused([](auto* p) {
    p->loss_scaler->scale = std::numeric_limits<double>::quiet_NaN();
  }));
  EXPECT_TRUE(refused([](auto* p) { p->loss_scaler->hysteresis = 0; }));
  EXPECT_TRUE(refused([](auto* p) { p->loss_scaler->last_overflow = 9; }));
  EXPECT_TRUE(refused([](auto* p) { p->loss_scaler->last_overflow = -2; }));
  EXPECT_TRUE(refused([](auto* p) { p->loss_scaler->iterations = UINT64_MAX; }));
  EXPECT_TRUE(Read() == before);
  // In the midst of a step.
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  job_->OnRestore(0, 11, Some());
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(11)));
  EXPECT_EQ(job_->state(), JobState::kRunning);
  job_->OnRestore(77, 12, Some());
  job_->OnReadProgress(77, 13);
  EXPECT_TRUE(Take<Complete>().empty());
}

TEST_F(RestoreTest, AScaleNeedsAJobInFp16ThatMovesIt) {
  Make(Spec(1, 1));
  Attach(1);
  job_->OnRestore(0, 11, Some());
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(11)));
  job_->OnRestore(0, 12, {{1, 2, 3}, {}});
  EXPECT_TRUE(Answer(12).ok());
  EXPECT_TRUE(Read() == (OptimizerProgress{{1, 2, 3}, {}}));
}

TEST_F(RestoreTest, StateIsWrittenBehindTheWeightsCopies) {
  JobSpec spec = Spec(1, 1);
  spec.window.resident[0] = spec.window.pinned[0] = true;
  Make(std::move(spec));
  Attach(1);
  job_->OnPut(0, 11, 0, 0, 1000, StateKind::kExpAvgSq);
  std::vector<StartPut> puts = Take<StartPut>();
  ASSERT_EQ(puts.size(), 1u);
  EXPECT_EQ(puts[0].kind, StateKind::kExpAvgSq);
  job_->OnGather(0, 12, 0, 1);
  EXPECT_TRUE(Answer(12).ok());  // the copy was never away
  EXPECT_TRUE(absl::IsUnknown(Answer(11)));
  job_->OnRead(0, 13, 0, 0, 1000, StateKind::kExpAvgSq);
  EXPECT_TRUE(Take<StartRead>().empty());  // behind the write
  job_->OnEntryDone(puts[0].seq, absl::OkStatus());
  EXPECT_TRUE(Answer(11).ok());
  const std::vector<StartRead> reads = Take<StartRead>();
  ASSERT_EQ(reads.size(), 1u);
  job_->OnEntryDone(reads[0].seq, absl::OkStatus());
  job_->OnPut(0, 14, 0, 0, 1000, StateKind::kMaster);
  job_->OnGather(0, 15, 0, 1);
  EXPECT_TRUE(absl::IsUnknown(Answer(15)));
}

TEST_F(RestoreTest, StateThatIsNotThereCannotBeWritten) {
  JobSpec spec = Spec(1, 1);
  ModelBuilder b;
  b.Module("", "Model").Module("u0", "A").Module("u1", "B");
  b.Parameter("u0.weight", {1000}, {"u0"}).Parameter("u1.weight", {2000}, {"u1"}, false);
  b.model.groups = {OptimizerKind::kLion};
  spec.layout = std::make_shared<const Layout>(*Layout::Build(b.model, {}));
  spec.window.pinned.assign(2, false);
  spec.window.resident.assign(2, false);
  Make(std::move(spec));
  Attach(1);
  job_->OnPut(0, 11, 0, 0, 1000, StateKind::kExpAvgSq);
  EXPECT_THAT(std::string(Answer(11).message()), HasSubstr("keeps 1 tensors of state"));
  job_->OnPut(0, 12, 1, 0, 1, StateKind::kExpAvg);
  EXPECT_THAT(std::string(Answer(12).message()), HasSubstr("only the first 0 are trained"));
  job_->OnPut(0, 13, 0, 1000, 1000, StateKind::kExpAvg);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(13)));
  job_->OnPut(0, 14, 0, 0, 1000, static_cast<StateKind>(9));
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(14)));
  job_->OnPut(0, 15, 0, 0, 1000, StateKind::kExpAvg);
  EXPECT_EQ(Take<StartPut>().size(), 1u);
  EXPECT_EQ(job_->state(), JobState::kRunning);
}

TEST_F(RestoreTest, AGradientIsReadBetweenItsReductions) {
  JobSpec spec = Spec(1, 1);
  Make(std::move(spec));
  Attach(1);
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  job_->OnRead(0, 11, 1, 0, 10, StateKind::kGradient);
  EXPECT_TRUE(Take<StartRead>().empty());  // behind the reduction
  std::vector<StartReduce> reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  const std::vector<StartRead> reads = Take<StartRead>();
  ASSERT_EQ(reads.size(), 1u);
  EXPECT_EQ(reads[0].kind, StateKind::kGradient);
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  EXPECT_TRUE(Take<StartReduce>().empty());  // would write what is being read
  job_->OnEntryDone(reads[0].seq, absl::OkStatus());
  EXPECT_TRUE(Answer(11).ok());
  EXPECT_EQ(Take<StartReduce>().size(), 1u);
  job_->OnRead(0, 13, 1, 1999, 20, StateKind::kGradient);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(13)));
}

TEST_F(RestoreTest, AGradientIsSetBetweenItsReductions) {
  Make(Spec(1, 1));
  Attach(1);
  job_->OnPut(0, 10, 1, 0, 10, StateKind::kGradient);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(10)));  // there is none
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  job_->OnPut(0, 11, 1, 0, 10, StateKind::kGradient);
  EXPECT_TRUE(Take<StartPut>().empty());  // behind the reduction
  std::vector<StartReduce> reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  std::vector<StartPut> puts = Take<StartPut>();
  ASSERT_EQ(puts.size(), 1u);
  EXPECT_EQ(puts[0].kind, StateKind::kGradient);
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  EXPECT_TRUE(Take<StartReduce>().empty());  // would add to what is being written
  job_->OnEntryDone(puts[0].seq, absl::OkStatus());
  EXPECT_TRUE(Answer(11).ok());
  reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  job_->OnPut(0, 12, 1, 1999, 20, StateKind::kGradient);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(12)));
  job_->OnStep(0, 13, 1, Hyper(1), {});
  job_->OnPut(0, 14, 1, 0, 10, StateKind::kGradient);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(14)));
}

// It would be written while the norm is computed, and be applied without being part of it.
TEST_F(RestoreTest, AGradientThatIsStillToBeSetIsNotBehindItsStep) {
  Make(Spec(1, 1));
  Attach(1);
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  job_->OnPut(0, 11, 1, 0, 10, StateKind::kGradient);
  const std::vector<StartReduce> reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnStep(0, 12, 1, Hyper(1), {});
  EXPECT_TRUE(absl::IsCancelled(Answer(11)));
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  EXPECT_TRUE(Take<StartPut>().empty());
  EXPECT_EQ(Take<ComputeNorm>().size(), 1u);
}

// A log that names what is not there ends the job, not the process.
TEST(RestoreOfALog, IsChecked) {
  for (const bool state : {false, true}) {
    NoWindow window;
    Job job(Spec(2, 1, /*self=*/1), &window);
    Entry e;
    e.seq = 1;
    e.generation = 1;
    e.kind = state ? EntryKind::kPut : EntryKind::kRestore;
    e.state_kind = state ? static_cast<StateKind>(7) : StateKind::kMaster;
    if (!state) e.restore.parameter_steps = {1, 2};
    job.OnMessage(0, Append{{e}});
    EXPECT_EQ(job.state(), JobState::kFailed);
  }
}

}  // namespace
}  // namespace zerod::core
