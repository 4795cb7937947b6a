// SPDX-License-Identifier: Apache-2.0
//
// Several members over Gloo: all stages have the same bits, and those of plain loops.
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using core::UnitIndex;

constexpr char kSmallWindow[] =
    "\"stage3_param_persistence_threshold\": 2000, \"stage3_max_live_parameters\": 70000, "
    "\"stage3_prefetch_bucket_size\": 20000";

constexpr core::DType kFp32 = core::DType::kFloat32;
constexpr core::DType kBf16 = core::DType::kBFloat16;
constexpr core::DType kFp16 = core::DType::kFloat16;

// Several pieces where there would be one.
const char kSmallBuckets[] = "\"reduce_bucket_size\": 1, \"allgather_bucket_size\": 1";

struct Case {
  std::string name;
  uint32_t stage;
  core::DType dtype;
  uint32_t members;
  uint32_t local_world;
  bool node_sum;
  uint32_t micro_steps;
  std::string zero_keys;
};

class Members : public ::testing::TestWithParam<Case> {};

TEST_P(Members, TrainAsPlainLoopsDo) {
  const Case& c = GetParam();
  ClusterOptions options;
  options.members = c.members;
  options.local_world = c.local_world;
  options.config = ConfigText(
      c.stage, c.dtype, c.zero_keys,
      absl::StrCat("\"gradient_plan\": \"", c.node_sum ? "node_sum" : "per_rank", "\""));
  options.model = SmallModel(c.dtype, 4, 130);
  Cluster cluster(options);
  Workload workload = DefaultWorkload();
  workload.micro_steps = c.micro_steps;
  workload.hyper.max_norm = 0.5;
  constexpr uint64_t kSteps = 3;
  Reference reference(&cluster.layout(), c.members, c.local_world, c.node_sum);
  std::vector<double> expected_norms;
  for (uint64_t i = 0; i < kSteps; ++i) {
    reference.Step(workload);
    expected_norms.push_back(reference.grad_norm());
  }
  const JobState expected = StateOf(cluster.layout(), reference);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    std::vector<double> norms;
    Train(cluster.layout(), rank, client, workload, kSteps, /*fresh=*/true, &norms);
    EXPECT_EQ(norms, expected_norms);
    // Each member's copies and what each can read of the whole state.
    EXPECT_TRUE(ReadState(cluster.layout(), client) == expected) << "rank " << rank;
    for (UnitIndex u = 0; u < cluster.layout().units().size(); ++u) {
      ASSERT_TRUE(client.Gather(u).ok());
      EXPECT_EQ(client.Values(u), reference.Seen(u)) << "rank " << rank << " unit " << u;
      client.Release(u);
    }
    EXPECT_TRUE(client.Barrier().ok());
    EXPECT_TRUE(client.Detach().ok());
  });
  for (uint32_t m = 0; m < c.members; ++m) {
    EXPECT_TRUE(cluster.WaitForEnd(m).ok());
    EXPECT_GT(cluster.metrics(m).traffic(metrics::Traffic::kSentToMembers), 0u);
    EXPECT_GT(cluster.metrics(m).observed(metrics::Latency::kReduce), 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Grids, Members,
    ::testing::Values(Case{"TwoStage0", 0, kFp32, 2, 1, false, 1, ""},
                      Case{"TwoStage1", 1, kFp32, 2, 1, false, 1, ""},
                      Case{"TwoStage2", 2, kFp32, 2, 1, false, 1, ""},
                      Case{"TwoStage3", 3, kFp32, 2, 1, false, 1, kSmallWindow},
                      Case{"TwoByTwoStage0", 0, kFp32, 2, 2, false, 2, ""},
                      Case{"TwoByTwoStage1", 1, kFp32, 2, 2, false, 2, ""},
                      Case{"TwoByTwoStage3", 3, kFp32, 2, 2, false, 2, kSmallWindow},
                      Case{"TwoByTwoStage3AllFits", 3, kFp32, 2, 2, false, 1, ""},
                      Case{"TwoByTwoNodeSum", 3, kFp32, 2, 2, true, 2, kSmallWindow},
                      Case{"TwoByTwoNodeSumStage0", 0, kFp32, 2, 2, true, 2, ""},
                      Case{"ThreeStage0", 0, kFp32, 3, 1, false, 1, ""},
                      Case{"ThreeStage2", 2, kFp32, 3, 1, false, 1, ""},
                      Case{"ThreeStage3", 3, kFp32, 3, 1, false, 1, kSmallWindow},
                      Case{"SmallBucketsStage0", 0, kFp32, 3, 1, false, 1, kSmallBuckets},
                      Case{"SmallBucketsStage3", 3, kFp32, 3, 1, false, 1, kSmallBuckets},
                      Case{"Bf16Stage0", 0, kBf16, 2, 1, false, 1, ""},
                      Case{"Bf16Stage2", 2, kBf16, 2, 1, false, 1, ""},
                      Case{"Bf16Stage3", 3, kBf16, 2, 1, false, 1, kSmallWindow},
                      Case{"Bf16TwoByTwoNodeSum", 3, kBf16, 2, 2, true, 2, kSmallWindow},
                      Case{"Bf16ThreeStage1", 1, kBf16, 3, 1, false, 2, ""},
                      Case{"Fp16Stage0", 0, kFp16, 2, 1, false, 1, ""},
                      Case{"Fp16Stage3", 3, kFp16, 2, 2, false, 2, kSmallWindow}),
    [](const auto& c) { return c.param.name; });

struct OptimizerCase {
  std::string name;
  core::OptimizerKind first;   // of group 0
  core::OptimizerKind second;  // of group 1
  core::Group group;
};

class EveryOptimizer : public ::testing::TestWithParam<OptimizerCase> {};

TEST_P(EveryOptimizer, TrainsAsPlainLoopsDo) {
  for (const uint32_t members : {1u, 2u}) {
    ClusterOptions options;
    options.members = members;
    options.config = ConfigText(3, kBf16, kSmallWindow);
    options.model = SmallModel(kBf16, 4, 130);
    options.model.groups = {GetParam().first, GetParam().second};
    Cluster cluster(options);
    Workload workload = DefaultWorkload();
    workload.hyper.groups.assign(2, GetParam().group);
    workload.hyper.groups[1].lr *= 0.5;
    if (GetParam().second == core::OptimizerKind::kSgd) {
      workload.hyper.groups[1].momentum = 0;
      workload.hyper.groups[1].nesterov = false;
    }
    constexpr uint64_t kSteps = 3;
    Reference reference(&cluster.layout(), members, 1, /*node_sum=*/false);
    for (uint64_t i = 0; i < kSteps; ++i) reference.Step(workload);
    const JobState expected = StateOf(cluster.layout(), reference);
    cluster.RunClients([&](uint32_t rank, FakeClient& client) {
      Train(cluster.layout(), rank, client, workload, kSteps, /*fresh=*/true);
      EXPECT_TRUE(ReadState(cluster.layout(), client) == expected)
          << members << " members, rank " << rank;
      EXPECT_TRUE(client.Barrier().ok());
    });
  }
}

core::Group SomeGroup() {
  core::Group g;
  g.lr = 0.02;
  g.beta1 = 0.8;
  g.beta2 = 0.95;
  g.eps = 1e-8;
  g.weight_decay = 0.1;
  g.lr_decay = 0.01;
  g.initial_accumulator_value = 0.5;
  return g;
}

core::Group WithMomentum(bool nesterov) {
  core::Group g = SomeGroup();
  g.momentum = 0.9;
  g.dampening = nesterov ? 0 : 0.1;
  g.nesterov = nesterov;
  return g;
}

// With bounds that its ratios do not reach.
core::Group WideLamb() {
  core::Group g = SomeGroup();
  g.min_coeff = 0;
  g.max_coeff = 1e6;
  g.eps_inside_sqrt = true;
  g.bias_correction = false;
  return g;
}

core::Group SomeMuon(bool standard) {
  core::Group g = SomeGroup();
  g.momentum = 0.9;
  g.nesterov = !standard;
  g.standard_newton_schulz = standard;
  return g;
}

core::Group SomeRmsProp(bool momentum, bool centered) {
  core::Group g = SomeGroup();
  g.alpha = 0.9;
  g.momentum = momentum ? 0.8 : 0;
  g.centered = centered;
  return g;
}

core::Group SomeAsgd() {
  core::Group g = SomeGroup();
  g.lambd = 0.1;
  g.alpha = 0.5;
  g.t0 = 0;
  g.lr_before = 0.03;
  return g;
}

core::Group PlainAdam() {
  core::Group g = SomeGroup();
  g.decoupled = false;
  g.bias_correction = false;
  return g;
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, EveryOptimizer,
    ::testing::Values(
        OptimizerCase{"Adam", core::OptimizerKind::kAdam, core::OptimizerKind::kAdam, PlainAdam()},
        OptimizerCase{"Lion", core::OptimizerKind::kLion, core::OptimizerKind::kLion, SomeGroup()},
        OptimizerCase{"Adagrad", core::OptimizerKind::kAdagrad, core::OptimizerKind::kAdagrad,
                      SomeGroup()},
        OptimizerCase{"Sgd", core::OptimizerKind::kSgd, core::OptimizerKind::kSgd, SomeGroup()},
        OptimizerCase{"SgdMomentum", core::OptimizerKind::kSgdMomentum,
                      core::OptimizerKind::kSgd, WithMomentum(false)},
        OptimizerCase{"Lamb", core::OptimizerKind::kLamb, core::OptimizerKind::kLamb, SomeGroup()},
        OptimizerCase{"LambAndLion", core::OptimizerKind::kLamb, core::OptimizerKind::kLion,
                      WideLamb()},
        OptimizerCase{"AdamAndLamb", core::OptimizerKind::kAdam, core::OptimizerKind::kLamb,
                      WideLamb()},
        OptimizerCase{"Muon", core::OptimizerKind::kMuon, core::OptimizerKind::kSgd,
                      SomeMuon(/*standard=*/false)},
        OptimizerCase{"RmsProp", core::OptimizerKind::kRmsProp, core::OptimizerKind::kSgd,
                      SomeRmsProp(false, false)},
        OptimizerCase{"RmsPropMomentum", core::OptimizerKind::kRmsPropMomentum,
                      core::OptimizerKind::kAdamax, SomeRmsProp(true, false)},
        OptimizerCase{"RmsPropCentered", core::OptimizerKind::kRmsPropCentered,
                      core::OptimizerKind::kRmsPropCentered, SomeRmsProp(false, true)},
        OptimizerCase{"RmsPropAll", core::OptimizerKind::kRmsPropCenteredMomentum,
                      core::OptimizerKind::kLion, SomeRmsProp(true, true)},
        OptimizerCase{"Adadelta", core::OptimizerKind::kAdadelta, core::OptimizerKind::kAdadelta,
                      SomeGroup()},
        OptimizerCase{"NAdam", core::OptimizerKind::kNAdam, core::OptimizerKind::kNAdam,
                      PlainAdam()},
        OptimizerCase{"RAdam", core::OptimizerKind::kRAdam, core::OptimizerKind::kRAdam,
                      SomeGroup()},
        OptimizerCase{"Asgd", core::OptimizerKind::kAsgd, core::OptimizerKind::kAsgd, SomeAsgd()},
        OptimizerCase{"Rprop", core::OptimizerKind::kRprop, core::OptimizerKind::kAdam,
                      SomeGroup()},
        OptimizerCase{"Nesterov", core::OptimizerKind::kSgdMomentum,
                      core::OptimizerKind::kSgdMomentum, WithMomentum(true)}),
    [](const auto& c) { return c.param.name; });

// What needs whole tensors, with another part of the job on each member, or all of it on each.
class WholeTensors : public ::testing::TestWithParam<OptimizerCase> {};

TEST_P(WholeTensors, HaveTheSameBitsAtEveryStage) {
  for (const uint32_t members : {1u, 2u, 3u}) {
    std::optional<JobState> expected;
    for (const uint32_t stage : {0u, 1u, 2u, 3u}) {
      ClusterOptions options;
      options.members = members;
      options.local_world = members == 1 ? 2 : 1;
      options.config = ConfigText(stage, kFp32, stage == 3 ? kSmallWindow : "");
      options.model = SmallModel(kFp32, 4, 130);
      options.model.groups = {GetParam().first, GetParam().second};
      Cluster cluster(options);
      Workload workload = DefaultWorkload();
      workload.hyper.max_norm = 0.5;
      workload.hyper.groups.assign(2, GetParam().group);
      constexpr uint64_t kSteps = 3;
      if (!expected.has_value()) {
        Reference reference(&cluster.layout(), members, options.local_world, /*node_sum=*/false);
        for (uint64_t i = 0; i < kSteps; ++i) reference.Step(workload);
        expected = StateOf(cluster.layout(), reference);
      }
      cluster.RunClients([&](uint32_t rank, FakeClient& client) {
        Train(cluster.layout(), rank, client, workload, kSteps, /*fresh=*/true);
        EXPECT_TRUE(ReadState(cluster.layout(), client) == *expected)
            << members << " members, stage " << stage << ", rank " << rank;
        EXPECT_TRUE(client.Barrier().ok());
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, WholeTensors,
    ::testing::Values(OptimizerCase{"Lamb", core::OptimizerKind::kLamb, core::OptimizerKind::kLamb,
                                    WideLamb()},
                      OptimizerCase{"Muon", core::OptimizerKind::kMuon, core::OptimizerKind::kAdam,
                                    SomeMuon(/*standard=*/false)},
                      OptimizerCase{"MuonStandard", core::OptimizerKind::kMuon,
                                    core::OptimizerKind::kLamb, SomeMuon(/*standard=*/true)}),
    [](const auto& c) { return c.param.name; });

TEST(SeveralMembers, RoundsAddUpAtTheOwners) {
  for (uint32_t stage : {0u, 3u}) {
    ClusterOptions options;
    options.members = 2;
    options.config = ConfigText(stage, kFp32);
    options.model = SmallModel(core::DType::kFloat32, 2, 60);
    Cluster cluster(options);
    std::vector<JobState> states(2);
    cluster.RunClients([&](uint32_t rank, FakeClient& client) {
      Workload workload = DefaultWorkload();
      workload.skip_some = false;
      EXPECT_TRUE(client.Barrier().ok());
      if (rank == 0) PutInitial(cluster.layout(), client);
      EXPECT_TRUE(client.Barrier().ok());
      EXPECT_TRUE(Backward(cluster.layout(), rank, client, workload).ok());
      if (rank == 0) {  // the other rank's part of this round is nothing
        const core::Parameter& p = cluster.layout().parameters()[0];
        EXPECT_TRUE(client.Reclaim(p.unit).ok());
        client.Land(0, std::vector<float>(p.elements, 4.0f));
        EXPECT_TRUE(client.Scatter(p.unit, true).ok());
      }
      EXPECT_TRUE(client.Step({workload.hyper, ""}).ok());
      // After one step, m = (1 - beta1) * mean gradient.
      const core::Parameter& p = cluster.layout().parameters()[0];
      const std::vector<float> initial = InitialValues(cluster.layout(), p.unit);
      const auto m = client.Read(p.unit, p.offset, p.elements, shm::StateKind::kExpAvg);
      ASSERT_TRUE(m.ok()) << m.status();
      const auto first = Gradient(cluster.layout(), 0, initial, 1, 0, 0);
      const auto second = Gradient(cluster.layout(), 0, initial, 1, 1, 0);
      for (uint64_t i = 0; i < p.elements; ++i) {
        EXPECT_NEAR((*m)[i], 0.1 * (first[i] + second[i] + 4.0) / 2, 1e-5);
      }
      EXPECT_TRUE(client.Barrier().ok());
    });
  }
}

TEST(SeveralMembers, AMemberThatIsLostEndsTheJobEverywhere) {
  ClusterOptions options;
  options.members = 2;
  options.config = ConfigText(2, kFp32);
  options.model = SmallModel(core::DType::kFloat32, 2, 30);
  Cluster cluster(options);
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    Train(cluster.layout(), rank, client, DefaultWorkload(), 1, /*fresh=*/true);
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 0) {
      cluster.runner(0).PeerDown(1, absl::UnavailableError("its lease ran out"));
    }
    const absl::Status failed = client.WaitForFailure();
    EXPECT_THAT(std::string(failed.message()), ::testing::HasSubstr("lost the shards of member 1"));
  });
  for (uint32_t m = 0; m < 2; ++m) {
    EXPECT_EQ(cluster.WaitForEnd(m).code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST(SeveralMembers, ADeadClientOnOneNodeAbortsAllAndTrainingResumes) {
  ClusterOptions options;
  options.members = 2;
  options.config = ConfigText(3, kFp32, kSmallWindow);
  options.model = SmallModel(core::DType::kFloat32, 4, 130);
  Cluster cluster(options);
  const Workload workload = DefaultWorkload();
  Reference reference(&cluster.layout(), 2, 1, false);
  for (int i = 0; i < 3; ++i) reference.Step(workload);
  for (int life = 0; life < 2; ++life) {
    Sleeper processes[2];
    std::unique_ptr<FakeClient> clients[2];
    for (uint32_t rank = 0; rank < 2; ++rank) {
      const absl::Time deadline = absl::Now() + absl::Minutes(1);
      absl::StatusOr<Attachment> attachment;
      do {
        attachment = cluster.Attach(rank, &processes[rank]);
      } while (!attachment.ok() && absl::Now() < deadline);
      ASSERT_TRUE(attachment.ok()) << attachment.status();
      EXPECT_EQ(attachment->committed_step, life == 0 ? 0u : 2u);
      clients[rank] = cluster.Client(rank, *attachment);
    }
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        Train(cluster.layout(), rank, *clients[rank], workload, life == 0 ? 2 : 1, life == 0);
        if (life == 1) {
          EXPECT_TRUE(ReadState(cluster.layout(), *clients[rank]) ==
                      StateOf(cluster.layout(), reference));
          EXPECT_TRUE(clients[rank]->Barrier().ok());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (life == 1) break;
    processes[1].Kill();
    EXPECT_EQ(clients[0]->WaitForFailure().code(), absl::StatusCode::kAborted);
  }
}

}  // namespace
}  // namespace zerod::engine::testing
