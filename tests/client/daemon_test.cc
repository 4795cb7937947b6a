// SPDX-License-Identifier: Apache-2.0
//
// The client library against the real daemon: attaching and being refused, training, death on
// either side, and the embedded daemon.
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "client/cpp/include/zerod/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace zerod::client {
namespace {

using ::testing::HasSubstr;

constexpr char kConfig[] = R"({
  "train_micro_batch_size_per_gpu": 1,
  "gradient_clipping": 0,
  "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}
})";

class Daemon {
 public:
  Daemon() {
    char name[] = "/tmp/zerod_daemon_test.XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    directory_ = name;
    const std::string socket = directory_ + "/d.sock";
    pid_ = fork();
    CHECK(pid_ >= 0);
    if (pid_ == 0) {
      execl(ZEROD_BINARY, ZEROD_BINARY, "--socket", socket.c_str(), "--metrics-listen",
            "127.0.0.1:0", "--log-file", (directory_ + "/log").c_str(), nullptr);
      _exit(127);
    }
    AttachOptions options;
    options.address = address();
    options.job = "any";
    const auto info = EnsureDaemon(options);
    CHECK(info.ok()) << info.status();
  }
  ~Daemon() {
    Kill(SIGKILL);
    (void)!system(("rm -rf " + directory_).c_str());
  }
  void Kill(int signal_number) {
    if (pid_ <= 0) return;
    kill(pid_, signal_number);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  std::string address() const { return absl::StrCat("unix:", directory_, "/d.sock"); }

 private:
  std::string directory_;
  pid_t pid_ = 0;
};

AttachOptions Options(const std::string& address, uint32_t rank = 0, uint32_t world = 1) {
  AttachOptions options;
  options.address = address;
  options.job = "tiny";
  options.rank = options.local_rank = rank;
  options.world = options.local_world = world;
  options.config = kConfig;
  options.takeover_seconds = 0.2;
  options.attach_timeout_seconds = 20;
  options.modules = {{"", "Model", false},
                     {"layers", "ModuleList", true},
                     {"layers.0", "Linear(64, 600)", false},
                     {"layers.1", "Linear(64, 600)", false},
                     {"head", "Linear(600, 10)", false}};
  for (const char* layer : {"layers.0", "layers.1"}) {
    options.parameters.push_back({absl::StrCat(layer, ".weight"), {64, 600}, true, 0, {layer}});
    options.parameters.push_back({absl::StrCat(layer, ".bias"), {600}, true, 0, {layer}});
  }
  options.parameters.push_back({"head.weight", {600, 10}, true, 0, {"head"}});
  return options;
}

std::unique_ptr<Client> MustAttach(const AttachOptions& options) {
  absl::StatusOr<std::unique_ptr<Client>> client = Client::Attach(options);
  CHECK(client.ok()) << client.status();
  return *std::move(client);
}

// Element i of parameter p is p + i / 1000 at first.
float Initial(uint32_t p, uint64_t i) {
  return static_cast<float>(p) + static_cast<float>(i) / 1000;
}

void PutInitial(Client& client) {
  for (uint32_t p = 0; p < client.parameters().size(); ++p) {
    const ParameterView& view = client.parameters()[p];
    std::vector<float> values(view.elements);
    for (uint64_t i = 0; i < values.size(); ++i) values[i] = Initial(p, i);
    const absl::Status put = client.Put(view.unit, view.offset, values.data(), values.size(),
                                         StateKind::kMaster);
    ASSERT_TRUE(put.ok()) << put;
  }
}

std::vector<float> Weights(Client& client, uint32_t p) {
  const ParameterView& view = client.parameters()[p];
  const absl::Status gathered = client.Gather(view.unit);
  CHECK(gathered.ok()) << gathered;
  const auto* data = static_cast<const float*>(view.data);
  std::vector<float> weights(data, data + view.elements);
  client.Release(view.unit);
  return weights;
}

void LandAll(Client& client, float gradient) {
  for (uint32_t p = 0; p < client.parameters().size(); ++p) {
    const std::vector<float> values(client.parameters()[p].elements, gradient);
    const absl::Status landed = client.Land(p, values.data(), DType::kFloat32);
    ASSERT_TRUE(landed.ok()) << landed;
  }
}

StepRequest Request() {
  StepRequest request;
  request.groups = {{0.1}};
  return request;
}

// AdamW with lr 0.1 and a constant gradient moves by the learning rate in each step.
void ExpectSteps(Client& client, int steps) {
  for (uint32_t p = 0; p < client.parameters().size(); ++p) {
    const std::vector<float> weights = Weights(client, p);
    for (uint64_t i : {size_t{0}, weights.size() / 2, weights.size() - 1}) {
      EXPECT_NEAR(weights[i], Initial(p, i) - 0.1 * steps, 1e-4) << p << " " << i;
    }
  }
}

TEST(Training, OneClientTrainsATinyLayout) {
  Daemon daemon;
  auto client = MustAttach(Options(daemon.address()));
  EXPECT_FALSE(client->initialized());
  EXPECT_EQ(client->resumed_step(), 0u);
  EXPECT_EQ(client->stage(), 3u);
  ASSERT_TRUE(client->Barrier().ok());
  PutInitial(*client);
  ExpectSteps(*client, 0);
  for (int step = 1; step <= 3; ++step) {
    LandAll(*client, 0.5f);
    ASSERT_TRUE(client->Scatter(0, true).ok());
    StepRequest request = Request();
    request.want_norm = true;
    const auto result = client->Step(request);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_FALSE(result->skipped);
    uint64_t elements = 0;
    for (const ParameterView& view : client->parameters()) elements += view.elements;
    EXPECT_NEAR(result->grad_norm, 0.5 * std::sqrt(static_cast<double>(elements)), 1e-3);
    ExpectSteps(*client, step);
  }
  std::vector<float> moment(10);
  const ParameterView& view = client->parameters()[4];
  ASSERT_TRUE(
      client->Read(view.unit, view.offset, moment.data(), moment.size(), StateKind::kExpAvg).ok());
  EXPECT_NEAR(moment[9], 0.5 * (1 - 0.9 * 0.9 * 0.9), 1e-6);
  EXPECT_TRUE(client->Detach().ok());
}

class TwoRanks : public ::testing::TestWithParam<const char*> {};

TEST_P(TwoRanks, SumTheirGradients) {
  Daemon daemon;
  std::vector<std::thread> ranks;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      AttachOptions options = Options(daemon.address(), rank, 2);
      options.config = absl::StrCat(
          R"({"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
              "zerod": {"gradient_plan": ")", GetParam(), R"("}})");
      auto client = MustAttach(options);
      ASSERT_TRUE(client->Barrier().ok());
      if (rank == 0) PutInitial(*client);
      ASSERT_TRUE(client->Barrier().ok());
      for (int step = 1; step <= 3; ++step) {
        ExpectSteps(*client, step - 1);
        // Two micro-steps; the mean over the ranks is 1.5 + 0.5 = 2.
        LandAll(*client, rank == 0 ? 1.0f : 2.0f);
        for (uint32_t unit = 0; unit < client->units().size(); ++unit) {
          ASSERT_TRUE(client->Scatter(unit, false).ok());
        }
        LandAll(*client, 0.5f);
        StepRequest request = Request();
        request.want_norm = true;
        const auto result = client->Step(request);
        ASSERT_TRUE(result.ok()) << result.status();
        uint64_t elements = 0;
        for (const ParameterView& view : client->parameters()) elements += view.elements;
        EXPECT_NEAR(result->grad_norm, 2 * std::sqrt(static_cast<double>(elements)), 1e-2);
      }
      ExpectSteps(*client, 3);
      const auto sum = client->AllReduce({1.0 + rank, 5.0}, ScalarOp::kSum);
      ASSERT_TRUE(sum.ok()) << sum.status();
      EXPECT_EQ((*sum)[0], 3.0);
      EXPECT_TRUE(client->Detach().ok());
    });
  }
  for (std::thread& rank : ranks) rank.join();
}
INSTANTIATE_TEST_SUITE_P(Plans, TwoRanks, ::testing::Values("per_rank", "node_sum"));

TEST(Training, LateGradientsOfAStepCount) {
  Daemon daemon;
  auto client = MustAttach(Options(daemon.address()));
  ASSERT_TRUE(client->Barrier().ok());
  PutInitial(*client);
  LandAll(*client, 1.0f);
  const uint32_t unit = client->parameters()[0].unit;
  ASSERT_TRUE(client->Scatter(unit, true).ok());
  const std::vector<float> late(client->parameters()[0].elements, 1.0f);
  EXPECT_EQ(client->Land(0, late.data(), DType::kFloat32).code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(client->Reclaim(unit).ok());
  ASSERT_TRUE(client->Land(0, late.data(), DType::kFloat32).ok());
  const auto result = client->Step(Request());
  ASSERT_TRUE(result.ok()) << result.status();
  std::vector<float> moment(1);
  const ParameterView& view = client->parameters()[0];
  ASSERT_TRUE(client->Read(view.unit, view.offset, moment.data(), 1, StateKind::kExpAvg).ok());
  EXPECT_NEAR(moment[0], 0.1 * 2, 1e-6);
}

TEST(Attaching, SecondProcessOfARankIsRefusedWithThePidOfTheFirst) {
  Daemon daemon;
  auto client = MustAttach(Options(daemon.address()));
  const auto second = Client::Attach(Options(daemon.address()));
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists) << second.status();
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(absl::StrCat(getpid())));
  EXPECT_TRUE(client->Barrier().ok());  // and the first goes on
}

TEST(Attaching, AnotherLayoutIsRefused) {
  Daemon daemon;
  auto first = MustAttach(Options(daemon.address(), 0, 2));
  AttachOptions other = Options(daemon.address(), 1, 2);
  other.parameters[0].shape = {64, 601};
  const auto second = Client::Attach(other);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition) << second.status();
}

TEST(Attaching, ABadConfigurationNamesTheKey) {
  Daemon daemon;
  AttachOptions options = Options(daemon.address());
  options.config = R"({"train_batch_size": 1, "zero_optimisation": {}})";
  const auto client = Client::Attach(options);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("zero_optimisation"));
}

TEST(Attaching, NobodyThereIsSaidWithTheSocket) {
  AttachOptions options = Options("unix:/tmp/nobody-there.sock");
  options.attach_timeout_seconds = 0.2;
  const auto client = Client::Attach(options);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("/tmp/nobody-there.sock"));
}

// Trainers that die are processes of their own: gRPC must not be used after a fork.
int DieAfterTwoSteps(const std::string& address) {
  auto client = MustAttach(Options(address));
  CHECK(client->Barrier().ok());
  PutInitial(*client);
  for (int step = 1; step <= 2; ++step) {
    LandAll(*client, 0.5f);
    StepRequest request = Request();
    request.blob = absl::StrCat("state ", step);
    CHECK(client->Step(request).ok());
  }
  LandAll(*client, 100.0f);  // of a step that never is
  CHECK(client->Scatter(0, true).ok());
  kill(getpid(), SIGKILL);
  return 1;
}

int DieAfterABarrier(const std::string& address) {
  auto client = MustAttach(Options(address, 1, 2));
  CHECK(client->Barrier().ok());
  kill(getpid(), SIGKILL);
  return 1;
}

pid_t Trainer(const char* what, const Daemon& daemon) {
  const std::string address = daemon.address();
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    execl("/proc/self/exe", "trainer", what, address.c_str(), nullptr);
    _exit(127);
  }
  return pid;
}

TEST(Deaths, ATrainersStateOutlivesIt) {
  Daemon daemon;
  const pid_t trainer = Trainer("die-after-two-steps", daemon);
  int status = 0;
  ASSERT_EQ(waitpid(trainer, &status, 0), trainer);
  ASSERT_TRUE(WIFSIGNALED(status));
  auto client = MustAttach(Options(daemon.address()));
  EXPECT_TRUE(client->initialized());
  EXPECT_EQ(client->resumed_step(), 2u);
  EXPECT_EQ(client->step(), 3u);
  EXPECT_GT(client->generation(), 1u);
  EXPECT_EQ(*client->ClientState(), "state 2");
  ASSERT_TRUE(client->Barrier().ok());
  ExpectSteps(*client, 2);
  LandAll(*client, 0.5f);
  ASSERT_TRUE(client->Step(Request()).ok());
  ExpectSteps(*client, 3);
}

TEST(Deaths, TheDaemonsEndsEveryWait) {
  Daemon daemon;
  auto client = MustAttach(Options(daemon.address(), 0, 2));  // rank 1 never comes
  absl::Status barrier;
  absl::Time ended;
  std::thread waiter([&] {
    barrier = client->Barrier();
    ended = absl::Now();
  });
  const absl::Time killed = absl::Now();
  daemon.Kill(SIGKILL);
  waiter.join();
  EXPECT_EQ(barrier.code(), absl::StatusCode::kUnavailable) << barrier;
  EXPECT_LT(ended - killed, absl::Seconds(2));
  EXPECT_EQ(client->Step(Request()).status().code(), absl::StatusCode::kUnavailable);
}

TEST(Deaths, ARanksDeathIsToldToTheOthers) {
  Daemon daemon;
  const pid_t other = Trainer("die-after-a-barrier", daemon);
  auto client = MustAttach(Options(daemon.address(), 0, 2));
  ASSERT_TRUE(client->Barrier().ok());
  const absl::Status barrier = client->Barrier();
  EXPECT_FALSE(barrier.ok());
  EXPECT_THAT(std::string(barrier.message()), HasSubstr("rank 1"));
  waitpid(other, nullptr, 0);
}

// The process that listens on a Unix socket.
pid_t Listener(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  memcpy(to.sun_path, path.c_str(), path.size() + 1);
  ucred peer{};
  socklen_t bytes = sizeof(peer);
  const bool ok = connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0 &&
                  getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0;
  close(fd);
  return ok ? peer.pid : -1;
}

TEST(EmbeddedDaemon, IsStartedFoundAgainAndEnds) {
  unsetenv("ZEROD_ADDRESS");
  unsetenv("XDG_RUNTIME_DIR");
  setenv("ZEROD_DAEMON", ZEROD_BINARY, 1);
  AttachOptions options = Options("");
  options.job = absl::StrCat("embedded-test-", getpid());
  const std::string socket = EmbeddedAddress(options.job, 0).substr(strlen("unix:"));
  auto client = MustAttach(options);
  ASSERT_TRUE(client->Barrier().ok());
  const pid_t daemon = Listener(socket);
  ASSERT_GT(daemon, 0);
  EXPECT_NE(getsid(daemon), getsid(0));
  EXPECT_NE(getpgid(daemon), getpgrp());
  // Who looks for a daemon finds this one.
  const auto info = EnsureDaemon(options);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->address, "unix:" + socket);
  EXPECT_FALSE(info->boot_id.empty());
  EXPECT_EQ(Listener(socket), daemon);
  ASSERT_TRUE(client->Detach().ok());
  client.reset();
  // It ends by itself much later; SIGTERM is the same way out.
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, daemon, 0));
  kill(daemon, SIGTERM);
  pollfd ended{pidfd, POLLIN, 0};
  EXPECT_EQ(poll(&ended, 1, 20000), 1);
  close(pidfd);
  for (const char* suffix : {".log", ".lock"}) {
    unlink((socket.substr(0, socket.size() - strlen(".sock")) + suffix).c_str());
  }
  unsetenv("ZEROD_DAEMON");
}

}  // namespace

int RunTrainer(const std::string& what, const std::string& address) {
  if (what == "die-after-two-steps") return DieAfterTwoSteps(address);
  if (what == "die-after-a-barrier") return DieAfterABarrier(address);
  return 127;
}

}  // namespace zerod::client

int main(int argc, char** argv) {
  if (argc == 3 && strcmp(argv[0], "trainer") == 0) {
    return zerod::client::RunTrainer(argv[1], argv[2]);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
