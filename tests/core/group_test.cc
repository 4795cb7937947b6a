// SPDX-License-Identifier: Apache-2.0
//
// A parameter group's values: what each kind of optimizer refuses.
#include <limits>

#include "daemon/core/types.h"
#include "gtest/gtest.h"

namespace zerod::core {
namespace {

TEST(GroupTest, IsCheckedForWhatItsOptimizerReads) {
  const OptimizerKind kinds[] = {OptimizerKind::kAdam, OptimizerKind::kLion,
                                 OptimizerKind::kAdagrad, OptimizerKind::kSgd,
                                 OptimizerKind::kSgdMomentum, OptimizerKind::kLamb,
                                 OptimizerKind::kMuon, OptimizerKind::kRmsProp,
                                 OptimizerKind::kAdadelta, OptimizerKind::kAdamax,
                                 OptimizerKind::kNAdam, OptimizerKind::kRAdam,
                                 OptimizerKind::kAsgd, OptimizerKind::kRprop};
  const auto refused = [](OptimizerKind kind, auto change) {
    Group g;
    change(&g);
    return !CheckGroup(kind, g).ok();
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const OptimizerKind kind : kinds) {
    EXPECT_TRUE(CheckGroup(kind, Group{}).ok());
    EXPECT_TRUE(refused(kind, [&](Group* g) { g->lr = nan; }));
    EXPECT_TRUE(refused(kind, [&](Group* g) { g->weight_decay = nan; }));
    const bool lamb = kind == OptimizerKind::kLamb;
    const bool adam = lamb || kind == OptimizerKind::kAdam || kind == OptimizerKind::kAdamax ||
                      kind == OptimizerKind::kNAdam || kind == OptimizerKind::kRAdam;
    const bool betas = adam || kind == OptimizerKind::kLion;
    EXPECT_EQ(refused(kind, [](Group* g) { g->beta2 = 1; }), betas);
    const bool eps = adam || kind == OptimizerKind::kAdagrad ||
                     kind == OptimizerKind::kAdadelta || kind == OptimizerKind::kRmsProp;
    EXPECT_EQ(refused(kind, [](Group* g) { g->eps = -1; }), eps);
    EXPECT_EQ(refused(kind, [](Group* g) { g->min_coeff = g->max_coeff + 1; }), lamb);
    EXPECT_EQ(refused(kind, [&](Group* g) { g->max_coeff = nan; }), lamb);
  }
  EXPECT_TRUE(refused(OptimizerKind::kMuon, [](Group* g) { g->momentum = 1; }));
  EXPECT_TRUE(refused(OptimizerKind::kAdagrad, [&](Group* g) { g->lr_decay = -1; }));
  EXPECT_TRUE(refused(OptimizerKind::kSgd, [](Group* g) { g->momentum = 0.9; }));
  EXPECT_FALSE(refused(OptimizerKind::kSgdMomentum, [](Group* g) { g->momentum = 0.9; }));
  EXPECT_TRUE(refused(OptimizerKind::kSgdMomentum, [&](Group* g) { g->dampening = nan; }));
  EXPECT_TRUE(refused(OptimizerKind::kAdadelta, [](Group* g) { g->rho = 1.1; }));
  EXPECT_TRUE(refused(OptimizerKind::kNAdam, [](Group* g) { g->momentum_decay = -1; }));
  EXPECT_TRUE(refused(OptimizerKind::kAsgd, [&](Group* g) { g->lr_before = nan; }));
  EXPECT_TRUE(refused(OptimizerKind::kRprop, [](Group* g) { g->eta_plus = 0.9; }));
  EXPECT_TRUE(refused(OptimizerKind::kRprop, [&](Group* g) { g->step_max = nan; }));
}

TEST(GroupTest, AnRmsPropStaysWhatItWasBegunAs) {
  using Kind = OptimizerKind;
  Group plain, momentum, centered, both;
  momentum.momentum = both.momentum = 0.9;
  centered.centered = both.centered = true;
  EXPECT_FALSE(CheckGroup(Kind::kRmsProp, momentum).ok());
  EXPECT_FALSE(CheckGroup(Kind::kRmsPropCentered, both).ok());
  EXPECT_FALSE(CheckGroup(Kind::kRmsProp, centered).ok());
  EXPECT_FALSE(CheckGroup(Kind::kRmsPropCenteredMomentum, momentum).ok());
  EXPECT_TRUE(CheckGroup(Kind::kRmsPropMomentum, momentum).ok());
  EXPECT_TRUE(CheckGroup(Kind::kRmsPropMomentum, plain).ok());
  EXPECT_TRUE(CheckGroup(Kind::kRmsPropCentered, centered).ok());
  EXPECT_TRUE(CheckGroup(Kind::kRmsPropCenteredMomentum, both).ok());
  EXPECT_EQ(StateTensors(Kind::kRmsPropCenteredMomentum), kStateTensorsMax);
}

TEST(GroupTest, RanksThatDifferInAnyValueHaveOtherHashes) {
  const auto hash = [](double Group::*field) {
    HyperParameters hyper;
    hyper.groups.resize(1);
    if (field != nullptr) hyper.groups[0].*field += 1;
    return hyper.Hash().Hex();
  };
  for (const auto field : {&Group::alpha, &Group::rho, &Group::momentum_decay, &Group::eta_minus,
                           &Group::eta_plus, &Group::step_min, &Group::step_max, &Group::lambd,
                           &Group::t0, &Group::lr_before}) {
    EXPECT_NE(hash(field), hash(nullptr));
  }
}

}  // namespace
}  // namespace zerod::core
