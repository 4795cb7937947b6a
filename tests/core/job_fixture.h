// SPDX-License-Identifier: Apache-2.0
//
// A job of one member whose engine is the test.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/core/job.h"
#include "daemon/core/sequencer.h"
#include "tests/core/models.h"

namespace zerod::core {

class NoWindow : public WindowPort {
 public:
  void Map(UnitIndex, const std::vector<uint32_t>&) override {}
  void Publish(UnitIndex, Step) override {}
  void Retract(UnitIndex) override {}
  bool TryUnmap(UnitIndex) override { return true; }
  absl::Status Grow(uint64_t) override { return absl::OkStatus(); }
  std::vector<SlotIndex> Holders(UnitIndex) override { return {}; }
};

inline JobSpec Spec(uint32_t members, uint32_t local_world, MemberIndex self = 0) {
  JobSpec spec;
  spec.id = "test";
  auto layout = std::make_shared<const Layout>(Units({1000, 2000, 3000}));
  spec.layout = layout;
  spec.members = members;
  spec.self = self;
  spec.local_world = local_world;
  spec.world = members * local_world;
  spec.stage = 3;
  spec.window.pinned.assign(3, false);
  spec.window.resident.assign(3, false);
  spec.window.base_chunks = spec.window.max_chunks = 3;
  return spec;
}

inline HyperParameters Hyper(double lr) {
  HyperParameters h;
  h.groups.resize(1);
  h.groups[0].lr = lr;
  return h;
}

// One member whose engine is the test.
class JobTest : public ::testing::Test {
 protected:
  void Make(JobSpec spec) { job_ = std::make_unique<Job>(std::move(spec), &window_); }
  void Attach(uint32_t clients) {
    for (SlotIndex i = 0; i < clients; ++i) ASSERT_TRUE(job_->OnAttach(i, i).ok());
    job_->OnConnected(absl::OkStatus());
  }
  // Actions of one kind since the last call; the others are kept for later.
  template <typename A>
  std::vector<A> Take() {
    for (Action& a : job_->TakeActions()) actions_.push_back(std::move(a));
    std::vector<A> found;
    std::erase_if(actions_, [&](const Action& a) {
      if (!std::holds_alternative<A>(a)) return false;
      found.push_back(std::get<A>(a));
      return true;
    });
    return found;
  }
  // The status with which a request was answered, or UNKNOWN while it was not.
  absl::Status Answer(uint64_t cookie) {
    for (Complete& c : Take<Complete>()) answers_.emplace(c.cookie, std::move(c));
    const auto it = answers_.find(cookie);
    return it == answers_.end() ? absl::UnknownError("no answer") : it->second.status;
  }
  // Finishes every transfer and everything of the step that the job asks for.
  void RunEngine() {
    for (bool any = true; any;) {
      any = false;
      for (const auto& a : Take<StartAllGather>()) any = true, job_->OnEntryDone(a.seq, {});
      for (const auto& a : Take<StartReduce>()) any = true, job_->OnEntryDone(a.seq, {});
      for (const auto& a : Take<ComputeNorm>()) any = true, job_->OnNormDone(a.step, Norm(a));
      for (const auto& a : Take<StartAccumulate>()) {
        any = true;
        job_->OnAccumulateDone(a.unit, a.slot);
      }
      for (const auto& a : Take<StartSetAside>()) {
        any = true;
        job_->OnSetAsideDone(a.unit, a.aside, true);
      }
      for (const auto& a : Take<StartApply>()) {
        any = true;
        applied_.emplace_back(a.plan->step, a.unit);
        job_->OnApplyDone(a.unit, a.plan->step);
      }
    }
  }

  // Gradients of zeros, or with something that is not finite among them.
  NormPart Norm(const ComputeNorm& a) const {
    NormPart part;
    if (!a.needed) return part;
    const Layout& layout = *job_->spec().layout;
    for (const Unit& u : layout.units()) {
      part.block_squares.resize(part.block_squares.size() +
                                layout.Blocks({0, u.trainable_elements}));
    }
    part.nonfinite = overflow_;
    return part;
  }

  NoWindow window_;
  bool overflow_ = false;
  std::unique_ptr<Job> job_;
  std::vector<Action> actions_;
  std::map<uint64_t, Complete> answers_;
  std::vector<std::pair<Step, UnitIndex>> applied_;
};

}  // namespace zerod::core
