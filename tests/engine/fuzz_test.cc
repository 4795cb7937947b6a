// SPDX-License-Identifier: Apache-2.0
//
// Requests that no client library sends, drawn at random with fields that are mostly possible, so
// that they get behind the checks of single entries. Their job may fail its clients as often as it
// likes; it must not fail itself, and another job's training must not notice.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

constexpr uint32_t kRanks = 2;

ClusterOptions Small(const std::string& zerod_keys) {
  ClusterOptions options;
  options.local_world = kRanks;
  options.config = ConfigText(2, core::DType::kFloat32, "", zerod_keys);
  options.model = SmallModel(core::DType::kFloat32, 2, 30);
  return options;
}

class RandomRequests {
 public:
  RandomRequests(const core::Layout* layout, const core::JobPlan* plan, uint64_t seed)
      : layout_(*layout), plan_(*plan), random_(seed) {}

  // `step`: the one under way, as far as its client knows.
  shm::SubmitEntry Next(uint64_t step) {
    shm::SubmitEntry entry{};
    // A DETACH for good ends the sequence of generations: it is rarer than the others.
    entry.op = static_cast<shm::Op>(One(2000) ? Below(20) : 1 + Below(13));
    if (entry.op == shm::Op::kDetach && !One(40)) entry.op = shm::Op::kStep;
    const auto units = static_cast<uint32_t>(layout_.units().size());
    entry.unit = static_cast<uint32_t>(One(2000) ? Anything() : Below(units));
    entry.step = One(20) ? step + Below(3) - 1 : One(500) ? Anything() : step;
    entry.cookie = One(2000) ? Below(3) : next_cookie_++;
    SetArguments(&entry);
    return entry;
  }

  // What requests speak of: `bytes` anywhere in an area that the client may write.
  void Scribble(std::byte* area, uint64_t area_bytes, uint64_t bytes) {
    const uint64_t begin = Below(area_bytes - std::min(bytes, area_bytes) + 1);
    for (uint64_t i = begin; i < std::min(begin + bytes, area_bytes); ++i) {
      area[i] = static_cast<std::byte>(One(2) ? Below(2) : Below(256));
    }
  }

  bool One(uint64_t in) { return Below(in) == 0; }
  uint64_t Below(uint64_t n) { return random_() % n; }

 private:
  uint64_t Anything() {
    return One(2) ? random_() : std::numeric_limits<uint64_t>::max() - Below(4);
  }

  void SetArguments(shm::SubmitEntry* entry) {
    const core::Unit& unit = layout_.units()[entry->unit % layout_.units().size()];
    const uint64_t elements =
        plan_.node_sum ? core::StagedPart(unit, plan_.staged_part_elements, 0).size() : 0;
    const uint64_t staged =
        shm::StagedHeaderBytes(unit.parameters.size()) + elements * sizeof(float);
    const uint64_t places = plan_.gradient_file_bytes < staged
                                ? 1
                                : (plan_.gradient_file_bytes - staged) / shm::kStagedAlignBytes + 1;
    switch (entry->op) {
      case shm::Op::kScatter:
        entry->flags = static_cast<uint16_t>(Below(2));
        entry->arg0 = Below(places) * shm::kStagedAlignBytes;
        if (plan_.node_sum) {
          entry->arg1 = Below(core::StagedParts(unit, plan_.staged_part_elements) + One(8));
        }
        // node_sum answers it, per_rank need not.
        if (!plan_.node_sum && !One(3)) entry->cookie = 0;
        break;
      case shm::Op::kPut:
      case shm::Op::kRead:
        entry->flags = static_cast<uint16_t>(Below(5));
        entry->arg0 = Below(unit.elements);
        entry->arg1 = 1 + Below(unit.elements - entry->arg0);
        break;
      case shm::Op::kScalar:
        entry->arg0 = Below(3);
        entry->flags = static_cast<uint16_t>(Below(4));
        break;
      case shm::Op::kReadProgress:
      case shm::Op::kRestore:
        entry->arg0 = layout_.parameters().size();
        break;
      case shm::Op::kStep:
        entry->arg0 = Below(100);
        break;
      default:
        break;
    }
    if (One(2000)) entry->flags = static_cast<uint16_t>(random_());
    if (One(2000)) entry->arg0 = Anything();
    if (One(2000)) entry->arg1 = Anything();
  }

  const core::Layout& layout_;
  const core::JobPlan& plan_;
  std::mt19937_64 random_;
  uint64_t next_cookie_ = 1;
};

struct Counts {
  uint64_t pushed = 0;
  uint64_t answered = 0;
  uint64_t refused = 0;  // of these, with an error
  uint64_t steps = 0;
  uint64_t generations = 0;
  uint64_t jobs = 0;
};

// A client of which nobody knows what it does.
class RandomClient {
 public:
  RandomClient(std::unique_ptr<FakeClient> client, const core::JobPlan& plan)
      : client_(std::move(client)), plan_(plan), step_(client_->step()) {
    StepRecord(1e-3);
  }

  enum class State { kAttached, kFailed, kLeft };
  // One request more, or what there is of answers where the ring is full.
  State Turn(RandomRequests* random, Counts* counts) {
    if (random->One(4)) random->Scribble(client_->gradients(), plan_.gradient_file_bytes, 200);
    if (random->One(4)) random->Scribble(client_->transfer(), plan_.transfer_values_bytes, 4000);
    if (random->One(200)) StepRecord(random->One(8) ? 2e-3 : 1e-3);
    const shm::SubmitEntry entry = random->Next(step_);
    const absl::Status pushed = client_->Push(entry);
    if (pushed.ok()) {
      ++counts->pushed;
      if (entry.op == shm::Op::kDetach) detaches_.insert(entry.cookie);
    }
    while (const std::optional<shm::CompleteEntry> answer = client_->TryPop()) {
      ++counts->answered;
      counts->refused += answer->code != 0 ? 1 : 0;
      // Its ring is not looked at any more.
      if (answer->code == 0 && detaches_.count(answer->cookie) > 0) return State::kLeft;
    }
    if (!client_->Failure().ok()) return State::kFailed;
    EXPECT_TRUE(pushed.ok() || absl::IsResourceExhausted(pushed)) << pushed;
    if (!pushed.ok()) std::this_thread::yield();
    return State::kAttached;
  }
  void set_step(uint64_t step) { step_ = step; }

 private:
  void StepRecord(double lr) {
    shm::StepRecord& record = client_->submit()->step;
    memset(&record, 0, sizeof(record));
    record.loss_scale = 1;
    record.groups = static_cast<uint32_t>(DefaultWorkload().hyper.groups.size());
    for (uint32_t i = 0; i < record.groups; ++i) {
      shm::GroupRecord& group = record.group[i];
      group.lr = lr;
      group.beta1 = 0.9;
      group.beta2 = 0.999;
      group.eps = 1e-8;
      group.flags = shm::kDecoupled | shm::kBiasCorrection;
    }
  }

  const std::unique_ptr<FakeClient> client_;
  const core::JobPlan& plan_;
  uint64_t step_;
  std::set<uint64_t> detaches_;
};

// Waits for the predecessor's death to be seen. Null: the job ended, as one does that all its
// clients leave.
std::unique_ptr<RandomClient> Attach(Cluster* cluster, uint32_t rank, const Sleeper* process) {
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  for (;;) {
    const absl::StatusOr<Attachment> attachment = cluster->Attach(rank, process);
    if (attachment.ok()) {
      return std::make_unique<RandomClient>(cluster->Client(rank, *attachment),
                                            cluster->runner(0).plan());
    }
    const JobSnapshot now = cluster->runner(0).Snapshot();
    EXPECT_NE(now.state, core::JobState::kFailed) << now.reason;
    const bool later = absl::IsUnavailable(attachment.status()) ||
                       absl::IsAlreadyExists(attachment.status());
    if (now.state == core::JobState::kEnded || now.state == core::JobState::kFailed) return nullptr;
    EXPECT_TRUE(later) << attachment.status();
    if (!later || absl::Now() > deadline) return nullptr;
    std::this_thread::yield();
  }
}

// From the attachment of all ranks to the first that was failed, or the last that left. False: the
// job is over.
bool RunGeneration(Cluster* cluster, RandomRequests* random, uint64_t requests, Counts* counts) {
  std::vector<std::unique_ptr<Sleeper>> processes;
  std::vector<std::unique_ptr<RandomClient>> clients;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    processes.push_back(std::make_unique<Sleeper>());
    clients.push_back(Attach(cluster, rank, processes.back().get()));
    if (clients.back() == nullptr) return false;
  }
  ++counts->generations;
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  while (!clients.empty() && counts->pushed < requests) {
    const uint64_t i = random->Below(clients.size());
    const RandomClient::State state = clients[i]->Turn(random, counts);
    if (state == RandomClient::State::kFailed) return true;
    if (state == RandomClient::State::kLeft) {
      clients.erase(clients.begin() + i);
      processes.erase(processes.begin() + i);
      continue;
    }
    if (random->One(16)) {
      const JobSnapshot now = cluster->runner(0).Snapshot();
      for (auto& client : clients) client->set_step(now.committed_step + 1);
      counts->steps = std::max(counts->steps, now.committed_step);
    }
    if (random->One(2000)) return true;  // they die with their requests in flight
    if (absl::Now() > deadline) {
      ADD_FAILURE() << "nothing is taken from the rings any more";
      return false;
    }
  }
  return true;
}

class FuzzTest : public ::testing::TestWithParam<const char*> {};

TEST_P(FuzzTest, NothingThatClientsSendConcernsAnotherJob) {
  constexpr uint64_t kRequests = 30'000;
  constexpr int kSteps = 8;
  Cluster trained(Small(absl::StrCat("\"gradient_plan\": \"", GetParam(), "\"")));
  const bool node_sum = trained.runner(0).plan().node_sum;
  ASSERT_EQ(node_sum, std::string(GetParam()) == "node_sum");
  const Workload workload = DefaultWorkload();
  JobState state;
  std::thread training([&] {
    trained.RunClients([&](uint32_t rank, FakeClient& client) {
      Train(trained.layout(), rank, client, workload, kSteps, /*fresh=*/true);
      EXPECT_TRUE(client.Barrier().ok());
      if (rank == 0) state = ReadState(trained.layout(), client);
      EXPECT_TRUE(client.Barrier().ok());
    });
  });
  Counts counts;
  for (; counts.pushed < kRequests && !HasFailure(); ++counts.jobs) {
    Cluster fuzzed(trained.options());
    RandomRequests random(&fuzzed.layout(), &fuzzed.runner(0).plan(), counts.jobs + 1);
    while (counts.pushed < kRequests && RunGeneration(&fuzzed, &random, kRequests, &counts)) {
    }
    EXPECT_NE(fuzzed.runner(0).Snapshot().state, core::JobState::kFailed)
        << fuzzed.runner(0).Snapshot().reason;
  }
  training.join();
  Reference reference(&trained.layout(), 1, kRanks, node_sum);
  for (int i = 0; i < kSteps; ++i) reference.Step(workload);
  EXPECT_TRUE(state == StateOf(trained.layout(), reference));
  std::cout << counts.pushed << " requests, " << counts.answered << " answers (" << counts.refused
            << " errors), " << counts.steps << " steps, " << counts.generations
            << " generations, " << counts.jobs << " jobs\n";
  // Else the requests stop at the first check, or nothing is ever refused.
  EXPECT_GT(counts.answered - counts.refused, kRequests / 20);
  EXPECT_GT(counts.refused, 0u);
  EXPECT_GT(counts.steps, 0u);
}

INSTANTIATE_TEST_SUITE_P(Plans, FuzzTest, ::testing::Values("per_rank", "node_sum"),
                         [](const auto& c) { return std::string(c.param); });

}  // namespace
}  // namespace zerod::engine::testing
