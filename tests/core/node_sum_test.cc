// SPDX-License-Identifier: Apache-2.0
//
// The gradient plan node_sum: the order in which gradients are added, and what is set aside.
#include "tests/core/job_fixture.h"

namespace zerod::core {
namespace {

// Two clients under node_sum.
class NodeSumTest : public JobTest {
 protected:
  void SetUp() override {
    JobSpec spec = Spec(1, 2);
    spec.node_sum = true;
    Make(spec);
    Attach(2);
  }
  // Adds all that the job asks for; where in staging each lay.
  std::vector<uint64_t> Accumulated() {
    std::vector<uint64_t> order;
    for (auto next = Take<StartAccumulate>(); !next.empty(); next = Take<StartAccumulate>()) {
      for (const StartAccumulate& a : next) {
        order.push_back(a.staging_offset);
        job_->OnAccumulateDone(a.unit, a.slot);
      }
    }
    return order;
  }
};

TEST_F(NodeSumTest, AddsByPlaceThenRank) {
  job_->OnScatter(1, 31, 0, 1, false, 500, {true});
  job_->OnScatter(1, 32, 0, 1, true, 600, {true});
  EXPECT_TRUE(Take<StartAccumulate>().empty());  // rank 0's first micro-step comes before
  job_->OnScatter(0, 33, 0, 1, false, 700, {true});
  std::vector<uint64_t> order;
  job_->OnStep(0, 34, 1, Hyper(1), {});
  for (auto next = Take<StartAccumulate>(); !next.empty(); next = Take<StartAccumulate>()) {
    ASSERT_EQ(next.size(), 1u);
    EXPECT_EQ(next[0].first, order.empty());
    order.push_back(next[0].staging_offset);
    job_->OnAccumulateDone(next[0].unit, next[0].slot);
  }
  EXPECT_EQ(order, (std::vector<uint64_t>{700, 500, 600}));
  job_->OnStep(1, 35, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(34).ok() && Answer(35).ok());
  EXPECT_EQ(applied_.size(), 1u);
}

// Rank 0 does not use unit 0 in the first micro-step; that is known when its micro-step is over.
TEST_F(NodeSumTest, AWaitForARankEndsWithItsMicroStep) {
  job_->OnScatter(1, 31, 0, 1, false, 500, {true});
  EXPECT_TRUE(Take<StartAccumulate>().empty());
  job_->OnMicroStep(0, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500}));
  EXPECT_TRUE(Answer(31).ok());
  // Rank 0's second micro-step waits for rank 1's first to end, whatever came when.
  job_->OnScatter(0, 32, 0, 1, false, 700, {true});
  job_->OnScatter(0, 33, 1, 1, false, 800, {true});
  EXPECT_TRUE(Accumulated().empty());
  job_->OnScatter(1, 34, 0, 1, false, 600, {true});
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{600}));
  job_->OnMicroStep(1, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{700, 800}));
  // Of another step, or after STEP, it says nothing.
  job_->OnScatter(1, 35, 2, 1, false, 900, {true});
  job_->OnMicroStep(0, 2);
  job_->OnMicroStep(77, 1);
  EXPECT_TRUE(Accumulated().empty());
  job_->OnStep(0, 36, 1, Hyper(1), {});
  job_->OnMicroStep(0, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{900}));
}

// The other members hear of a gradient when it has been added, and of a READ at once: it must not
// come before the reduction of what its client handed over.
TEST_F(NodeSumTest, AGradientIsReadBehindWhatWasHandedOver) {
  job_->OnScatter(0, 31, 1, 1, true, 500, {true});
  job_->OnScatter(1, 32, 1, 1, true, 600, {true});
  job_->OnRead(0, 41, 1, 0, 10, StateKind::kGradient);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500, 600}));
  EXPECT_TRUE(Take<StartRead>().empty());
  const std::vector<StartReduce> reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  const std::vector<StartRead> reads = Take<StartRead>();
  ASSERT_EQ(reads.size(), 1u);
  job_->OnEntryDone(reads[0].seq, absl::OkStatus());
  EXPECT_TRUE(Answer(41).ok());
}

TEST_F(NodeSumTest, NothingIsAddedWhileAGradientIsSet) {
  job_->OnScatter(0, 31, 1, 1, true, 500, {true});
  job_->OnScatter(1, 32, 1, 1, true, 600, {true});
  job_->OnPut(0, 41, 1, 0, 10, StateKind::kGradient);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500, 600}));
  const std::vector<StartReduce> reduces = Take<StartReduce>();
  ASSERT_EQ(reduces.size(), 1u);
  job_->OnEntryDone(reduces[0].seq, absl::OkStatus());
  const std::vector<StartPut> puts = Take<StartPut>();
  ASSERT_EQ(puts.size(), 1u);
  job_->OnScatter(0, 33, 1, 1, true, 700, {true});
  job_->OnScatter(1, 34, 1, 1, true, 800, {true});
  EXPECT_TRUE(Accumulated().empty());
  job_->OnEntryDone(puts[0].seq, absl::OkStatus());
  EXPECT_TRUE(Answer(41).ok());
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{700, 800}));
}

// Rank 0 waits for nobody when it first hands a part over, rank 1 for rank 0's of the same part.
TEST_F(NodeSumTest, EachPartOfAUnitHasAnOrderOfItsOwn) {
  JobSpec spec = Spec(1, 2);
  spec.node_sum = true;
  spec.staged_part_elements = 1024;  // unit 1 has 2000: two parts
  Make(spec);
  Attach(2);
  job_->OnScatter(1, 31, 1, 1, false, 500, {true}, 1);
  job_->OnScatter(1, 32, 1, 1, false, 600, {true}, 0);
  EXPECT_TRUE(Accumulated().empty());
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  EXPECT_EQ(aside[0].bytes, 4096u);  // of 976 elements
  job_->OnSetAsideDone(1, aside[0].aside, true);
  job_->OnScatter(0, 33, 1, 1, false, 700, {true}, 0);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{700, 600}));
  job_->OnScatter(0, 34, 1, 1, true, 800, {true}, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{800, 500}));
  job_->OnScatter(0, 35, 1, 1, true, 0, {true}, 2);
  EXPECT_TRUE(absl::IsInvalidArgument(Answer(35)));
}

TEST_F(NodeSumTest, PartsOfAUnitDoNotWaitForEachOther) {
  JobSpec spec = Spec(1, 2);
  spec.node_sum = true;
  spec.staged_part_elements = 1024;
  Make(spec);
  Attach(2);
  job_->OnScatter(1, 31, 1, 1, false, 500, {true}, 0);  // waits for rank 0's
  job_->OnScatter(0, 32, 1, 1, false, 700, {true}, 1);
  job_->OnScatter(1, 33, 1, 1, false, 600, {true}, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{700, 600}));
  job_->OnScatter(0, 34, 1, 1, false, 800, {true}, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{800}));
  job_->OnMakeRoom(1);
  EXPECT_EQ(Take<StartSetAside>().size(), 1u);  // what was never in anybody's way
  job_->OnScatter(0, 35, 1, 1, true, 900, {true}, 0);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{900}));  // 500 is on its way aside
}

TEST_F(NodeSumTest, WhatWaitsIsSetAsideAndAddedInItsPlace) {
  job_->OnScatter(1, 31, 0, 1, false, 500, {true});
  job_->OnScatter(1, 32, 1, 1, false, 600, {true});
  EXPECT_TRUE(Take<StartSetAside>().empty());  // only where there is no room
  job_->OnMakeRoom(1);
  job_->OnMakeRoom(1);
  std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);  // the oldest, and no more than asked for
  EXPECT_EQ(aside[0].unit, 0u);
  EXPECT_EQ(aside[0].staging_offset, 500u);
  EXPECT_EQ(aside[0].cookie, 31u);
  EXPECT_EQ(aside[0].bytes, 4096u);  // whole pages
  // Its turn comes while it is copied: it is added from where it goes.
  job_->OnScatter(0, 33, 0, 1, false, 700, {true});
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{700}));
  EXPECT_TRUE(absl::IsUnknown(Answer(31)));
  job_->OnSetAsideDone(0, aside[0].aside, true);
  EXPECT_TRUE(Answer(31).ok());
  const std::vector<StartAccumulate> next = Take<StartAccumulate>();
  ASSERT_EQ(next.size(), 1u);
  EXPECT_EQ(next[0].aside, aside[0].aside);
  EXPECT_FALSE(next[0].first);
  job_->OnAccumulateDone(0, 1);
  // Answered once; a late word about it changes nothing.
  job_->OnSetAsideDone(0, aside[0].aside, true);
  EXPECT_TRUE(Take<Complete>().empty());
  EXPECT_TRUE(Take<StartSetAside>().empty());
  job_->OnMakeRoom(1);
  aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  EXPECT_EQ(aside[0].unit, 1u);
  job_->OnSetAsideDone(1, aside[0].aside, true);
  EXPECT_TRUE(Answer(32).ok());
  job_->OnStep(0, 34, 1, Hyper(1), {});
  job_->OnStep(1, 35, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(35).ok());
  EXPECT_EQ(applied_.size(), 2u);
}

TEST_F(NodeSumTest, AScatterOfNothingTakesNoMemoryAndKeepsItsPlace) {
  for (uint64_t cookie = 31; cookie < 41; ++cookie) {
    job_->OnScatter(1, cookie, 0, 1, false, 500, {false});
    EXPECT_TRUE(Answer(cookie).ok());
    job_->OnMakeRoom(1);
  }
  EXPECT_TRUE(Take<StartSetAside>().empty());
  EXPECT_TRUE(Take<StartAccumulate>().empty());
  job_->OnScatter(1, 41, 0, 1, true, 600, {true});  // its eleventh
  EXPECT_TRUE(Take<StartAccumulate>().empty());
  job_->OnStep(0, 42, 1, Hyper(1), {});
  const std::vector<StartAccumulate> next = Take<StartAccumulate>();
  ASSERT_EQ(next.size(), 1u);
  EXPECT_EQ(next[0].cookie, 41u);
}

TEST_F(NodeSumTest, WhatIsAddedAnywayIsNotSetAside) {
  job_->OnScatter(0, 31, 0, 1, false, 500, {true});
  job_->OnScatter(1, 32, 0, 1, false, 600, {true});  // behind the former, in no need of a rank
  job_->OnMakeRoom(0);
  job_->OnMakeRoom(1);
  EXPECT_TRUE(Take<StartSetAside>().empty());
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500, 600}));
  EXPECT_TRUE(Take<StartSetAside>().empty());
}

// By a gradient for each of the two ranks.
TEST_F(NodeSumTest, WhatIsSetAsideIsBounded) {
  for (UnitIndex u : {0, 1, 2, 0, 1, 2, 2}) job_->OnScatter(1, 31, u, 1, false, 0, {true});
  for (uint64_t count : {1, 1, 1, 1, 1, 1, 0}) {
    job_->OnMakeRoom(1);
    const std::vector<StartSetAside> aside = Take<StartSetAside>();
    ASSERT_EQ(aside.size(), count);
    if (count == 1) job_->OnSetAsideDone(aside[0].unit, aside[0].aside, true);
  }
  // What is added makes room for the seventh.
  job_->OnScatter(0, 32, 2, 1, false, 0, {true});
  std::vector<StartAccumulate> added = Take<StartAccumulate>();
  ASSERT_EQ(added.size(), 1u);
  job_->OnAccumulateDone(2, 0);
  added = Take<StartAccumulate>();
  ASSERT_EQ(added.size(), 1u);
  EXPECT_NE(added[0].aside, 0u);
  EXPECT_TRUE(Take<StartSetAside>().empty());
  job_->OnAccumulateDone(2, 1);
  EXPECT_EQ(Take<StartSetAside>().size(), 1u);
}

// Two of three ranks may need one gradient, of whom both wait for what one has not handed over.
TEST_F(NodeSumTest, ARankThatIsAheadLeavesRoomToTheOthers) {
  JobSpec spec = Spec(1, 3);
  spec.node_sum = true;
  Make(spec);
  Attach(3);
  job_->OnMicroStep(2, 1);
  for (UnitIndex u : {0, 1, 2, 0, 1, 2, 2}) job_->OnScatter(2, 31, u, 1, false, 0, {true});
  for (uint64_t count : {1, 1, 1, 1, 1, 1, 0}) {
    job_->OnMakeRoom(2);
    const std::vector<StartSetAside> aside = Take<StartSetAside>();
    ASSERT_EQ(aside.size(), count);
    if (count == 1) job_->OnSetAsideDone(aside[0].unit, aside[0].aside, true);
  }
  job_->OnMicroStep(0, 1);  // one of the others is behind now, and waits for nobody
  EXPECT_EQ(Take<StartSetAside>().size(), 1u);
}

TEST_F(NodeSumTest, WhatOneFoundNoMemoryForIsThereForAnother) {
  JobSpec spec = Spec(1, 3);
  spec.node_sum = true;
  Make(spec);
  Attach(3);
  for (int i = 0; i < 6; ++i) job_->OnScatter(1, 31, 2, 1, false, 0, {true});
  std::vector<StartSetAside> aside;
  for (int i = 0; i < 6; ++i) {
    job_->OnMakeRoom(1);
    aside = Take<StartSetAside>();
    ASSERT_EQ(aside.size(), 1u);
    if (i < 5) job_->OnSetAsideDone(2, aside[0].aside, true);
  }
  job_->OnScatter(2, 32, 0, 1, false, 0, {true});
  job_->OnMakeRoom(2);
  EXPECT_TRUE(Take<StartSetAside>().empty());  // all that may be is taken, or about to be
  job_->OnSetAsideDone(2, aside[0].aside, false);
  aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  EXPECT_EQ(aside[0].slot, 2u);
  job_->OnSetAsideDone(0, aside[0].aside, false);
  EXPECT_TRUE(Take<StartSetAside>().empty());  // and not to and fro between them
  EXPECT_TRUE(job_->WantsRoom(1));
  job_->OnMicroStep(1, 1);  // it has found room, or there would be no such request
  EXPECT_FALSE(job_->WantsRoom(1));
}

// Who waits in a barrier is past all that comes before it.
TEST_F(NodeSumTest, ARankAtABarrierIsNotWaitedFor) {
  job_->OnScatter(1, 31, 0, 1, false, 500, {true});
  job_->OnMicroStep(1, 1);
  job_->OnScatter(1, 32, 0, 1, false, 600, {true});
  EXPECT_TRUE(Accumulated().empty());
  job_->OnScalar(0, 33, {});
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500, 600}));
  job_->OnScalar(1, 34, {});
  EXPECT_TRUE(Answer(33).ok());
  job_->OnScatter(1, 35, 0, 1, false, 700, {true});  // behind it: after rank 0's
  EXPECT_TRUE(Accumulated().empty());
  job_->OnScatter(0, 36, 0, 1, true, 800, {true});
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{800, 700}));
}

TEST_F(NodeSumTest, WhereThereIsNoMemoryItWaitsAndIsAskedForAgain) {
  job_->OnScatter(1, 31, 0, 1, false, 500, {true});
  job_->OnMakeRoom(1);
  std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  job_->OnSetAsideDone(0, aside[0].aside, false);
  EXPECT_TRUE(Take<StartSetAside>().empty());  // not at once
  EXPECT_TRUE(absl::IsUnknown(Answer(31)));
  job_->OnMakeRoom(1);
  aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  job_->OnSetAsideDone(0, aside[0].aside, false);
  job_->OnMicroStep(0, 1);
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{500}));
  EXPECT_TRUE(Answer(31).ok());
}

// Rank 1's second round waits until the first is reduced, which needs rank 0.
TEST_F(NodeSumTest, AWaitForARoundIsSetAsideToo) {
  job_->OnScatter(0, 30, 0, 1, true, 100, {true});
  job_->OnScatter(1, 31, 0, 1, true, 200, {true});
  job_->OnReclaim(1, 32, 0, 1);
  RunEngine();
  EXPECT_TRUE(Answer(32).ok());
  job_->OnScatter(1, 33, 1, 1, false, 300, {true});
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  job_->OnSetAsideDone(1, aside[0].aside, true);
  EXPECT_TRUE(Answer(33).ok());
  job_->OnScatter(0, 34, 1, 1, true, 400, {true});
  EXPECT_EQ(Accumulated(), (std::vector<uint64_t>{400}));
  job_->OnStep(0, 35, 1, Hyper(1), {});
  job_->OnStep(1, 36, 1, Hyper(1), {});
  RunEngine();
  EXPECT_TRUE(Answer(35).ok() && Answer(36).ok());
}

TEST_F(NodeSumTest, ADeathWhileSomethingIsSetAsideEndsTheGenerationAfterIt) {
  job_->OnScatter(1, 61, 0, 1, true, 0, {true});
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  job_->OnClientGone(1, "killed");
  EXPECT_EQ(job_->generation(), 1u);
  job_->OnSetAsideDone(0, aside[0].aside, true);
  EXPECT_EQ(job_->generation(), 2u);
  EXPECT_EQ(Take<DropGradients>().size(), 1u);
  EXPECT_TRUE(Take<StartAccumulate>().empty());
}

TEST_F(NodeSumTest, ARankThatLeavesLeavesNothingSetAside) {
  job_->OnScatter(1, 81, 0, 1, false, 0, {true});
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> first = Take<StartSetAside>();
  job_->OnSetAsideDone(0, first.at(0).aside, true);
  job_->OnScatter(1, 82, 1, 1, false, 0, {true});
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> second = Take<StartSetAside>();
  job_->OnDetach(0, 83);
  std::vector<DropAside> dropped = Take<DropAside>();
  ASSERT_EQ(dropped.size(), 1u);
  EXPECT_EQ(dropped[0].aside, first[0].aside);
  EXPECT_TRUE(absl::IsUnknown(Answer(82)));  // the copy reads its memory
  job_->OnSetAsideDone(1, second.at(0).aside, true);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(82)));
  dropped = Take<DropAside>();
  ASSERT_EQ(dropped.size(), 1u);
  EXPECT_EQ(dropped[0].aside, second[0].aside);
  EXPECT_TRUE(Take<StartAccumulate>().empty());
}

TEST_F(NodeSumTest, ADeathDuringAnAccumulationEndsTheGenerationAfterIt) {
  job_->OnScatter(0, 61, 0, 1, true, 0, {true});
  ASSERT_EQ(Take<StartAccumulate>().size(), 1u);
  job_->OnClientGone(1, "killed");
  EXPECT_EQ(job_->generation(), 1u);
  job_->OnAccumulateDone(0, 0);
  EXPECT_EQ(job_->generation(), 2u);
}

}  // namespace
}  // namespace zerod::core
