// SPDX-License-Identifier: Apache-2.0
//
// One member: whole training runs through rings and windows, compared bit for bit with plain
// loops.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using core::UnitIndex;

constexpr core::DType kFp32 = core::DType::kFloat32;
constexpr core::DType kBf16 = core::DType::kBFloat16;
constexpr core::DType kFp16 = core::DType::kFloat16;

struct Case {
  std::string name;
  uint32_t stage;
  core::DType dtype;
  uint32_t clients;
  bool node_sum;
  uint32_t micro_steps;
  std::string zero_keys;
};
std::string CaseName(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

// A window of the unpinned units' largest live set and little more; one unit is resident.
const char kSmallWindow[] =
    "\"stage3_param_persistence_threshold\": 1000, \"stage3_max_live_parameters\": 70000, "
    "\"stage3_prefetch_bucket_size\": 20000";

class OneMember : public ::testing::TestWithParam<Case> {};

TEST_P(OneMember, TrainsAsPlainLoopsDo) {
  const Case& c = GetParam();
  ClusterOptions options;
  options.local_world = c.clients;
  options.config = ConfigText(
      c.stage, c.dtype, c.zero_keys,
      absl::StrCat("\"gradient_plan\": \"", c.node_sum ? "node_sum" : "per_rank", "\""));
  options.model = SmallModel(c.dtype, 4, 130);
  Cluster cluster(options);
  const core::JobPlan& plan = cluster.runner(0).plan();
  ASSERT_EQ(plan.node_sum, c.node_sum);
  // The case is what it says it is.
  ASSERT_EQ(plan.window.base_chunks < cluster.layout().chunks(), !c.zero_keys.empty());
  Workload workload = DefaultWorkload();
  workload.micro_steps = c.micro_steps;
  workload.hyper.max_norm = 0.5;
  constexpr uint64_t kSteps = 4;
  Reference reference(&cluster.layout(), 1, c.clients, c.node_sum);
  std::vector<double> expected_norms;
  for (uint64_t i = 0; i < kSteps; ++i) {
    reference.Step(workload);
    expected_norms.push_back(reference.grad_norm());
  }
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    std::vector<double> norms;
    Train(cluster.layout(), rank, client, workload, kSteps, /*fresh=*/true, &norms);
    EXPECT_EQ(norms, expected_norms);
    if (rank == 0) {
      EXPECT_TRUE(ReadState(cluster.layout(), client) ==
                  StateOf(cluster.layout(), reference));
      for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
        ASSERT_TRUE(client.Gather(u).ok());
        EXPECT_EQ(client.Values(u), reference.Seen(u)) << "unit " << u;
        client.Release(u);
      }
    }
    EXPECT_TRUE(client.Barrier().ok());
    EXPECT_TRUE(client.Detach().ok());
  });
  EXPECT_TRUE(cluster.WaitForEnd(0).ok());
  EXPECT_EQ(cluster.metrics(0).committed(), kSteps);
  EXPECT_EQ(cluster.metrics(0).observed(metrics::Latency::kStep), kSteps);
  EXPECT_GT(cluster.metrics(0).traffic(metrics::Traffic::kScatteredFromClient), 0u);
  for (const auto& [kind, bytes] : plan.memory.Named()) {
    // Where clients hold more than the forecast had room for, the window grew by what they held.
    const uint64_t grown = kind == "window" ? cluster.metrics(0).memory(kind) - bytes : 0;
    EXPECT_LE(grown, 2u * 65536);
    EXPECT_EQ(cluster.metrics(0).memory(kind), bytes + grown) << kind;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Plans, OneMember,
    ::testing::Values(Case{"Fp32Stage0", 0, kFp32, 1, false, 1, ""},
                      Case{"Fp32Stage2TwoClients", 2, kFp32, 2, false, 2, ""},
                      Case{"Fp32Stage3AllFits", 3, kFp32, 2, false, 1, ""},
                      Case{"Fp32Stage3SmallWindow", 3, kFp32, 2, false, 1, kSmallWindow},
                      Case{"Fp32Stage3OneClient", 3, kFp32, 1, false, 1, kSmallWindow},
                      Case{"Fp32NodeSum", 1, kFp32, 3, true, 2, ""},
                      Case{"Fp32NodeSumSmallWindow", 3, kFp32, 2, true, 2, kSmallWindow},
                      Case{"Bf16Stage1", 1, kBf16, 2, false, 1, ""},
                      Case{"Bf16Stage3AllFits", 3, kBf16, 2, false, 1, ""},
                      Case{"Bf16Stage3SmallWindow", 3, kBf16, 2, false, 2,
                           "\"stage3_param_persistence_threshold\": 1000, "
                           "\"stage3_max_live_parameters\": 140000"},
                      Case{"Bf16NodeSum", 2, kBf16, 2, true, 1, ""},
                      Case{"Fp16Stage2", 2, kFp16, 2, false, 2, ""},
                      Case{"Fp16Stage3SmallWindow", 3, kFp16, 1, false, 1, kSmallWindow}),
    CaseName);

ClusterOptions Small(uint32_t clients, const std::string& zerod_keys = "") {
  ClusterOptions options;
  options.local_world = clients;
  options.config = ConfigText(2, kFp32, "", zerod_keys);
  options.model = SmallModel(core::DType::kFloat32, 2, 30);
  return options;
}

TEST(Step, NormIsNotTakenWhereNobodyAsks) {
  ClusterOptions options = Small(1);
  options.config = ConfigText(0, kFp32);  // elsewhere a step is skipped by it
  Cluster cluster(options);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    std::vector<double> norms;
    Workload workload = DefaultWorkload();
    Train(cluster.layout(), rank, client, workload, 2, true, &norms);
    EXPECT_TRUE(std::isnan(norms[0]) && std::isnan(norms[1]));
    // Asked for in one step, then taken early in the next, then forgone again.
    workload.hyper.want_norm = true;
    Train(cluster.layout(), rank, client, workload, 2, false, &norms);
    EXPECT_GT(norms[2], 0);
    EXPECT_GT(norms[3], 0);
    workload.hyper.want_norm = false;
    Train(cluster.layout(), rank, client, workload, 1, false, &norms);
    EXPECT_TRUE(std::isnan(norms[4]));
  });
}

TEST(Step, GradientsThatComeLateAreAddedInAnotherRound) {
  for (const char* plan : {"\"gradient_plan\": \"per_rank\"", "\"gradient_plan\": \"node_sum\""}) {
    Cluster cluster(Small(2, plan));
    const bool node_sum = cluster.runner(0).plan().node_sum;
    Workload workload = DefaultWorkload();
    workload.skip_some = false;
    workload.hyper.want_norm = true;
    workload.micro_steps = 2;
    Reference reference(&cluster.layout(), 1, 2, node_sum);
    reference.Step(workload);
    cluster.RunClients([&](uint32_t rank, FakeClient& client) {
      EXPECT_TRUE(client.Barrier().ok());
      if (rank == 0) PutInitial(cluster.layout(), client);
      EXPECT_TRUE(client.Barrier().ok());
      // The second micro-step comes when the first was taken to be the last.
      for (uint32_t micro = 0; micro < 2; ++micro) {
        for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
          EXPECT_TRUE(client.Gather(u).ok());
          const std::vector<float> values = client.Values(u);
          client.Release(u);
          if (micro == 1) {
            EXPECT_TRUE(client.Reclaim(u).ok());
          }
          for (uint32_t p : cluster.layout().units()[u].parameters) {
            if (!cluster.layout().parameters()[p].trainable) continue;
            client.Land(p, Gradient(cluster.layout(), p, values, 1, rank, micro));
          }
          EXPECT_TRUE(client.Scatter(u, true).ok());
        }
      }
      const auto answer = client.Step({workload.hyper, ""});
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_EQ(answer->grad_norm, reference.grad_norm());
      if (rank == 0) {
        EXPECT_TRUE(ReadState(cluster.layout(), client) ==
                    StateOf(cluster.layout(), reference))
            << plan;
      }
      EXPECT_TRUE(client.Barrier().ok());
    });
  }
}

// Staging holds one gradient of one unit, and rank 1 hands over everything before rank 0 begins.
TEST(NodeSum, ARankGoesOnWithoutTheOthersAndTheSumIsTheSame) {
  Cluster cluster(Small(2, "\"gradient_plan\": \"node_sum\", \"staging_bytes\": 4096"));
  Workload workload = DefaultWorkload();
  workload.hyper.max_norm = 0.5;
  constexpr uint64_t kSteps = 3;
  Reference reference(&cluster.layout(), 1, 2, /*node_sum=*/true);
  for (uint64_t i = 0; i < kSteps; ++i) reference.Step(workload);
  // Not a barrier of zerod: who waits in one is not waited for.
  absl::Notification handed_over[kSteps];
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    client.set_makes_room();
    ASSERT_TRUE(client.Barrier().ok());
    if (rank == 0) PutInitial(cluster.layout(), client);
    ASSERT_TRUE(client.Barrier().ok());
    for (uint64_t i = 0; i < kSteps; ++i) {
      if (rank == 1) {
        ASSERT_TRUE(Backward(cluster.layout(), rank, client, workload).ok());
        handed_over[i].Notify();
      } else {
        ASSERT_TRUE(handed_over[i].WaitForNotificationWithTimeout(absl::Minutes(1)));
        EXPECT_GT(cluster.metrics(0).memory("set_aside"), 0u);
        EXPECT_LE(cluster.metrics(0).memory("set_aside"),
                  2 * core::AsideBytesMax(cluster.layout(),
                                          cluster.runner(0).plan().staged_part_elements));
        ASSERT_TRUE(Backward(cluster.layout(), rank, client, workload).ok());
      }
      ASSERT_TRUE(client.Step({workload.hyper, ""}).ok());
      EXPECT_EQ(cluster.metrics(0).memory("set_aside"), 0u);
      ASSERT_TRUE(client.Barrier().ok());
    }
    if (rank == 0) {
      EXPECT_TRUE(ReadState(cluster.layout(), client) == StateOf(cluster.layout(), reference));
    }
    ASSERT_TRUE(client.Barrier().ok());
    EXPECT_TRUE(client.Detach().ok());
  });
  EXPECT_TRUE(cluster.WaitForEnd(0).ok());
  EXPECT_GT(cluster.metrics(0).traffic(metrics::Traffic::kSetAside), 0u);
}

// What is missing of a parameter does not come from the step before.
TEST(NodeSum, WhatIsNotHandedOverOfAParameterIsZero) {
  Cluster cluster(Small(1, "\"gradient_plan\": \"node_sum\", \"staging_bytes\": 4096"));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    const core::Layout& layout = cluster.layout();
    Train(layout, rank, client, DefaultWorkload(), 2, /*fresh=*/true);
    const auto large = [&](const core::Parameter& p) { return p.trainable && p.elements > 1024; };
    const auto p = std::find_if(layout.parameters().begin(), layout.parameters().end(), large);
    ASSERT_NE(p, layout.parameters().end());
    const auto index = static_cast<uint32_t>(p - layout.parameters().begin());
    client.Land(index, std::vector<float>(p->elements, 3.0f));
    const auto first = static_cast<uint32_t>(p->offset / 1024);
    const uint64_t end = (first + 1) * uint64_t{1024} - p->offset;
    ASSERT_TRUE(client.Scatter(p->unit, false).ok());
    ASSERT_TRUE(client.Step({DefaultWorkload().hyper, ""}).ok());
    client.Land(index, std::vector<float>(p->elements, 5.0f));
    ASSERT_TRUE(client.ScatterPart(p->unit, first, true).ok());
    ASSERT_TRUE(client.Barrier().ok());
    const auto read = client.Read(p->unit, p->offset, p->elements, shm::StateKind::kGradient);
    ASSERT_TRUE(read.ok()) << read.status();
    for (uint64_t e = 0; e < p->elements; ++e) ASSERT_EQ((*read)[e], e < end ? 5.0f : 0.0f) << e;
  });
}

// Each leaves out what the other uses, in every micro-step, and asks for no room.
TEST(NodeSum, RanksOnDifferentPathsWaitForAMicroStepAtMost) {
  Cluster cluster(Small(2, "\"gradient_plan\": \"node_sum\", \"staging_bytes\": 4096"));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    const core::Layout& layout = cluster.layout();
    ASSERT_TRUE(client.Barrier().ok());
    if (rank == 0) PutInitial(layout, client);
    ASSERT_TRUE(client.Barrier().ok());
    std::vector<std::vector<float>> expected(layout.parameters().size());
    for (uint32_t micro = 0; micro < 4; ++micro) {
      for (uint32_t other = 0; other < 2; ++other) {
        for (UnitIndex u = 0; u < layout.units().size(); ++u) {
          if ((u + micro + other) % 2 == 0) continue;
          for (uint32_t p : layout.units()[u].parameters) {
            if (!layout.parameters()[p].trainable) continue;
            const std::vector<float> gradient =
                Gradient(layout, p, InitialValues(layout, u), 1, other, micro);
            if (other == rank) client.Land(p, gradient);
            std::vector<float>& sum = expected[p];
            if (sum.empty()) sum.resize(gradient.size());
            for (size_t i = 0; i < sum.size(); ++i) sum[i] += gradient[i];
          }
          if (other == rank) {
            ASSERT_TRUE(client.Scatter(u, false).ok());
          }
        }
      }
      ASSERT_TRUE(client.EndMicroStep().ok());
    }
    const Workload workload = DefaultWorkload();
    ASSERT_TRUE(client.Step({workload.hyper, ""}).ok());
    for (uint32_t i = 0; i < expected.size() && rank == 0; ++i) {
      const core::Parameter& p = layout.parameters()[i];
      if (!p.trainable) continue;
      const auto moment = client.Read(p.unit, p.offset, p.elements, shm::StateKind::kExpAvg);
      ASSERT_TRUE(moment.ok());
      // The first moment of a first step is (1 - beta1) of the mean over two ranks.
      const float beta1 = static_cast<float>(workload.hyper.groups[p.group].beta1);
      for (uint64_t e = 0; e < p.elements; ++e) {
        ASSERT_FLOAT_EQ((*moment)[e], (1 - beta1) * (expected[i][e] * 0.5f)) << i << " " << e;
      }
    }
    ASSERT_TRUE(client.Barrier().ok());
  });
}

TEST(Step, RanksThatDisagreeAreRefusedAndMayTryAgain) {
  Cluster cluster(Small(2));
  Workload workload = DefaultWorkload();
  Reference reference(&cluster.layout(), 1, 2, false);
  reference.Step(workload);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 0) PutInitial(cluster.layout(), client);
    EXPECT_TRUE(client.Barrier().ok());
    EXPECT_TRUE(Backward(cluster.layout(), rank, client, workload).ok());
    Workload other = workload;
    if (rank == 1) other.hyper.groups[0].lr = 0.5;
    const auto refused = client.Step({other.hyper, ""});
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("disagree"));
    // Their number was not used up and nothing was written.
    EXPECT_TRUE(client.Barrier().ok());
    for (uint32_t p = 0; p < cluster.layout().parameters().size(); ++p) client.Forget(p);
    EXPECT_TRUE(Backward(cluster.layout(), rank, client, workload).ok());
    EXPECT_TRUE(client.Step({workload.hyper, ""}).ok());
    if (rank == 0) {
      EXPECT_TRUE(ReadState(cluster.layout(), client) == StateOf(cluster.layout(), reference));
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(Step, UnusedParametersAreUpdatedWhereTheConfigSaysSo) {
  Cluster cluster(Small(1, "\"unused_parameters\": \"zero\""));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    Workload workload = DefaultWorkload();
    Train(cluster.layout(), rank, client, workload, 1, true);  // parameter 3: touched by nobody
    const core::Parameter& p = cluster.layout().parameters()[3];
    ASSERT_TRUE(p.trainable);
    const auto values = client.Read(p.unit, p.offset, p.elements, shm::StateKind::kMaster);
    const std::vector<float> before = InitialValues(cluster.layout(), p.unit);
    const core::Group& group = workload.hyper.groups[p.group];
    for (uint64_t i = 0; i < p.elements; ++i) {
      const float decayed =
          before[p.offset + i] * static_cast<float>(1.0 - group.lr * group.weight_decay);
      EXPECT_EQ((*values)[i], decayed);
    }
  });
}

TEST(PutAndRead, GiveBackWhatWasGivenAndRoundCopies) {
  ClusterOptions options = Small(1);
  options.config = ConfigText(2, kBf16);
  options.model = SmallModel(core::DType::kBFloat16, 2, 30);
  Cluster cluster(options);
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    const std::vector<float> values = {1.0f + 1e-3f, -0.0f, 3e38f, 1e-40f};
    ASSERT_TRUE(client.Put(0, 5, values).ok());
    EXPECT_EQ(*client.Read(0, 5, 4, shm::StateKind::kMaster), values);
    ASSERT_TRUE(client.Gather(0).ok());
    EXPECT_NEAR(client.Values(0)[5], 1.0, 0.005);
    EXPECT_NE(client.Values(0)[5], values[0]);
  });
}

TEST(Scalars, AreCombinedInRankOrder) {
  Cluster cluster(Small(3));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    const auto sum = client.AllReduce({rank + 1.0, 10.0}, shm::ScalarOp::kSum);
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_THAT(*sum, ::testing::ElementsAre(6.0, 30.0));
    EXPECT_THAT(*client.AllReduce({rank + 1.0}, shm::ScalarOp::kMax), ::testing::ElementsAre(3.0));
  });
}

TEST(Snapshot, TellsWhatTheJobIsDoing) {
  Cluster cluster(Small(2));
  const absl::StatusOr<Attachment> first = cluster.Attach(0);
  ASSERT_TRUE(first.ok());
  EXPECT_FALSE(first->initialized);
  JobSnapshot snapshot = cluster.runner(0).Snapshot();
  EXPECT_EQ(snapshot.state, core::JobState::kForming);
  EXPECT_THAT(snapshot.reason, ::testing::HasSubstr("rank 1"));
  ASSERT_EQ(snapshot.clients.size(), 1u);
  EXPECT_EQ(snapshot.clients[0].state, "attached");
}

}  // namespace
}  // namespace zerod::engine::testing
