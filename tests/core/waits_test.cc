// SPDX-License-Identifier: Apache-2.0
//
// What a job says of the ranks that wait for others.
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "tests/core/job_fixture.h"

namespace zerod::core {
namespace {

using ::testing::StartsWith;

class WaitsTest : public JobTest {};

TEST_F(WaitsTest, SaysWhoWaitsForWhom) {
  JobSpec spec = Spec(1, 2);
  spec.node_sum = true;
  Make(spec);
  Attach(2);
  EXPECT_EQ(job_->WaitingFor(), "");
  job_->OnScalar(0, 21, {});
  EXPECT_EQ(job_->WaitingFor(),
            "rank 0 waits for rank 1 to come to a barrier, an all_reduce or a restore");
  job_->OnScalar(1, 22, {});
  EXPECT_EQ(job_->WaitingFor(), "");
  job_->OnScatter(1, 23, 0, 1, false, 0, {true});
  EXPECT_EQ(job_->WaitingFor(), "");  // it goes on
  EXPECT_FALSE(job_->WantsRoom(1));
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  EXPECT_EQ(job_->WaitingFor(), "");  // room is being made
  job_->OnSetAsideDone(0, aside[0].aside, /*done=*/false);
  EXPECT_TRUE(job_->WantsRoom(1));
  EXPECT_THAT(job_->WaitingFor(),
              StartsWith("rank 1 waits for room in the gradient staging memory, until the "
                         "micro-step of rank 0 comes to it"));
  job_->OnStep(0, 24, 1, Hyper(1), {});
  RunEngine();
  EXPECT_EQ(job_->WaitingFor(), "rank 0 waits for rank 1 to call step() for step 1");
}

TEST_F(WaitsTest, WhatTheDaemonsHaveUnderWayIsNoWait) {
  Make(Spec(2, 1));
  const auto from_1 = [&](std::vector<ReportItem> items) {
    job_->OnMessage(1, Report{1, std::move(items)});
  };
  from_1({Joined{job_->spec().layout->hash(), {}, 2, 2}, ClientAttached{1}});
  Attach(1);
  from_1({ScalarReady{1, {1}, {{}}, {}}});
  EXPECT_EQ(job_->WaitingFor(), "");
  job_->OnScalar(0, 20, {});
  EXPECT_TRUE(Answer(20).ok());
  job_->OnScalar(0, 21, {});
  EXPECT_EQ(job_->WaitingFor(),
            "rank 0 waits for node 1 to come to a barrier, an all_reduce or a restore");
  from_1({ScalarReady{2, {1}, {{}}, {}}});
  job_->OnStep(0, 22, 1, Hyper(1), {});
  EXPECT_EQ(job_->WaitingFor(), "rank 0 waits for node 1 to call step() for step 1");
  StepReady step;
  step.step = 1;
  step.hyper = Hyper(1);
  from_1({step});
  EXPECT_EQ(Take<ComputeNorm>().size(), 1u);
  EXPECT_EQ(job_->WaitingFor(), "");
}

TEST_F(WaitsTest, SaysWhoseGradientsAreWaitedFor) {
  Make(Spec(1, 2));
  Attach(2);
  job_->OnScatter(0, 0, 1, 1, true, 0, {true});
  job_->OnReclaim(0, 22, 1, 1);
  EXPECT_THAT(job_->WaitingFor(), StartsWith("rank 0 waits for rank 1 to hand over the gradients"));
  job_->OnScatter(1, 0, 1, 1, true, 0, {true});
  RunEngine();
  EXPECT_EQ(job_->WaitingFor(), "");
}

// Its request is answered, so it waits no more.
TEST_F(WaitsTest, ARankThatIsToldThatAnotherHasLeftWantsNoRoom) {
  JobSpec spec = Spec(1, 2);
  spec.node_sum = true;
  Make(spec);
  Attach(2);
  job_->OnScatter(1, 23, 0, 1, false, 0, {true});
  job_->OnMakeRoom(1);
  const std::vector<StartSetAside> aside = Take<StartSetAside>();
  ASSERT_EQ(aside.size(), 1u);
  job_->OnSetAsideDone(0, aside[0].aside, /*done=*/false);
  EXPECT_TRUE(job_->WantsRoom(1));
  job_->OnDetach(0, 24);
  EXPECT_TRUE(absl::IsFailedPrecondition(Answer(23)));
  EXPECT_FALSE(job_->WantsRoom(1));
}

}  // namespace
}  // namespace zerod::core
