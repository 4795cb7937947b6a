// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/job_table.h"

#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/daemon_process.h"
#include "tests/server/fake_runner.h"

namespace zerod::server::testing {
namespace {

using ::testing::HasSubstr;

// Peers that nobody talks to.
class NoPeers : public JobPeers {
 public:
  void Start(engine::JobRunner*) override {}
  void Close(const absl::Status&) override { closed = true; }
  void Send(core::MemberIndex, core::Message) override {}
  fabric::Rendezvous* rendezvous() override { return nullptr; }
  std::atomic<bool> closed{false};
};

class NoNetwork : public PeerNetwork {
 public:
  std::shared_ptr<JobPeers> Join(PeerJob) override {
    last = std::make_shared<NoPeers>();
    return last;
  }
  void SetLost(const std::string& job, const absl::Status& why) override {
    lost.erase(job);
    if (!why.ok()) lost.insert(job);
  }
  std::string address() const override { return "127.0.0.1:1"; }
  void SetServing(bool) override {}
  std::shared_ptr<NoPeers> last;
  std::set<std::string> lost;
};

std::shared_ptr<const core::Layout> LayoutOf(int64_t columns) {
  core::ModelDescription model;
  model.modules = {{"", "Net", false}};
  model.parameters = {{"w", {4, columns}, true, 0, {""}}};
  auto layout = core::Layout::Build(model, {});
  EXPECT_TRUE(layout.ok()) << layout.status();
  return std::make_shared<const core::Layout>(*std::move(layout));
}

AttachArguments Arguments(const std::string& job, uint32_t rank = 0, uint32_t world = 2) {
  AttachArguments arguments;
  arguments.job = job;
  arguments.rank = rank;
  arguments.local_rank = rank;
  arguments.world = world;
  arguments.local_world = world;
  arguments.job_token = "secret";
  arguments.config = *Config::Parse(R"({"train_micro_batch_size_per_gpu": 1})", world);
  arguments.layout = LayoutOf(8);
  return arguments;
}

class JobTableTest : public ::testing::Test {
 protected:
  JobTableTest()
      : table_(
            [this](engine::JobRequest request, engine::PeerSender* peers,
                   std::function<void(absl::Status)> ended)
                -> absl::StatusOr<std::unique_ptr<engine::JobRunner>> {
              ++created_;
              if (gate_.valid()) gate_.wait();
              if (!fail_.ok()) return fail_;
              auto runner =
                  std::make_unique<FakeRunner>(std::move(request), peers, std::move(ended));
              runner_ = runner.get();
              return std::unique_ptr<engine::JobRunner>(std::move(runner));
            },
            &network_, &sessions_, "127.0.0.1", 1, SmallLimits()) {}
  // What is left of the process's descriptors is what is open now.
  static rlimit CloseDescriptors() {
    rlimit before{};
    getrlimit(RLIMIT_NOFILE, &before);
    const int next = dup(0);  // the lowest that is free
    close(next);
    rlimit none = before;
    none.rlim_cur = static_cast<rlim_t>(next);
    setrlimit(RLIMIT_NOFILE, &none);
    return before;
  }
  ~JobTableTest() override {
    table_.FailAll(absl::AbortedError("the test is over"));
    EXPECT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
  }
  static Limits SmallLimits() {
    Limits limits;
    limits.jobs_max = 2;
    limits.lost_jobs_max = 2;
    return limits;
  }
  std::shared_ptr<Session> NewSession() {
    auto session = Session::Create(1234, 0);
    EXPECT_TRUE(session.ok());
    sessions_.Add(*session);
    return *session;
  }

  SessionTable sessions_;
  NoNetwork network_;
  std::atomic<int> created_{0};
  std::shared_future<void> gate_;
  absl::Status fail_;
  FakeRunner* runner_ = nullptr;
  JobTable table_;
};

TEST_F(JobTableTest, TheFirstClientMakesTheJobTheOthersJoin) {
  std::promise<void> open;
  gate_ = open.get_future().share();
  std::vector<std::thread> ranks;
  std::atomic<int> attached{0};
  for (uint32_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      if (table_.Attach(NewSession(), Arguments("a", rank)).ok()) ++attached;
    });
  }
  EXPECT_TRUE(Eventually([&] { return created_ == 1; }));
  EXPECT_TRUE(table_.List().empty()) << "its memory is still being reserved";
  open.set_value();
  for (std::thread& t : ranks) t.join();
  EXPECT_EQ(attached, 2);
  EXPECT_EQ(created_, 1);
  EXPECT_EQ(table_.List().size(), 1u);
}

TEST_F(JobTableTest, FilesAreKeptForTheSessionUntilTheJobEnds) {
  auto session = NewSession();
  EXPECT_FALSE(table_.ClientState(*session).ok());
  ASSERT_TRUE(table_.Attach(session, Arguments("a", 1)).ok());
  EXPECT_EQ(table_.ClientState(*session)->second, "blob 1");
  EXPECT_EQ(session->TakeFiles()->size(), 2u);
  EXPECT_FALSE(session->TakeFiles().ok()) << "once";
  ASSERT_TRUE(table_.Attach(session, Arguments("a", 1)).ok());
  runner_->End(absl::OkStatus());
  EXPECT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
  EXPECT_FALSE(session->TakeFiles().ok()) << "they would keep the memory of a job that is over";
  EXPECT_EQ(table_.ClientState(*session).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(network_.last->closed);
}

TEST_F(JobTableTest, ADeadSessionKeepsNoFiles) {
  auto session = NewSession();
  session->MarkGone();
  ASSERT_TRUE(table_.Attach(session, Arguments("a")).ok());
  EXPECT_FALSE(session->TakeFiles().ok());
}

TEST_F(JobTableTest, AFailedCreationLeavesNothing) {
  fail_ = absl::ResourceExhaustedError("no memory: 1 of 2");
  EXPECT_EQ(table_.Attach(NewSession(), Arguments("a")).status(), fail_);
  EXPECT_EQ(table_.size(), 0u);
  fail_ = absl::OkStatus();
  EXPECT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
}

TEST_F(JobTableTest, AnotherJobOfTheSameNameIsToldWhatDiffers) {
  ASSERT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
  const auto error = [&](const std::function<void(AttachArguments*)>& change) {
    AttachArguments arguments = Arguments("a", 1);
    change(&arguments);
    const auto result = table_.Attach(NewSession(), arguments);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
    return std::string(result.status().message());
  };
  EXPECT_THAT(error([](auto* a) { a->job_token = "guess"; }), HasSubstr("another job token"));
  EXPECT_THAT(error([](auto* a) { a->world = 4; }), HasSubstr("world is 2 there, 4 here"));
  EXPECT_THAT(error([](auto* a) { a->local_world = 1; }),
              HasSubstr("ranks on this node is 2 there, 1 here"));
  EXPECT_THAT(error([](auto* a) { a->peers = {"x:1", "y:1"}; }),
              HasSubstr("number of nodes is 1 there, 2 here"));
  EXPECT_THAT(error([](auto* a) { a->layout = LayoutOf(9); }),
              HasSubstr("parameter 0 is w [4, 8] in group 0 there, w [4, 9] in group 0 here"));
  EXPECT_THAT(error([](auto* a) { a->config.gradient_clipping = 0.5; }),
              HasSubstr("gradient_clipping is 1.0 there, 0.5 here"));
}

TEST_F(JobTableTest, ALostJobIsNotBegunAnewUntilItIsDeleted) {
  ASSERT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
  runner_->SetLost(7, "lost the shards of member 1");
  runner_->End(absl::FailedPreconditionError("lost the shards of member 1"));
  ASSERT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
  const absl::Status refused = table_.Attach(NewSession(), Arguments("a")).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("lost the shards of member 1"));
  EXPECT_EQ(network_.lost.count("a"), 1u) << "the other members hear of it too";
  ASSERT_EQ(table_.List().size(), 1u);
  EXPECT_EQ(table_.List()[0].snapshot.committed_step, 7u);
  EXPECT_TRUE(table_.Delete("a", absl::Seconds(20)).ok());
  EXPECT_TRUE(network_.lost.empty());
  EXPECT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
}

TEST_F(JobTableTest, AJobThatLostNothingMayBeginAnew) {
  for (const absl::Status& end :
       {absl::OkStatus(), absl::AbortedError("deleted"), absl::FailedPreconditionError("early")}) {
    ASSERT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok()) << end;
    runner_->End(end);
    ASSERT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
  }
  EXPECT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
}

TEST_F(JobTableTest, OnlyTheNewestLostJobsAreRemembered) {
  for (int i = 0; i < 4; ++i) {
    const std::string id = std::string("lost") + std::to_string(i);
    ASSERT_TRUE(table_.Attach(NewSession(), Arguments(id)).ok());
    runner_->SetLost(1, id);
    runner_->End(absl::FailedPreconditionError(id));
    ASSERT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
  }
  EXPECT_EQ(network_.lost, (std::set<std::string>{"lost2", "lost3"}));
  EXPECT_TRUE(table_.Attach(NewSession(), Arguments("lost0")).ok());
}

TEST_F(JobTableTest, AdmissionOnlyNarrows) {
  ASSERT_TRUE(table_.Attach(NewSession(), Arguments("a")).ok());
  ASSERT_TRUE(table_.Attach(NewSession(), Arguments("b")).ok());
  EXPECT_EQ(table_.Attach(NewSession(), Arguments("c")).status().code(),
            absl::StatusCode::kResourceExhausted);
  table_.SetAdmission(Admission::kNoNewJobs);
  EXPECT_TRUE(table_.Attach(NewSession(), Arguments("a", 1)).ok()) << "it may come back";
  EXPECT_EQ(table_.Attach(NewSession(), Arguments("d")).status().code(),
            absl::StatusCode::kUnavailable);
  table_.SetAdmission(Admission::kClosed);
  table_.SetAdmission(Admission::kOpen);
  EXPECT_EQ(table_.Attach(NewSession(), Arguments("a", 1)).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(table_.Delete("nobody", absl::Seconds(1)).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(table_.Delete("a", absl::Seconds(20)).ok());
  EXPECT_EQ(table_.size(), 1u);
}

TEST_F(JobTableTest, JobsComeAndGoUnderManyHands) {
  std::atomic<bool> stop{false};
  std::thread watcher([&] {
    while (!stop) table_.List();
  });
  std::vector<std::thread> hands;
  for (int h = 0; h < 3; ++h) {
    hands.emplace_back([&, h] {
      for (int i = 0; i < 100; ++i) {
        (void)table_.Attach(NewSession(), Arguments("x", static_cast<uint32_t>(h % 2)));
        if (i % 3 == h) (void)table_.Delete("x", absl::Seconds(20));
      }
    });
  }
  for (std::thread& t : hands) t.join();
  stop = true;
  watcher.join();
  EXPECT_GT(created_, 1);
}

TEST_F(JobTableTest, AJobThatIsMadeWhileTheDaemonClosesEndsAtOnce) {
  std::promise<void> gate;
  gate_ = gate.get_future().share();
  absl::Status status;
  std::thread attaching([&] { status = table_.Attach(NewSession(), Arguments("a")).status(); });
  ASSERT_TRUE(Eventually([&] { return created_ == 1; }));
  table_.SetAdmission(Admission::kClosed);
  table_.FailAll(absl::UnavailableError("SIGTERM"));  // nothing runs yet
  gate.set_value();
  attaching.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(table_.WaitEmpty(absl::Seconds(20)));
}

TEST_F(JobTableTest, WithoutDescriptorsNobodyIsAttached) {
  ASSERT_TRUE(table_.Attach(NewSession(), Arguments("a", 0)).ok());
  const auto session = NewSession();
  const int before = runner_->attached();
  const rlimit limit = CloseDescriptors();
  const absl::Status status = table_.Attach(session, Arguments("a", 1)).status();
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(runner_->attached(), before);
  EXPECT_TRUE(table_.Attach(session, Arguments("a", 1)).ok());
  EXPECT_EQ(runner_->attached(), before + 1);
}

}  // namespace
}  // namespace zerod::server::testing
