// SPDX-License-Identifier: Apache-2.0
//
// Links between daemons, over loopback TCP, with runners that only remember.
#include "daemon/server/peers.h"

#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "daemon/server/rendezvous_map.h"
#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/zerod/v1/peer.grpc.pb.h"
#include "tests/server/daemon_process.h"
#include "tests/server/fake_runner.h"

// The wall clock of this process, set forward by so much for everyone in it, gRPC included.
static std::atomic<int64_t> wall_clock_shift_seconds{0};
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  const int result = static_cast<int>(syscall(SYS_clock_gettime, clock, time));
  if (clock == CLOCK_REALTIME) time->tv_sec += wall_clock_shift_seconds;
  return result;
}

namespace zerod::server::testing {
namespace {

using ::testing::HasSubstr;

Limits FastLimits() {
  Limits limits;
  limits.lease = absl::Seconds(2);
  limits.heartbeat_interval = absl::Milliseconds(200);
  limits.rendezvous_slice = absl::Milliseconds(300);
  limits.goodbye = absl::Seconds(4);
  return limits;
}

// One daemon's part of one job.
struct Member {
  Member(PeerNetwork* network, PeerJob job) : peers(network->Join(std::move(job))) {
    engine::JobRequest request;
    runner = std::make_unique<FakeRunner>(request, peers.get(), [](absl::Status) {});
  }
  ~Member() {
    if (peers != nullptr) peers->Close(absl::AbortedError("the test is over"));
  }
  void Start() { peers->Start(runner.get()); }

  std::shared_ptr<JobPeers> peers;
  std::unique_ptr<FakeRunner> runner;
};

core::Message WantOf(uint32_t unit) {
  core::Report report;
  report.generation = 1;
  report.items.push_back(core::Want{unit, 0});
  return report;
}

uint32_t UnitOf(const core::Message& message) {
  return std::get<core::Want>(std::get<core::Report>(message).items.at(0)).unit;
}

class PeersTest : public ::testing::Test {
 protected:
  std::unique_ptr<PeerNetwork> Network(const Limits& limits = FastLimits()) {
    auto network = PeerNetwork::Start("127.0.0.1:0", "", "boot", limits);
    EXPECT_TRUE(network.ok()) << network.status();
    return *std::move(network);
  }
  PeerJob Job(uint32_t self, uint32_t members, const std::string& coordinator,
              const std::string& token = "secret") {
    return {"job", token, members, self, coordinator, absl::Seconds(20)};
  }
};

TEST_F(PeersTest, MessagesArriveInOrderBothWays) {
  auto a = Network();
  auto b = Network();
  auto c = Network();
  Member zero(a.get(), Job(0, 3, a->address()));
  Member one(b.get(), Job(1, 3, a->address()));
  Member two(c.get(), Job(2, 3, a->address()));
  // Before anyone is linked: kept in order.
  constexpr uint32_t kEach = 2000;
  for (uint32_t i = 0; i < 10; ++i) zero.peers->Send(1, WantOf(i));
  zero.Start();
  one.Start();
  two.Start();
  std::thread from_one([&] {
    for (uint32_t i = 0; i < kEach; ++i) one.peers->Send(0, WantOf(i));
  });
  std::thread from_two([&] {
    for (uint32_t i = 0; i < kEach; ++i) two.peers->Send(0, WantOf(i));
  });
  for (uint32_t i = 10; i < kEach; ++i) zero.peers->Send(1, WantOf(i));
  from_one.join();
  from_two.join();
  ASSERT_TRUE(Eventually([&] {
    return zero.runner->messages().size() == 2 * kEach && one.runner->messages().size() == kEach;
  })) << zero.runner->messages().size() << " and " << one.runner->messages().size();
  uint32_t next[3] = {0, 0, 0};
  for (const auto& [from, message] : zero.runner->messages()) {
    ASSERT_EQ(UnitOf(message), next[from]++) << "from " << from;
  }
  uint32_t expected = 0;
  for (const auto& [from, message] : one.runner->messages()) {
    EXPECT_EQ(from, 0u);
    ASSERT_EQ(UnitOf(message), expected++);
  }
  EXPECT_TRUE(two.runner->messages().empty());
  // Silence for longer than the lease is filled by heartbeats.
  EXPECT_FALSE(Eventually([&] { return !zero.runner->downs().empty(); }, absl::Seconds(3)));
  EXPECT_TRUE(one.runner->downs().empty());
}

TEST_F(PeersTest, SettingTheClockEndsNoLease) {
  auto a = Network();
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  Member one(b.get(), Job(1, 2, a->address()));
  zero.Start();
  one.Start();
  one.peers->Send(0, WantOf(1));
  ASSERT_TRUE(Eventually([&] { return zero.runner->messages().size() == 1; }));
  for (const int64_t shift : {3600, -3600}) {
    const absl::Time before = absl::Now();
    wall_clock_shift_seconds = shift;
    // Abseil reads it once in a while only.
    ASSERT_TRUE(Eventually(
        [&] { return absl::AbsDuration(absl::Now() - before) > absl::Minutes(30); }));
    EXPECT_FALSE(Eventually(
        [&] { return !zero.runner->downs().empty() || !one.runner->downs().empty(); },
        absl::Seconds(1)));
    // Waits are as long as they were asked to be, too.
    EXPECT_EQ(one.peers->rendezvous()->Get("none", absl::Milliseconds(500)).status().code(),
              absl::StatusCode::kDeadlineExceeded);
  }
  wall_clock_shift_seconds = 0;
  one.peers->Send(0, WantOf(2));
  EXPECT_TRUE(Eventually([&] { return zero.runner->messages().size() == 2; }));
}

TEST_F(PeersTest, AMemberWaitsForTheJobAtMemberZero) {
  auto a = Network();
  auto b = Network();
  Member one(b.get(), Job(1, 2, a->address()));
  one.Start();
  one.peers->Send(0, WantOf(7));
  EXPECT_FALSE(Eventually([&] { return !one.runner->downs().empty(); }, absl::Seconds(1)));
  Member zero(a.get(), Job(0, 2, a->address()));
  zero.Start();
  ASSERT_TRUE(Eventually([&] { return zero.runner->messages().size() == 1; }));
  EXPECT_EQ(UnitOf(zero.runner->messages()[0].second), 7u);
}

TEST_F(PeersTest, ARefusedMemberLearnsWhy) {
  auto a = Network();
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  zero.Start();
  {
    Member wrong(b.get(), Job(1, 2, a->address(), "guess"));
    wrong.Start();
    ASSERT_TRUE(Eventually([&] { return wrong.runner->downs().size() == 1; }));
    EXPECT_EQ(wrong.runner->downs()[0].second.code(), absl::StatusCode::kPermissionDenied);
  }
  {
    Member outside(b.get(), Job(5, 6, a->address()));
    outside.Start();
    ASSERT_TRUE(Eventually([&] { return outside.runner->downs().size() == 1; }));
    EXPECT_THAT(std::string(outside.runner->downs()[0].second.message()),
                HasSubstr("has 2 members"));
  }
  EXPECT_TRUE(zero.runner->downs().empty());
}

TEST_F(PeersTest, LinksThatSayNothingAreBounded) {
  Limits limits = FastLimits();
  limits.fresh_links_max = 4;
  auto a = Network(limits);
  const auto stub = v1::Peer::NewStub(
      grpc::CreateChannel(a->address(), grpc::InsecureChannelCredentials()));
  constexpr int kLinks = 6;
  grpc::ClientContext contexts[kLinks];
  std::vector<std::unique_ptr<grpc::ClientReaderWriter<v1::LinkRequest, v1::LinkResponse>>> links;
  for (grpc::ClientContext& context : contexts) links.push_back(stub->Link(&context));
  int refused = 0;
  for (auto& link : links) {
    v1::LinkResponse response;
    EXPECT_FALSE(link->Read(&response));
    const grpc::Status status = link->Finish();
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
      EXPECT_THAT(status.error_message(), HasSubstr("have not said whose they are"));
      ++refused;
    } else {  // ended when it had said nothing for a lease
      EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
    }
  }
  EXPECT_EQ(refused, kLinks - 4);
  // Who says whose it is finds room again.
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  Member one(b.get(), Job(1, 2, a->address()));
  zero.Start();
  one.Start();
  one.peers->Send(0, WantOf(1));
  EXPECT_TRUE(Eventually([&] { return zero.runner->messages().size() == 1; }));
}

TEST_F(PeersTest, WhoNeverComesIsLost) {
  auto a = Network();
  PeerJob job = Job(0, 3, a->address());
  job.join_timeout = absl::Milliseconds(300);
  Member zero(a.get(), job);
  zero.Start();
  ASSERT_TRUE(Eventually([&] { return zero.runner->downs().size() == 2; }));
  EXPECT_THAT(std::string(zero.runner->downs()[0].second.message()),
              HasSubstr("did not come within 300ms"));

  auto b = Network();
  PeerJob late = Job(1, 2, "127.0.0.1:1");  // nobody listens there
  late.join_timeout = absl::Milliseconds(300);
  Member one(b.get(), late);
  one.Start();
  ASSERT_TRUE(Eventually([&] { return one.runner->downs().size() == 1; }));
}

TEST_F(PeersTest, AnEndInOrderIsNoDeath) {
  auto a = Network();
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  Member one(b.get(), Job(1, 2, a->address()));
  zero.Start();
  one.Start();
  zero.peers->Send(1, WantOf(1));
  ASSERT_TRUE(Eventually([&] { return one.runner->messages().size() == 1; }));
  one.peers->Send(0, WantOf(2));
  one.peers->Close(absl::OkStatus());
  ASSERT_TRUE(Eventually([&] { return zero.runner->messages().size() == 1; })) << "it was queued";
  EXPECT_FALSE(Eventually([&] { return !zero.runner->downs().empty(); }, absl::Seconds(1)));
  // But our own part must end soon after.
  EXPECT_TRUE(Eventually([&] { return zero.runner->downs().size() == 1; }));
  EXPECT_TRUE(one.runner->downs().empty());
}

TEST_F(PeersTest, AFailureIsToldWithWhatWasQueued) {
  auto a = Network();
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  Member one(b.get(), Job(1, 2, a->address()));
  zero.Start();
  one.Start();
  one.peers->Send(0, WantOf(1));
  ASSERT_TRUE(Eventually([&] { return zero.runner->messages().size() == 1; }));
  zero.peers->Send(1, core::FailJob{absl::AbortedError("over")});
  zero.peers->Close(absl::AbortedError("over"));
  ASSERT_TRUE(Eventually([&] { return one.runner->downs().size() == 1; }));
  ASSERT_EQ(one.runner->messages().size(), 1u) << "the message came before the end";
  EXPECT_EQ(std::get<core::FailJob>(one.runner->messages()[0].second).status,
            absl::AbortedError("over"));
}

TEST_F(PeersTest, RendezvousIsMemberZeros) {
  auto a = Network();
  auto b = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  Member one(b.get(), Job(1, 2, a->address()));
  zero.Start();
  one.Start();
  ASSERT_TRUE(one.peers->rendezvous()->Set("k", std::string("v\0w", 3)).ok());
  EXPECT_EQ(*zero.peers->rendezvous()->Get("k", absl::Seconds(5)), std::string("v\0w", 3));
  EXPECT_EQ(one.peers->rendezvous()->Set("k", "other").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(one.peers->rendezvous()->Get("none", absl::Milliseconds(500)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  std::thread later([&] {
    zero.peers->rendezvous()->Set("late", "x").IgnoreError();
  });
  EXPECT_EQ(*one.peers->rendezvous()->Get("late", absl::Seconds(20)), "x");
  later.join();
  std::thread closer([&] { zero.peers->Close(absl::AbortedError("over")); });
  EXPECT_EQ(one.peers->rendezvous()->Get("never", absl::Seconds(20)).status().code(),
            absl::StatusCode::kUnavailable);
  closer.join();
}

// The other daemon is a process of its own: killed, or stopped.
class PeerProcess {
 public:
  explicit PeerProcess(const std::string& coordinator) {
    pid_ = fork();
    if (pid_ == 0) {
      execl("/proc/self/exe", "peers_test", "--peer", coordinator.c_str(), nullptr);
      _exit(127);
    }
  }
  ~PeerProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  void Signal(int number) { kill(pid_, number); }

 private:
  pid_t pid_;
};

TEST_F(PeersTest, AKilledDaemonIsSeenAtOnce) {
  auto a = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  zero.Start();
  PeerProcess peer(a->address());
  ASSERT_TRUE(Eventually([&] { return !zero.runner->messages().empty(); }));
  const absl::Time killed = absl::Now();
  peer.Signal(SIGKILL);
  ASSERT_TRUE(Eventually([&] { return !zero.runner->downs().empty(); }));
  EXPECT_LT(absl::Now() - killed, FastLimits().lease) << "its sockets closed: no need to wait";
  EXPECT_EQ(zero.runner->downs()[0].second.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(zero.runner->downs()[0].second.message()), HasSubstr("member 1 of job"));
}

TEST_F(PeersTest, AStoppedDaemonLosesItsLease) {
  auto a = Network();
  Member zero(a.get(), Job(0, 2, a->address()));
  zero.Start();
  PeerProcess peer(a->address());
  ASSERT_TRUE(Eventually([&] { return !zero.runner->messages().empty(); }));
  peer.Signal(SIGSTOP);
  // Its window fills; what it does not read must not hold up our own end.
  core::NormReady norm;
  norm.part.block_squares.assign(1 << 17, 1.0);
  core::Report report;
  report.items.push_back(norm);
  for (int i = 0; i < 64; ++i) zero.peers->Send(1, report);
  ASSERT_TRUE(Eventually([&] { return !zero.runner->downs().empty(); }));
  EXPECT_THAT(std::string(zero.runner->downs()[0].second.message()), HasSubstr("silent"));
}

TEST(RendezvousMap, IsBounded) {
  Limits limits;
  limits.rendezvous_keys_max = 2;
  limits.rendezvous_value_bytes_max = 10;
  RendezvousMap map(limits);
  EXPECT_EQ(map.Set("k", std::string(10, 'x')).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(map.Set("a", "1").ok());
  EXPECT_TRUE(map.Set("a", "1").ok());
  EXPECT_TRUE(map.Set("b", "2").ok());
  EXPECT_EQ(map.Set("c", "3").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(map.Get("c", absl::Minutes(1), [] { return true; }).status().code(),
            absl::StatusCode::kCancelled);
}

// What PeerProcess runs: member 1, which says hello and stays.
int RunPeer(const std::string& coordinator) {
  auto network = PeerNetwork::Start("127.0.0.1:0", "", "boot of the other", FastLimits());
  if (!network.ok()) return 1;
  Member one(network->get(), {"job", "secret", 2, 1, coordinator, absl::Seconds(20)});
  one.Start();
  one.peers->Send(0, WantOf(1));
  alarm(60);  // ends with its parent's patience at the latest
  for (;;) pause();
}

}  // namespace
}  // namespace zerod::server::testing

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--peer") {
    return zerod::server::testing::RunPeer(argv[2]);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
