// SPDX-License-Identifier: Apache-2.0
//
// Clients that die, lie or never come, and what is left behind: nothing.
#include <dirent.h>

#include <algorithm>
#include <limits>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/engine/cluster.h"
#include "tests/engine/reference.h"

namespace zerod::engine::testing {
namespace {

using ::testing::HasSubstr;
using core::UnitIndex;

ClusterOptions Small(uint32_t clients, const std::string& zerod_keys = "") {
  ClusterOptions options;
  options.local_world = clients;
  options.config = ConfigText(2, core::DType::kFloat32, "", zerod_keys);
  options.model = SmallModel(core::DType::kFloat32, 2, 30);
  return options;
}

std::vector<std::unique_ptr<FakeClient>> AttachAll(
    Cluster* cluster, const std::vector<std::unique_ptr<Sleeper>>& processes,
    std::vector<Attachment>* attachments = nullptr) {
  std::vector<std::unique_ptr<FakeClient>> clients;
  for (uint32_t rank = 0; rank < cluster->world(); ++rank) {
    absl::StatusOr<Attachment> attachment = cluster->Attach(rank, processes[rank].get());
    EXPECT_TRUE(attachment.ok()) << attachment.status();
    clients.push_back(cluster->Client(rank, *attachment));
    if (attachments != nullptr) attachments->push_back(*attachment);
  }
  return clients;
}

std::vector<std::unique_ptr<Sleeper>> MakeProcesses(uint32_t count) {
  std::vector<std::unique_ptr<Sleeper>> processes;
  for (uint32_t i = 0; i < count; ++i) processes.push_back(std::make_unique<Sleeper>());
  return processes;
}

void OnEach(const std::vector<std::unique_ptr<FakeClient>>& clients,
            const std::function<void(uint32_t, FakeClient&)>& body) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < clients.size(); ++rank) {
    threads.emplace_back([&, rank] { body(rank, *clients[rank]); });
  }
  for (std::thread& thread : threads) thread.join();
}

// Attaches when the predecessor's death has been seen.
absl::StatusOr<Attachment> AttachAgain(Cluster* cluster, uint32_t rank, const Sleeper* process) {
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  for (;;) {
    absl::StatusOr<Attachment> attachment = cluster->Attach(rank, process);
    const bool later = absl::IsUnavailable(attachment.status()) ||
                       absl::IsAlreadyExists(attachment.status());
    if (!later || absl::Now() > deadline) return attachment;
    std::this_thread::yield();
  }
}

TEST(ClientDeath, LosesNothingThatWasCommitted) {
  Cluster cluster(Small(2));
  auto processes = MakeProcesses(2);
  auto clients = AttachAll(&cluster, processes);
  Workload workload = DefaultWorkload();
  Reference reference(&cluster.layout(), 1, 2, false);
  for (int i = 0; i < 5; ++i) reference.Step(workload);
  OnEach(clients, [&](uint32_t rank, FakeClient& client) {
    Train(cluster.layout(), rank, client, workload, 3, /*fresh=*/true);
    // The fourth step ends in the middle: one rank has handed over everything, one half.
    EXPECT_TRUE(client.Gather(0).ok());
    client.Land(0, std::vector<float>(cluster.layout().parameters()[0].elements, 7.0f));
    if (rank == 0) {
      EXPECT_TRUE(client.Scatter(0, true).ok());
    }
  });
  EXPECT_EQ(cluster.Attach(1, processes[0].get()).status().code(),
            absl::StatusCode::kAlreadyExists);
  const int victim = processes[1]->pid();
  processes[1]->Kill();
  const absl::Status aborted = clients[0]->WaitForFailure();
  EXPECT_EQ(aborted.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(aborted.message()),
              HasSubstr(absl::StrCat("process ", victim, " died")));
  EXPECT_EQ(cluster.metrics(0).deaths(), 1u);
  // The survivor's process lives: its rank is taken until it ends.
  const absl::Status taken = cluster.Attach(0, processes[0].get()).status();
  EXPECT_EQ(taken.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(taken.message()), HasSubstr(absl::StrCat(processes[0]->pid())));
  processes[0]->Kill();

  processes = MakeProcesses(2);
  clients.clear();
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const absl::StatusOr<Attachment> attachment =
        AttachAgain(&cluster, rank, processes[rank].get());
    ASSERT_TRUE(attachment.ok()) << attachment.status();
    EXPECT_EQ(attachment->generation, 2u);
    EXPECT_EQ(attachment->committed_step, 3u);
    EXPECT_TRUE(attachment->initialized);
    const auto blob = cluster.runner(0).CommittedBlob(rank);
    ASSERT_TRUE(blob.ok()) << blob.status();
    EXPECT_EQ(blob->first, 3u);
    EXPECT_EQ(blob->second, "rank state");
    clients.push_back(cluster.Client(rank, *attachment));
  }
  OnEach(clients, [&](uint32_t rank, FakeClient& client) {
    Train(cluster.layout(), rank, client, workload, 2, /*fresh=*/false);
    if (rank == 0) {
      EXPECT_TRUE(ReadState(cluster.layout(), client) == StateOf(cluster.layout(), reference));
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(ClientDeath, OfWhoDetachedBeforeTheStartIsNotItsSuccessors) {
  Cluster cluster(Small(2));
  auto processes = MakeProcesses(3);
  absl::StatusOr<Attachment> attachment = cluster.Attach(0, processes[0].get());
  ASSERT_TRUE(attachment.ok()) << attachment.status();
  EXPECT_TRUE(cluster.Client(0, *attachment)->Detach().ok());
  std::vector<std::unique_ptr<FakeClient>> clients;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    attachment = cluster.Attach(rank, processes[rank + 1].get());
    ASSERT_TRUE(attachment.ok()) << attachment.status();
    clients.push_back(cluster.Client(rank, *attachment));
  }
  processes[0]->Kill();
  for (int i = 0; i < 3; ++i) {
    OnEach(clients, [&](uint32_t, FakeClient& client) { EXPECT_TRUE(client.Barrier().ok()); });
  }
  EXPECT_EQ(cluster.metrics(0).deaths(), 0u);
}

TEST(ClientDeath, UnderNodeSumLosesNothingEither) {
  Cluster cluster(Small(2, "\"gradient_plan\": \"node_sum\""));
  auto processes = MakeProcesses(2);
  auto clients = AttachAll(&cluster, processes);
  Workload workload = DefaultWorkload();
  Reference reference(&cluster.layout(), 1, 2, true);
  for (int i = 0; i < 2; ++i) reference.Step(workload);
  OnEach(clients, [&](uint32_t rank, FakeClient& client) {
    Train(cluster.layout(), rank, client, workload, 1, /*fresh=*/true);
    client.set_makes_room();
    // Rank 0's goes into the accumulator, rank 1's waits for rank 0 outside of its staging.
    const core::Parameter& p = cluster.layout().parameters()[rank];
    client.Land(rank, std::vector<float>(p.elements, 7.0f));
    EXPECT_TRUE(client.Scatter(p.unit, true).ok());
  });
  ASSERT_NE(cluster.layout().parameters()[0].unit, cluster.layout().parameters()[1].unit);
  EXPECT_GT(cluster.metrics(0).memory("set_aside"), 0u);
  for (auto& process : processes) process->Kill();
  processes = MakeProcesses(2);
  clients.clear();
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto attachment = AttachAgain(&cluster, rank, processes[rank].get());
    ASSERT_TRUE(attachment.ok()) << attachment.status();
    clients.push_back(cluster.Client(rank, *attachment));
  }
  EXPECT_EQ(cluster.metrics(0).memory("set_aside"), 0u);
  OnEach(clients, [&](uint32_t rank, FakeClient& client) {
    Train(cluster.layout(), rank, client, workload, 1, /*fresh=*/false);
    if (rank == 0) {
      EXPECT_TRUE(ReadState(cluster.layout(), client) == StateOf(cluster.layout(), reference));
    }
    EXPECT_TRUE(client.Barrier().ok());
  });
}

TEST(ClientDeath, BeforeTheWeightsWereGivenLeavesTheJobWithoutThem) {
  Cluster cluster(Small(1));
  auto processes = MakeProcesses(1);
  auto clients = AttachAll(&cluster, processes);
  EXPECT_TRUE(clients[0]->Barrier().ok());
  EXPECT_TRUE(clients[0]->Put(0, 0, InitialValues(cluster.layout(), 0)).ok());
  processes[0]->Kill();
  Sleeper second;
  const auto attachment = AttachAgain(&cluster, 0, &second);
  ASSERT_TRUE(attachment.ok()) << attachment.status();
  EXPECT_FALSE(attachment->initialized);
  auto client = cluster.Client(0, *attachment);
  EXPECT_TRUE(client->Barrier().ok());
  PutInitial(cluster.layout(), *client);
  second.Kill();
  Sleeper third;
  const auto again = AttachAgain(&cluster, 0, &third);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->initialized);
}

// --- Entries that no client library sends ------------------------------------------------------

struct Garbage {
  std::string name;
  std::function<void(FakeClient&)> send;
  std::string text;
};
shm::SubmitEntry Entry(shm::Op op, uint32_t unit, uint64_t arg0 = 0, uint64_t arg1 = 0) {
  shm::SubmitEntry entry{};
  entry.op = op;
  entry.unit = unit;
  entry.step = 1;
  entry.arg0 = arg0;
  entry.arg1 = arg1;
  entry.cookie = 77;
  return entry;
}
std::function<void(FakeClient&)> Sends(shm::SubmitEntry entry) {
  return [entry](FakeClient& client) { EXPECT_TRUE(client.Push(entry).ok()); };
}

const uint64_t kHuge = std::numeric_limits<uint64_t>::max();

std::vector<Garbage> AllGarbage() {
  shm::SubmitEntry no_cookie = Entry(shm::Op::kGather, 0);
  no_cookie.cookie = 0;
  shm::SubmitEntry flags = Entry(shm::Op::kScatter, 0);
  flags.flags = 0x80;
  shm::SubmitEntry kind = Entry(shm::Op::kRead, 0, 0, 1);
  kind.flags = 9;
  shm::SubmitEntry put_kind = Entry(shm::Op::kPut, 0, 0, 1);
  put_kind.flags = 5;
  shm::SubmitEntry no_answer = Entry(shm::Op::kRestore, 0, 1);
  no_answer.cookie = 0;
  shm::SubmitEntry op = Entry(shm::Op::kScalar, 0, 1);
  op.flags = 200;
  return {
      {"UnknownOp", Sends(Entry(static_cast<shm::Op>(999), 0)), "no request 999"},
      {"ZeroedEntry", Sends(Entry(shm::Op::kNone, 0)), "no request 0"},
      {"UnitOutOfRange", Sends(Entry(shm::Op::kGather, 1000000)), "no unit 1000000"},
      {"ReleaseOutOfRange", Sends(Entry(shm::Op::kRelease, 0xffffffff)), "no unit"},
      {"NoCookie", Sends(no_cookie), "without a cookie"},
      {"ScatterFlags", Sends(flags), "SCATTER with flags"},
      {"PutBehindTheUnit", Sends(Entry(shm::Op::kPut, 0, kHuge - 1, 4)), "of unit 0"},
      {"PutCountOverflows", Sends(Entry(shm::Op::kPut, 0, 1, kHuge)), "of unit 0"},
      {"ReadKind", Sends(kind), "state of kind 9"},
      {"PutKind", Sends(put_kind), "state of kind 5"},
      {"RestoreOfTooMany", Sends(Entry(shm::Op::kRestore, 0, kHuge)), "the layout has"},
      {"RestoreOfNone", Sends(Entry(shm::Op::kRestore, 0, 0)), "the layout has"},
      {"RestoreWithoutACookie", Sends(no_answer), "without a cookie"},
      {"ReadProgressOfTooMany", Sends(Entry(shm::Op::kReadProgress, 0, 1u << 20)),
       "the layout has"},
      {"ScalarCount", Sends(Entry(shm::Op::kScalar, 0, 65)), "SCALAR of 65"},
      {"ScalarOp", Sends(op), "operation 200"},
      {"StepBlob", Sends(Entry(shm::Op::kStep, 0, kHuge)), "client state"},
      {"StepGroups",
       [](FakeClient& client) {
         client.submit()->step.groups = 1u << 31;
         EXPECT_TRUE(client.Push(Entry(shm::Op::kStep, 0)).ok());
       },
       "parameter groups"},
      {"StepNan",
       [](FakeClient& client) {
         client.submit()->step.groups = 1;
         client.submit()->step.loss_scale = std::numeric_limits<double>::quiet_NaN();
         EXPECT_TRUE(client.Push(Entry(shm::Op::kStep, 0)).ok());
       },
       "hyper-parameters"},
      {"CookieTwice",
       [](FakeClient& client) {  // the other rank never sends its scalar
         EXPECT_TRUE(client.Push(Entry(shm::Op::kScalar, 0, 1)).ok());
         EXPECT_TRUE(client.Push(Entry(shm::Op::kScalar, 0, 1)).ok());
       },
       "two requests"},
      {"TailOutOfReach",
       [](FakeClient& client) {
         client.submit()->tail.fetch_add(100000);
         client.RingDoorbell();
       },
       "tail"},
  };
}

class GarbageTest : public ::testing::TestWithParam<Garbage> {};

TEST_P(GarbageTest, EndsTheAttachmentOfItsSenderAlone) {
  Cluster cluster(Small(2));
  auto processes = MakeProcesses(2);
  auto clients = AttachAll(&cluster, processes);
  OnEach(clients, [](uint32_t, FakeClient& client) { EXPECT_TRUE(client.Barrier().ok()); });
  GetParam().send(*clients[1]);
  const absl::Status failed = clients[1]->WaitForFailure();
  EXPECT_EQ(failed.code(), absl::StatusCode::kInvalidArgument) << failed;
  EXPECT_THAT(std::string(failed.message()), HasSubstr(GetParam().text));
  // The other rank did nothing wrong: it is told to attach anew, and the job goes on.
  EXPECT_EQ(clients[0]->WaitForFailure().code(), absl::StatusCode::kAborted);
  for (auto& process : processes) process->Kill();
  processes = MakeProcesses(2);
  clients.clear();
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto attachment = AttachAgain(&cluster, rank, processes[rank].get());
    ASSERT_TRUE(attachment.ok()) << attachment.status();
    clients.push_back(cluster.Client(rank, *attachment));
  }
  OnEach(clients, [](uint32_t, FakeClient& client) { EXPECT_TRUE(client.Barrier().ok()); });
}

INSTANTIATE_TEST_SUITE_P(Entries, GarbageTest, ::testing::ValuesIn(AllGarbage()),
                         [](const auto& c) { return c.param.name; });

TEST(Garbage, AStagedGradientMustLieInItsFile) {
  for (uint64_t offset : {uint64_t{1}, kHuge - 63, uint64_t{1} << 40}) {
    Cluster cluster(Small(1, "\"gradient_plan\": \"node_sum\""));
    auto processes = MakeProcesses(1);
    auto clients = AttachAll(&cluster, processes);
    EXPECT_TRUE(clients[0]->Barrier().ok());
    EXPECT_TRUE(clients[0]->Push(Entry(shm::Op::kScatter, 0, offset)).ok());
    EXPECT_EQ(clients[0]->WaitForFailure().code(), absl::StatusCode::kInvalidArgument);
  }
}

// Two gradients of one unit at one place in staging, of which the first says that it is small: what
// is set aside for it must not be measured by one and copied by the other.
TEST(Garbage, TwoGradientsAtOnePlaceAreEachWhatTheirRequestSays) {
  ClusterOptions options = Small(2, "\"gradient_plan\": \"node_sum\"");
  options.model = SmallModel(core::DType::kFloat32, 2, 300);
  Cluster cluster(options);
  auto processes = MakeProcesses(2);
  auto clients = AttachAll(&cluster, processes);
  OnEach(clients, [](uint32_t, FakeClient& client) { EXPECT_TRUE(client.Barrier().ok()); });
  const auto& units = cluster.layout().units();
  const auto large = std::max_element(
      units.begin(), units.end(),
      [](const auto& a, const auto& b) { return a.parameters.size() < b.parameters.size(); });
  const auto u = static_cast<UnitIndex>(large - units.begin());
  const size_t parameters = large->parameters.size();
  ASSERT_GT(parameters, 1u);
  FakeClient& client = *clients[1];
  // A request is handled before the next is taken.
  const auto settle = [&] {
    EXPECT_TRUE(client.Push(Entry(shm::Op::kRelease, u)).ok());
    const absl::Time deadline = absl::Now() + absl::Minutes(1);
    while (!client.AllTaken() && absl::Now() < deadline) std::this_thread::yield();
    ASSERT_TRUE(client.AllTaken());
  };
  for (uint64_t i = 0; i < 40; ++i) {
    const size_t touched = i % 2 == 0 ? 1 : parameters;
    for (size_t p = 0; p < parameters; ++p) {
      client.gradients()[p] = p + touched >= parameters ? std::byte{1} : std::byte{0};
    }
    shm::SubmitEntry entry = Entry(shm::Op::kScatter, u);
    entry.cookie = 1000 + i;
    EXPECT_TRUE(client.Push(entry).ok());
    settle();
  }
  for (int i = 0; i < 10; ++i) {
    shm::SubmitEntry room = Entry(shm::Op::kMakeRoom, 0);
    room.cookie = 0;
    EXPECT_TRUE(client.Push(room).ok());
    settle();
  }
  // The job goes on: the other rank's turn comes, and everything is added.
  EXPECT_TRUE(clients[0]->EndMicroStep().ok());
  std::set<uint64_t> answered;
  for (int i = 0; i < 40; ++i) {
    const auto answer = client.AwaitAny();
    ASSERT_TRUE(answer.ok()) << answer.status();
    answered.insert(answer->cookie);
  }
  EXPECT_EQ(answered.size(), 40u);
  EXPECT_EQ(*answered.begin(), 1000u);
}

TEST(Garbage, ARequestForAnotherStepIsAnsweredWithAnError) {
  Cluster cluster(Small(1));
  cluster.RunClients([&](uint32_t, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    for (shm::Op op : {shm::Op::kGather, shm::Op::kScatter, shm::Op::kStep}) {
      shm::SubmitEntry entry = Entry(op, 0);
      entry.step = 9;
      client.submit()->step.loss_scale = 1;
      EXPECT_EQ(client.Request(entry).status().code(), absl::StatusCode::kFailedPrecondition);
    }
    EXPECT_TRUE(client.Gather(0).ok());
  });
}

// --- Time limits -------------------------------------------------------------------------------

TEST(Limits, AJobWhoseRanksDoNotComeFailsAndNamesThem) {
  Cluster cluster(Small(2, "\"attach_timeout_seconds\": 0.2"));
  const auto attachment = cluster.Attach(0);
  ASSERT_TRUE(attachment.ok());
  auto client = cluster.Client(0, *attachment);
  const absl::Status failed = client->WaitForFailure();
  EXPECT_EQ(failed.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(failed.message()), HasSubstr("rank 1"));
  EXPECT_EQ(cluster.WaitForEnd(0).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(cluster.Attach(1).status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(Limits, AStepMayBeGivenATimeLimit) {
  Cluster cluster(Small(2, "\"step_timeout_seconds\": 0.2"));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 0) {
      EXPECT_EQ(client.Step({DefaultWorkload().hyper, ""}).status().code(),
                absl::StatusCode::kDeadlineExceeded);
    }
    const absl::Status failure = client.WaitForFailure();
    EXPECT_EQ(failure.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(failure.message()),
                HasSubstr("rank 0 waits for rank 1 to call step() for step 1"));
  });
}

// Rank 1 is ahead of rank 0 by more gradients than are set aside.
TEST(Limits, AWaitForRoomHasItToo) {
  Cluster cluster(Small(2, "\"step_timeout_seconds\": 0.3, \"gradient_plan\": \"node_sum\", "
                           "\"staging_bytes\": 4096"));
  cluster.RunClients([&](uint32_t rank, FakeClient& client) {
    EXPECT_TRUE(client.Barrier().ok());
    if (rank == 1) {
      client.set_makes_room();
      absl::Status status;
      for (int pass = 0; pass < 10 && status.ok(); ++pass) {
        status = Backward(cluster.layout(), rank, client, DefaultWorkload());
        if (status.ok()) status = client.EndMicroStep();
      }
      EXPECT_FALSE(status.ok());
    }
    const absl::Status failure = client.WaitForFailure();
    EXPECT_EQ(failure.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(failure.message()), HasSubstr("0.3 seconds to hand over a gradient"));
    EXPECT_THAT(std::string(failure.message()),
                HasSubstr("rank 1 waits for room in the gradient staging memory, until the "
                          "micro-step of rank 0 comes to it"));
  });
}

TEST(Limits, AnAnswerToAnotherStepIsNoReprieve) {
  Cluster cluster(Small(2, "\"step_timeout_seconds\": 0.5"));
  auto processes = MakeProcesses(2);
  auto clients = AttachAll(&cluster, processes);
  OnEach(clients, [&](uint32_t, FakeClient& client) { EXPECT_TRUE(client.Barrier().ok()); });
  const uint32_t before = clients[0]->submit()->tail.load();
  std::thread waiting([&] {
    EXPECT_EQ(clients[0]->Step({DefaultWorkload().hyper, ""}).status().code(),
              absl::StatusCode::kDeadlineExceeded);
  });
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  while ((clients[0]->submit()->tail.load() == before || !clients[0]->AllTaken()) &&
         absl::Now() < deadline) {
    std::this_thread::yield();
  }
  clients[1]->submit()->step = clients[0]->submit()->step;
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kStep;
  entry.cookie = 1000;
  entry.step = 9;
  EXPECT_EQ(clients[1]->Request(entry).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(clients[1]->WaitForFailure().code(), absl::StatusCode::kDeadlineExceeded);
  waiting.join();
}

TEST(Limits, StateWaitsForTrainersOnlySoLong) {
  Cluster cluster(Small(1, "\"linger_seconds\": 0.2"));
  Sleeper process;
  ASSERT_TRUE(cluster.Attach(0, &process).ok());
  process.Kill();
  const absl::Status end = cluster.WaitForEnd(0);
  EXPECT_EQ(end.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(end.message()), HasSubstr("linger_seconds"));
}

TEST(Limits, AnOperatorCanEndAJob) {
  Cluster cluster(Small(1));
  const auto attachment = cluster.Attach(0);
  auto client = cluster.Client(0, *attachment);
  cluster.runner(0).Fail(absl::CancelledError("deleted by the operator"), /*discard=*/true);
  EXPECT_EQ(client->WaitForFailure().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(cluster.WaitForEnd(0).code(), absl::StatusCode::kCancelled);
}

// --- Leaks -------------------------------------------------------------------------------------

size_t OpenFds() {
  size_t count = 0;
  DIR* dir = opendir("/proc/self/fd");
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count;
}

TEST(Leaks, NothingIsLeftAfterTwentyJobs) {
  const auto run = [] {
    Cluster cluster(Small(2));
    auto processes = MakeProcesses(2);
    auto clients = AttachAll(&cluster, processes);
    OnEach(clients, [&](uint32_t rank, FakeClient& client) {
      Train(cluster.layout(), rank, client, DefaultWorkload(), 1, /*fresh=*/true);
      if (rank == 0) {
        EXPECT_TRUE(client.Detach().ok());
      }
    });
    processes[1]->Kill();
  };  // ~Cluster: no byte is reserved any more
  run();
  const size_t before = OpenFds();
  for (int i = 0; i < 20; ++i) run();
  EXPECT_EQ(OpenFds(), before);
}

}  // namespace
}  // namespace zerod::engine::testing
