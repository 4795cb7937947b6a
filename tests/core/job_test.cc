// SPDX-License-Identifier: Apache-2.0
//
// Single scenarios of the job, one event at a time. What only many schedules show is in tests/sim.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/core/job_fixture.h"

namespace zerod::core {
namespace {

using ::testing::HasSubstr;

TEST_F(JobTest, AStepAppliesWhatWasTouchedOnce) {
  Make(Spec(1, 2));
  Attach(2);
  job_->OnScatter(0, 0, 1, 1, /*last=*/true, 0, {true});
  job_->OnStep(0, 11, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(absl::IsUnknown(Answer(11)));
  job_->OnStep(1, 12, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(11).ok());
  EXPECT_TRUE(Answer(12).ok());
  EXPECT_EQ(applied_, (std::vector<std::pair<Step, UnitIndex>>{{1, 1}}));
  EXPECT_EQ(job_->committed(), 1u);
  // Asked again, it is there; a step beyond the next is an error.
  job_->OnStep(0, 13, 1, Hyper(1), {});
  EXPECT_TRUE(Answer(13).ok());
  job_->OnStep(0, 14, 3, Hyper(1), {});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(14)));
}

TEST_F(JobTest, DisagreementNamesTheRanksAndUsesNoStepUp) {
  Make(Spec(1, 2));
  Attach(2);
  job_->OnScatter(0, 0, 1, 1, true, 0, {true});
  job_->OnStep(0, 11, 1, Hyper(1), {});
  job_->OnStep(1, 12, 1, Hyper(2), {});
  RunEngine();
  EXPECT_THAT(std::string(Answer(11).message()), HasSubstr("the ranks 1 and 0 disagree"));
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(12)));
  EXPECT_EQ(job_->committed(), 0u);
  EXPECT_EQ(Take<DropGradients>().size(), 1u);
  job_->OnStep(0, 13, 1, Hyper(1), {});
  job_->OnStep(1, 14, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(14).ok());
  EXPECT_TRUE(applied_.empty());  // the refused step's gradients are gone
}

TEST_F(JobTest, AnOverflowSkipsTheStepAndLowersTheScaleForAll) {
  JobSpec spec = Spec(1, 1);
  spec.skip_nonfinite = true;
  spec.loss_scale = LossScaleSpec{};
  spec.loss_scale->initial_scale = 4;
  spec.loss_scale->hysteresis = 1;
  spec.loss_scale->min_scale = 2;
  Make(std::move(spec));
  Attach(1);
  EXPECT_EQ(job_->last_step().next_loss_scale, 4);
  HyperParameters hyper = Hyper(1);
  hyper.loss_scale = 2;
  job_->OnStep(0, 11, 1, hyper, {});
  EXPECT_THAT(std::string(Answer(11).message()), HasSubstr("multiplied by 4, STEP says 2"));
  hyper.loss_scale = 4;
  overflow_ = true;
  job_->OnScatter(0, 0, 1, 1, true, 0, {true});
  job_->OnStep(0, 12, 1, hyper, {});
  RunEngine();
  EXPECT_TRUE(Answer(12).ok());
  EXPECT_TRUE(answers_.at(12).step->skipped);
  EXPECT_EQ(answers_.at(12).step->next_loss_scale, 2);
  EXPECT_TRUE(std::isinf(answers_.at(12).step->grad_norm));
  EXPECT_EQ(job_->committed(), 1u);
  EXPECT_EQ(job_->applied(), 0u);
  EXPECT_TRUE(applied_.empty());
  // At the smallest scale there is nothing left to try: the step is refused and can be tried again.
  hyper.loss_scale = 2;
  job_->OnStep(0, 13, 2, hyper, {});
  RunEngine();
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(13)));
  EXPECT_THAT(std::string(Answer(13).message()), HasSubstr("diverged"));
  EXPECT_EQ(job_->committed(), 1u);
  overflow_ = false;
  job_->OnScatter(0, 0, 1, 2, true, 0, {true});
  job_->OnStep(0, 14, 2, hyper, {});
  RunEngine();
  EXPECT_TRUE(Answer(14).ok());
  EXPECT_EQ(job_->committed(), 2u);
}

TEST_F(JobTest, OnlyStateThatIsKeptCanBeRead) {
  ModelDescription model = Gpt(1);
  model.groups = {OptimizerKind::kLion};
  JobSpec spec = Spec(1, 1);
  spec.layout = std::make_shared<const Layout>(*Layout::Build(model, {}));
  spec.window.pinned.assign(spec.layout->units().size(), true);
  spec.window.resident = spec.window.pinned;
  spec.window.base_chunks = spec.window.max_chunks = spec.layout->chunks();
  Make(std::move(spec));
  Attach(1);
  job_->OnRead(0, 1, 0, 0, 1, StateKind::kExpAvg);
  EXPECT_TRUE(absl::IsUnknown(Answer(1)));
  job_->OnRead(0, 2, 0, 0, 1, StateKind::kExpAvgSq);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(2)));
}

TEST_F(JobTest, AStepWithoutEveryGradientIsRefusedWhereThatIsAnError) {
  JobSpec spec = Spec(1, 2);
  spec.refuse_untouched = true;
  Make(spec);
  Attach(2);
  const auto step = [this](uint64_t cookie, const std::vector<UnitIndex>& by_0,
                           const std::vector<UnitIndex>& by_1) {
    for (UnitIndex u : by_0) job_->OnScatter(0, 0, u, job_->committed() + 1, true, 0, {true});
    for (UnitIndex u : by_1) job_->OnScatter(1, 0, u, job_->committed() + 1, true, 0, {true});
    job_->OnStep(0, cookie, job_->committed() + 1, Hyper(1), {});
    job_->OnStep(1, cookie + 1, job_->committed() + 1, Hyper(1), {});
    RunEngine();
  };
  step(11, {1}, {1});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(12)));
  EXPECT_THAT(std::string(Answer(11).message()),
              HasSubstr("no rank has a gradient in this step for u0.weight, u2.weight: "));
  EXPECT_EQ(job_->committed(), 0u);
  EXPECT_EQ(Take<DropGradients>().size(), 1u);
  step(13, {0, 1}, {2});  // one rank is enough
  EXPECT_TRUE(Answer(13).ok());
  EXPECT_TRUE(Answer(14).ok());
  EXPECT_EQ(job_->committed(), 1u);
  EXPECT_EQ(applied_.size(), 3u);
}

TEST_F(JobTest, NonsenseFromAClientIsItsOwnError) {
  Make(Spec(1, 1));
  job_->OnGather(0, 1, 0, 1);   // nobody is attached
  job_->OnGather(77, 1, 0, 1);
  job_->OnRelease(77, 0);
  job_->OnClientGone(77, "");
  EXPECT_TRUE(Take<Complete>().empty());
  Attach(1);
  job_->OnGather(0, 2, 99, 1);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(2)));
  job_->OnGather(0, 3, 0, 7);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(3)));
  job_->OnScatter(0, 4, 0, 1, true, 0, {true, true});
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(4)));
  job_->OnPut(0, 5, 0, 1000, UINT64_MAX, StateKind::kMaster);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(5)));
  job_->OnRead(0, 6, 0, 2000, 1, StateKind::kMaster);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(6)));
  job_->OnRead(0, 7, 0, 0, 1, static_cast<StateKind>(9));
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(7)));
  job_->OnScalar(0, 8, {ScalarOp::kSum, std::vector<double>(65), {}});
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(8)));
  job_->OnReclaim(0, 9, 0, 1);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(9)));
  HyperParameters none;
  job_->OnStep(0, 10, 1, none, {});
  EXPECT_THAT(std::string(Answer(10).message()), HasSubstr("in group 0"));
  EXPECT_EQ(job_->state(), JobState::kRunning);
}

// The 256th round does not fit into a byte: it must neither be counted as 0 nor append for ever.
TEST_F(JobTest, RoundsOfAStepAreBounded) {
  Make(Spec(1, 1));
  Attach(1);
  for (uint32_t round = 1; round <= kRoundsMax + 3; ++round) {
    job_->OnScatter(0, 1000 + round, 0, 1, true, 0, {true});
    RunEngine();
    EXPECT_EQ(Answer(1000 + round).ok(), round <= kRoundsMax) << round;
  }
  job_->OnStep(0, 1, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(1).ok());
}

// Each waits for the other's mark of a unit that it does not use.
TEST_F(JobTest, ReclaimsOfDivergentRanksDoNotWaitForEachOther) {
  Make(Spec(1, 2));
  Attach(2);
  job_->OnScatter(0, 0, 0, 1, true, 0, {true});
  job_->OnScatter(1, 0, 1, 1, true, 0, {true});
  job_->OnReclaim(0, 21, 0, 1);
  RunEngine();
  EXPECT_TRUE(absl::IsUnknown(Answer(21)));
  job_->OnReclaim(1, 22, 1, 1);
  RunEngine();
  EXPECT_TRUE(Answer(21).ok());
  EXPECT_TRUE(Answer(22).ok());
  // What comes later for the other's unit is of the next round.
  EXPECT_EQ(job_->NextRound(0, 1), 2u);
}

// STEP is the mark of what was scattered without one.
TEST_F(JobTest, GradientsWithoutALastScatterCount) {
  JobSpec spec = Spec(1, 1);
  spec.node_sum = true;
  Make(spec);
  Attach(1);
  job_->OnScatter(0, 41, 2, 1, /*last=*/false, 0, {true});
  job_->OnStep(0, 42, 1, Hyper(1), {});
  size_t reduces = 0;
  for (int i = 0; i < 5; ++i) {
    for (const auto& a : Take<StartAccumulate>()) job_->OnAccumulateDone(a.unit, a.slot);
    for (const auto& a : Take<StartReduce>()) {
      ++reduces;
      job_->OnEntryDone(a.seq, absl::OkStatus());
    }
  }
  EXPECT_EQ(reduces, 1u);
  RunEngine();
  EXPECT_EQ(applied_, (std::vector<std::pair<Step, UnitIndex>>{{1, 2}}));
}

TEST_F(JobTest, ADeathWakesTheOthersWithTheStepThatStands) {
  Make(Spec(1, 2));
  Attach(2);
  job_->OnScalar(0, 51, {});
  job_->OnClientGone(1, "killed by signal 9");
  const std::vector<FailSlot> failed = Take<FailSlot>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].slot, 0u);
  EXPECT_TRUE(absl::IsAborted(failed[0].status));
  EXPECT_THAT(std::string(failed[0].status.message()),
              HasSubstr("rank 1 of job 'test' is gone (killed by signal 9)"));
  EXPECT_EQ(job_->generation(), 2u);
  EXPECT_TRUE(job_->OnAttach(1, 1).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(job_->OnAttach(0, 0)));  // the survivor still lives
  job_->OnClientGone(0, "");
  EXPECT_TRUE(job_->OnAttach(0, 0).ok());
  EXPECT_EQ(job_->state(), JobState::kRunning);
}

TEST_F(JobTest, ADeathWhileTheGenerationFormsIsLikeNotHavingCome) {
  Make(Spec(1, 2));
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  job_->OnScalar(0, 71, {});
  job_->OnClientGone(0, "killed");
  EXPECT_EQ(job_->WaitingFor(), "rank 0, rank 1 has not come");
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  job_->OnScalar(0, 72, {});
  ASSERT_TRUE(job_->OnAttach(1, 1).ok());
  job_->OnScalar(1, 73, {});
  EXPECT_TRUE(absl::IsUnknown(Answer(71)));  // the dead one's request is nobody's
  EXPECT_TRUE(Answer(72).ok());
  EXPECT_TRUE(Answer(73).ok());
  EXPECT_EQ(job_->generation(), 1u);
}

TEST_F(JobTest, ARankThatLeavesLeavesNobodyWaiting) {
  JobSpec spec = Spec(1, 2);
  spec.node_sum = true;
  Make(spec);
  Attach(2);
  job_->OnScatter(1, 81, 0, 1, true, 0, {true});  // waits for rank 0's
  job_->OnScalar(1, 82, {});
  job_->OnDetach(0, 83);
  EXPECT_TRUE(Answer(83).ok());
  EXPECT_THAT(std::string(Answer(81).message()), HasSubstr("rank 0 has left the job"));
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(82)));
  job_->OnScatter(1, 84, 0, 1, true, 0, {true});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(84)));
  job_->OnStep(1, 85, 1, Hyper(1), {});
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(85)));
  job_->OnGather(1, 86, 0, 1);
  RunEngine();
  EXPECT_TRUE(Answer(86).ok());  // needs no other rank
  job_->OnDetach(1, 87);
  const std::vector<End> end = Take<End>();
  ASSERT_EQ(end.size(), 1u);
  EXPECT_TRUE(end[0].status.ok());
}

TEST_F(JobTest, WhatAClientDoesNotWaitForIsAnsweredAtTheStep) {
  Make(Spec(1, 1));
  Attach(1);
  job_->OnGather(0, 91, 0, 1);
  job_->OnStep(0, 92, 1, Hyper(1), {});
  RunEngine();
  EXPECT_FALSE(absl::IsUnknown(Answer(91)));
  EXPECT_TRUE(Answer(92).ok());
}

TEST_F(JobTest, ADetachWhileTheGenerationFormsIsLikeNotHavingCome) {
  Make(Spec(1, 2));
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  job_->OnScalar(0, 61, {});
  job_->OnDetach(0, 62);
  EXPECT_TRUE(Answer(62).ok());
  ASSERT_TRUE(job_->OnAttach(1, 1).ok());
  EXPECT_EQ(job_->state(), JobState::kForming);
  EXPECT_EQ(job_->WaitingFor(), "rank 0 has not come");
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  EXPECT_EQ(job_->state(), JobState::kRunning);
  job_->OnScalar(1, 63, {});
  EXPECT_TRUE(absl::IsUnknown(Answer(63))) << "what the first one said counts no more";
  job_->OnScalar(0, 64, {});
  EXPECT_TRUE(Answer(63).ok());
  EXPECT_TRUE(Answer(64).ok());
}

TEST_F(JobTest, ALargeUnitIsNotOvertakenByLaterDemands) {
  JobSpec spec = Spec(1, 1);
  spec.layout = std::make_shared<const Layout>(Units({1000, 30000, 1000, 1000}));
  ASSERT_EQ(spec.layout->units()[1].chunks, 2 * spec.layout->units()[0].chunks);
  spec.window.pinned.assign(4, false);
  spec.window.resident.assign(4, false);
  spec.window.base_chunks = spec.window.max_chunks = 3;
  Make(std::move(spec));
  Attach(1);
  const auto units = [&](const std::vector<StartAllGather>& gathers) {
    std::vector<UnitIndex> found;
    for (const StartAllGather& g : gathers) found.push_back(g.unit);
    return found;
  };
  job_->OnGather(0, 41, 0, 1);
  job_->OnGather(0, 42, 2, 1);
  const std::vector<StartAllGather> first = Take<StartAllGather>();
  ASSERT_EQ(units(first), (std::vector<UnitIndex>{0, 2}));
  job_->OnGather(0, 43, 1, 1);  // needs two chunks, one is free
  job_->OnGather(0, 44, 3, 1);  // would fit
  EXPECT_TRUE(Take<StartAllGather>().empty());
  job_->OnEntryDone(first[0].seq, {});
  const std::vector<StartAllGather> second = Take<StartAllGather>();
  EXPECT_EQ(units(second), (std::vector<UnitIndex>{1}));
  job_->OnEntryDone(first[1].seq, {});
  EXPECT_EQ(units(Take<StartAllGather>()), (std::vector<UnitIndex>{3}));
  EXPECT_TRUE(absl::IsUnknown(Answer(44)));
}

// --- Several members: this one is member 0, the others are the test.

class Member0Test : public JobTest {
 protected:
  void SetUp() override {
    Make(Spec(2, 1));
    ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  }
  Joined Hello() { return {job_->spec().layout->hash(), {}, 2, 2}; }
  void From1(std::vector<ReportItem> items, uint64_t generation = 1) {
    job_->OnMessage(1, Report{generation, std::move(items)});
  }
};

TEST_F(Member0Test, AMemberOfAnotherModelIsRefusedAlone) {
  Joined other = Hello();
  other.layout.low ^= 1;
  // It reports on until it hears of it.
  From1({other, ClientAttached{1}});
  From1({ClientAttached{1}});
  const std::vector<Send> sent = Take<Send>();
  ASSERT_EQ(sent.size(), 1u);
  EXPECT_THAT(std::string(std::get<FailJob>(sent[0].message).status.message()),
              HasSubstr("another layout"));
  EXPECT_EQ(job_->state(), JobState::kForming);
  From1({Hello(), ClientAttached{1}});
  EXPECT_EQ(job_->state(), JobState::kRunning);
}

TEST_F(Member0Test, AnotherConfigurationOrGradientPlanIsRefused) {
  Joined other = Hello();
  other.config.low ^= 1;
  From1({other});
  const std::vector<Send> sent = Take<Send>();
  ASSERT_EQ(sent.size(), 1u);
  EXPECT_THAT(std::string(std::get<FailJob>(sent[0].message).status.message()),
              HasSubstr("configuration or gradient plan differs"));
}

TEST_F(Member0Test, OneRankOnTwoNodesEndsTheGenerationAndLosesNothing) {
  From1({Hello(), ClientAttached{0}});
  EXPECT_EQ(job_->state(), JobState::kForming);
  EXPECT_EQ(job_->generation(), 2u);
  const std::vector<FailSlot> failed = Take<FailSlot>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_TRUE(absl::IsAborted(failed[0].status));
  EXPECT_THAT(std::string(failed[0].status.message()),
              HasSubstr("the nodes 0 and 1 each have a process of this rank"));
  job_->OnClientGone(0, "it ended");
  ASSERT_TRUE(job_->OnAttach(0, 0).ok());
  From1({ClientAttached{1}}, 2);
  EXPECT_EQ(job_->state(), JobState::kRunning);
}

TEST_F(Member0Test, StaleGenerationsChangeNothing) {
  From1({Hello(), ClientAttached{1}});
  From1({ClientGone{1, false, "killed"}});
  EXPECT_EQ(job_->generation(), 2u);
  From1({StepReady{}, GradientsReady{9, 9, 9}, ScalarReady{1, {1}, {{}}, {}}}, 1);
  EXPECT_EQ(job_->state(), JobState::kForming);
}

TEST_F(Member0Test, MessagesThatMakeNoSenseEndTheJobAndNotTheProcess) {
  From1({Hello(), ClientAttached{1}});
  From1({GradientsReady{99, 1, 1}});
  EXPECT_EQ(job_->state(), JobState::kFailed);
  EXPECT_TRUE(absl::IsInternal(job_->failure()));
}

// Member 1 is the test: it answers for its shards.
class ByTensorTest : public Member0Test {
 protected:
  void SetUp() override {
    JobSpec spec = Spec(2, 1);
    ModelDescription model;
    for (const char* path : {"", "u0", "u1", "u2"}) model.modules.push_back({path, path, false});
    for (const char* path : {"u0", "u1", "u2"}) {
      ParameterDescription p;
      p.name = absl::StrCat(path, ".weight");
      p.shape = {2000};
      p.modules = {path};
      model.parameters.push_back(std::move(p));
    }
    model.parameters[2].group = 1;
    model.groups = {OptimizerKind::kLamb, OptimizerKind::kAdam};
    spec.layout = std::make_shared<const Layout>(*Layout::Build(model, {}));
    Make(std::move(spec));
    ASSERT_TRUE(job_->OnAttach(0, 0).ok());
    From1({Hello(), ClientAttached{1}});
    job_->OnConnected(absl::OkStatus());
  }
  // Until both members have the COMMIT of step 1, in which rank 0 touched units 0 and 2.
  void Commit() {
    job_->OnScatter(0, 0, 0, 1, true, 0, {true});
    job_->OnScatter(0, 0, 2, 1, true, 0, {true});
    HyperParameters hyper = Hyper(1);
    hyper.groups.push_back(hyper.groups[0]);
    job_->OnStep(0, 11, 1, hyper, {});
    From1({StepReady{1, true, "", hyper, {1}}});
    RunEngine();
    NormReady norm;
    norm.step = 1;
    norm.part.touched.assign(3, false);
    From1({std::move(norm)});
    RunEngine();
  }
  std::vector<TensorSquares> Squares(MemberIndex m, double weight) const {
    const Layout& layout = *job_->spec().layout;
    const size_t pieces = layout
                              .TensorPieces(0, Partition(layout, 2).Shard(0, m),
                                            {true, false, true})
                              .size();
    EXPECT_GT(pieces, 1u);
    return std::vector<TensorSquares>(pieces, {weight, 1});
  }
  void From1Measured() { From1({TensorsMeasured{1, Squares(1, 3)}}); }
  std::vector<Entry> Sent() {
    std::vector<Entry> entries;
    for (const Send& s : Take<Send>()) {
      if (const auto* append = std::get_if<Append>(&s.message)) {
        entries.insert(entries.end(), append->entries.begin(), append->entries.end());
      }
    }
    return entries;
  }
};

TEST_F(ByTensorTest, TheSecondPassHasTheNormsOfAllMembers) {
  Commit();
  // Another optimizer's unit need not wait.
  EXPECT_EQ(applied_, (std::vector<std::pair<Step, UnitIndex>>{{1, 2}}));
  const std::vector<StartMeasure> measures = Take<StartMeasure>();
  ASSERT_EQ(measures.size(), 1u);
  EXPECT_EQ(measures[0].unit, 0u);
  Sent();
  job_->OnMeasured(0, 1, Squares(0, 2));
  EXPECT_TRUE(Take<StartApply>().empty());
  EXPECT_TRUE(absl::IsUnknown(Answer(11)));
  From1Measured();
  const double pieces0 = static_cast<double>(Squares(0, 0).size());
  const double pieces1 = static_cast<double>(Squares(1, 0).size());
  const std::vector<StartApply> applies = Take<StartApply>();
  ASSERT_EQ(applies.size(), 1u);
  EXPECT_EQ(applies[0].unit, 0u);
  ASSERT_EQ(applies[0].plan->squares.size(), 3u);
  EXPECT_EQ(applies[0].plan->squares[0].weight, 2 * pieces0 + 3 * pieces1);
  EXPECT_EQ(applies[0].plan->squares[0].update, pieces0 + pieces1);
  EXPECT_TRUE(applies[0].plan->squares[1] == TensorSquares());
  job_->OnApplyDone(0, 1);
  EXPECT_TRUE(Answer(11).ok());
}

TEST_F(ByTensorTest, NothingStandsInTheLogBetweenCommitAndNorms) {
  Commit();
  Sent();
  From1({StateRequest{false, 0, 0, 0, 1, StateKind::kMaster}, Want{1, 1, true, false}});
  From1({ClientGone{1, false, "killed"}});
  From1({ScalarReady{1, {1}, {{}}, {}}});
  EXPECT_TRUE(Sent().empty());
  job_->OnMeasured(0, 1, Squares(0, 2));
  From1Measured();
  RunEngine();
  std::vector<EntryKind> kinds;
  for (const Entry& e : Sent()) kinds.push_back(e.kind);
  ASSERT_GE(kinds.size(), 3u);
  EXPECT_EQ(kinds.front(), EntryKind::kTensorNorms);
  EXPECT_EQ(kinds.back(), EntryKind::kGeneration);  // what came after the death is stale
  EXPECT_EQ(job_->committed(), 1u);
  EXPECT_EQ(job_->state(), JobState::kRunning);  // until the READ is done
}

TEST_F(ByTensorTest, ARestoreComesBehindTheNorms) {
  Commit();
  Sent();
  const OptimizerProgress progress{{7, 8, 9}, {}};
  job_->OnRestore(0, 12, progress);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(12)));  // the step is under way here
  ScalarValues restore;
  restore.restore = progress.Hash();
  From1({ScalarReady{1, {1}, {restore}, {}}});
  job_->OnMeasured(0, 1, Squares(0, 2));
  From1Measured();
  const std::vector<StartApply> applies = Take<StartApply>();
  ASSERT_EQ(applies.size(), 1u);
  EXPECT_EQ(applies[0].plan->parameter_steps, (std::vector<uint64_t>{1, 0, 1}));
  job_->OnApplyDone(0, 1);
  ASSERT_TRUE(Answer(11).ok());
  job_->OnRestore(0, 13, progress);
  EXPECT_TRUE(Answer(13).ok());
  EXPECT_TRUE(job_->progress() == progress);
  std::vector<EntryKind> kinds;
  for (const Entry& e : Sent()) kinds.push_back(e.kind);
  EXPECT_EQ(kinds, (std::vector<EntryKind>{EntryKind::kTensorNorms, EntryKind::kRestore}));
}

TEST_F(ByTensorTest, SquaresThatMakeNoSenseEndTheJobAndNotTheProcess) {
  From1({TensorsMeasured{1, {}}});
  EXPECT_TRUE(absl::IsInternal(job_->failure()));
  SetUp();
  Commit();
  From1({TensorsMeasured{1, std::vector<TensorSquares>(1000)}});
  EXPECT_TRUE(absl::IsInternal(job_->failure()));
}

TEST(LogTest, EntriesThatMakeNoSenseEndTheJobAndNotTheProcess) {
  std::vector<Entry> bad(6);
  bad[0].seq = 2;
  bad[1].kind = static_cast<EntryKind>(99);
  bad[2].unit = 3;
  bad[3].kind = EntryKind::kCommit;  // without touched bits
  bad[4].kind = EntryKind::kPut;
  bad[4].begin = 1;
  bad[4].count = UINT64_MAX;
  bad[5].kind = EntryKind::kTensorNorms;  // behind no COMMIT
  bad[5].squares.resize(3);
  for (size_t i = 0; i < bad.size(); ++i) {
    NoWindow window;
    Job job(Spec(2, 1, /*self=*/1), &window);
    if (i != 0) bad[i].seq = 1;
    job.OnMessage(0, Append{{bad[i]}});
    EXPECT_EQ(job.state(), JobState::kFailed) << i;
  }
}

TEST_F(Member0Test, AMembersDeathFailsEveryClientAndSaysWhatWasLost) {
  From1({Hello(), ClientAttached{1}});
  job_->OnMemberDown(1, absl::UnavailableError("its link was silent for 5 s"));
  const std::vector<FailSlot> failed = Take<FailSlot>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_THAT(std::string(failed[0].status.message()), HasSubstr("lost the shards of member 1"));
  EXPECT_FALSE(Take<Send>().empty());
  EXPECT_TRUE(absl::IsFailedPrecondition(job_->OnAttach(0, 0)));
}

}  // namespace
}  // namespace zerod::core
