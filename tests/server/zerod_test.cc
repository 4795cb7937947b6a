// SPDX-License-Identifier: Apache-2.0
//
// The real binary: who gets in, what it answers, how it leaves.
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/version.h"
#include "tests/server/daemon_process.h"
#include "tests/server/daemon_rpc.h"

namespace zerod::server::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kServing = 1;
constexpr int kNotServing = 2;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// A model of two layers, small enough for any machine.
v1::AttachRequest SmallJob(const FdClient& client) {
  v1::AttachRequest request;
  request.set_token(client.token());
  request.set_protocol(kProtocolVersion);
  request.set_shm_format(shm::kFormatVersion);
  request.set_job("small");
  request.set_world(1);
  request.set_local_world(1);
  request.set_config(R"({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}})");
  v1::Model* model = request.mutable_model();
  model->set_dtype(v1::DATA_TYPE_FLOAT32);
  model->add_modules()->set_type("Net");
  for (const char* name : {"a", "b"}) {
    v1::Module* module = model->add_modules();
    module->set_path(name);
    module->set_type("Linear");
    v1::Parameter* parameter = model->add_parameters();
    parameter->set_name(std::string(name) + ".weight");
    parameter->add_shape(16);
    parameter->add_shape(8);
    parameter->set_trainable(true);
    parameter->add_modules(name);
  }
  return request;
}

class ZerodTest : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> arguments = {}) {
    daemon_ = std::make_unique<DaemonProcess>(directory_.path(), std::move(arguments));
    ASSERT_TRUE(daemon_->ready()) << daemon_->Log();
    rpc_ = Rpc::Connect(daemon_->address());
  }
  // Only the log and the test's own notify socket are left.
  void ExpectNothingLeft() {
    for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
      EXPECT_THAT(entry.path().filename().string(), ::testing::AnyOf("log", "notify"));
    }
  }

  TemporaryDirectory directory_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<Rpc> rpc_;
};

TEST_F(ZerodTest, AnswersHealthReflectionAndVersion) {
  Start();
  for (const char* service : {"", "zerod.v1.Jobs", "zerod.v1.Admin"}) {
    const auto health = rpc_->Health(service);
    ASSERT_TRUE(health.ok()) << health.status();
    EXPECT_EQ(*health, kServing) << service;
  }
  EXPECT_EQ(rpc_->Health("zerod.v1.Nothing").status().code(), absl::StatusCode::kNotFound);

  const auto services = rpc_->ReflectedServices();
  ASSERT_TRUE(services.ok()) << services.status();
  EXPECT_THAT(*services, HasSubstr("zerod.v1.Jobs"));
  EXPECT_THAT(*services, HasSubstr("zerod.v1.Admin"));
  EXPECT_THAT(*services, HasSubstr("grpc.health.v1.Health"));

  const auto version = rpc_->GetVersion();
  ASSERT_TRUE(version.ok()) << version.status();
  EXPECT_EQ(version->protocol(), kProtocolVersion);
  EXPECT_EQ(version->shm_format(), shm::kFormatVersion);
  EXPECT_EQ(version->pid(), static_cast<uint64_t>(daemon_->pid()));
  EXPECT_EQ(version->boot_id().size(), 32u);
  EXPECT_THAT(version->peer_address(), ::testing::StartsWith("127.0.0.1:"));

  const auto status = rpc_->Status();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->boot_id(), version->boot_id());
  EXPECT_FALSE(status->draining());
  EXPECT_GT(status->rss_bytes(), 0u);
  EXPECT_GT(status->memory_available_bytes(), 0u);
  EXPECT_THAT(status->metrics_address(), ::testing::StartsWith("127.0.0.1:"));
}

TEST_F(ZerodTest, AttachHandsOutTheFiles) {
  Start();
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value());
  ASSERT_EQ(client->welcome.code, 0u) << client->welcome.text;
  EXPECT_EQ(rpc_->ClientState(client->token()).status().code(),
            absl::StatusCode::kFailedPrecondition)
      << "before Attach";
  const auto attached = rpc_->Attach(SmallJob(*client));
  ASSERT_TRUE(attached.ok()) << attached.status();
  EXPECT_EQ(attached->units_size(), 2);
  EXPECT_EQ(attached->places_size(), 2);
  EXPECT_EQ(attached->committed_step(), 0u);
  EXPECT_FALSE(attached->initialized());
  EXPECT_EQ(attached->stage(), 1u);

  shm::FdFetch fetch{};
  fetch.magic = shm::kMagic;
  memcpy(fetch.token, client->welcome.token, sizeof(fetch.token));
  ASSERT_TRUE(
      shm::SendFds(client->socket.get(), &fetch, sizeof(fetch), {}, absl::Seconds(10)).ok());
  shm::FdFiles files{};
  const auto fds = shm::ReceiveFds(client->socket.get(), &files, sizeof(files), shm::kFdsMax,
                                   absl::Seconds(10));
  ASSERT_TRUE(fds.ok()) << fds.status();
  EXPECT_EQ(files.code, 0u) << files.text;
  EXPECT_EQ(fds->size(), shm::kClientFiles + 1);
  struct stat window;
  ASSERT_EQ(fstat((*fds)[static_cast<size_t>(shm::ClientFile::kWindow)].get(), &window), 0);
  EXPECT_GE(static_cast<uint64_t>(window.st_size), attached->window_bytes());

  const auto jobs = rpc_->ListJobs();
  ASSERT_TRUE(jobs.ok());
  ASSERT_EQ(jobs->jobs_size(), 1);
  EXPECT_EQ(jobs->jobs(0).job(), "small");
  EXPECT_EQ(jobs->jobs(0).parameters(), 256u);
  EXPECT_EQ(jobs->jobs(0).clients_size(), 1);

  // The same rank again while the first one lives.
  auto second = FdConnect(daemon_->socket());
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(rpc_->Attach(SmallJob(*second)).status().code(), absl::StatusCode::kAlreadyExists);

  ASSERT_TRUE(rpc_->DeleteJob("small").ok());
  EXPECT_EQ(rpc_->ListJobs()->jobs_size(), 0);
  EXPECT_EQ(rpc_->DeleteJob("small").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(rpc_->Status()->memory_reserved_bytes(), 0u);
}

TEST_F(ZerodTest, RequestsThatCannotWorkSayWhy) {
  Start();
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value());
  const v1::AttachRequest good = SmallJob(*client);
  struct Case {
    std::function<void(v1::AttachRequest*)> spoil;
    absl::StatusCode code;
    const char* text;
  };
  const Case cases[] = {
      {[](auto* r) { r->set_token("guess"); }, absl::StatusCode::kPermissionDenied, "token"},
      {[](auto* r) { r->set_protocol(99); }, absl::StatusCode::kFailedPrecondition, "protocol 99"},
      {[](auto* r) { r->set_shm_format(99); }, absl::StatusCode::kFailedPrecondition, "format 99"},
      {[](auto* r) { r->set_job("a b"); }, absl::StatusCode::kInvalidArgument, "job id"},
      {[](auto* r) { r->set_world(0); }, absl::StatusCode::kInvalidArgument, "world is 0"},
      {[](auto* r) { r->set_rank(1); }, absl::StatusCode::kInvalidArgument, "rank is 1"},
      {[](auto* r) { r->set_world(2); }, absl::StatusCode::kInvalidArgument, "no other node"},
      {[](auto* r) { r->set_local_rank(7); }, absl::StatusCode::kInvalidArgument, "local_rank"},
      {[](auto* r) { r->set_node_rank(1); }, absl::StatusCode::kInvalidArgument, "node_rank"},
      {[](auto* r) { r->set_config("{\"zero_optimisation\": 1}"); },
       absl::StatusCode::kInvalidArgument, "zero_optimization"},
      {[](auto* r) { r->mutable_model()->set_dtype(v1::DATA_TYPE_BFLOAT16); },
       absl::StatusCode::kInvalidArgument, "bf16"},
      {[](auto* r) { r->mutable_model()->mutable_parameters(0)->set_modules(0, "nowhere"); },
       absl::StatusCode::kInvalidArgument, "nowhere"},
      {[](auto* r) { r->mutable_model()->mutable_parameters(0)->set_shape(0, -1); },
       absl::StatusCode::kInvalidArgument, "a.weight"},
  };
  for (const Case& c : cases) {
    v1::AttachRequest request = good;
    c.spoil(&request);
    const absl::Status status = rpc_->Attach(request).status();
    EXPECT_EQ(status.code(), c.code) << c.text << ": " << status;
    EXPECT_THAT(Message(status), HasSubstr(c.text));
  }
  EXPECT_EQ(rpc_->ListJobs()->jobs_size(), 0);
  ASSERT_TRUE(rpc_->Attach(good).ok());

  // The job is there: another one of the same name is told what differs.
  auto other = FdConnect(daemon_->socket());
  v1::AttachRequest request = SmallJob(*other);
  request.mutable_model()->mutable_parameters(1)->set_shape(1, 9);
  absl::Status status = rpc_->Attach(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(Message(status), HasSubstr("b.weight [16, 8] in group 0 there, b.weight [16, 9]"));
  request = SmallJob(*other);
  request.set_config(R"({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}})");
  status = rpc_->Attach(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(Message(status), HasSubstr("zero_optimization.stage is 1 there, 2 here"));
}

// In a child that has become another user: 0 = as `expect_welcome` says.
int AsAnotherUser(const std::string& socket, bool expect_welcome) {
  const pid_t child = fork();
  if (child == 0) {
    if (setgroups(0, nullptr) != 0 || setgid(65534) != 0 || setuid(65534) != 0) _exit(10);
    const auto client = FdConnect(socket);
    if (!client.has_value()) _exit(11);
    const bool refused =
        client->welcome.code == static_cast<uint32_t>(absl::StatusCode::kPermissionDenied) &&
        strstr(client->welcome.text, "--allow-uid 65534") != nullptr;
    if (expect_welcome ? client->welcome.code != 0 : !refused) _exit(12);
    // gRPC's server speaks first; whoever is refused reads the end of the file.
    const shm::UniqueFd grpc = ConnectUnix(socket);
    pollfd waiting{grpc.get(), POLLIN, 0};
    if (!grpc || poll(&waiting, 1, 20000) != 1) _exit(13);
    char byte;
    const ssize_t n = recv(grpc.get(), &byte, 1, 0);
    _exit((n > 0) == expect_welcome ? 0 : 14);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_F(ZerodTest, AnotherUserIsRefusedUnlessAllowed) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  Start({"--socket-mode", "0666"});
  EXPECT_EQ(AsAnotherUser(daemon_->socket(), /*expect_welcome=*/false), 0);
  ASSERT_TRUE(rpc_->GetVersion().ok());
  daemon_.reset();
  Start({"--socket-mode", "0666", "--allow-uid", "65534"});
  EXPECT_EQ(AsAnotherUser(daemon_->socket(), /*expect_welcome=*/true), 0);
  daemon_.reset();
  Start({"--socket-mode", "0666", "--allow-gid", "65534"});
  EXPECT_EQ(AsAnotherUser(daemon_->socket(), /*expect_welcome=*/true), 0);
}

TEST_F(ZerodTest, SigtermLeavesNothing) {
  Start();
  struct stat socket;
  ASSERT_EQ(stat(daemon_->socket().c_str(), &socket), 0);
  EXPECT_EQ(socket.st_mode & 0777, 0600u);
  daemon_->Signal(SIGTERM);
  EXPECT_TRUE(daemon_->WaitNotified("STOPPING=1"));
  EXPECT_EQ(daemon_->WaitExit(), 0);
  ExpectNothingLeft();
}

TEST_F(ZerodTest, SigtermDrainsThenEndsJobs) {
  Start({"--drain-seconds", "2"});
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value()) << daemon_->Log();
  ASSERT_TRUE(rpc_->Attach(SmallJob(*client)).ok());
  daemon_->Signal(SIGTERM);
  ASSERT_TRUE(Eventually([&] {
    const auto health = rpc_->Health("");
    return health.ok() && *health == kNotServing;
  }));
  auto late = FdConnect(daemon_->socket());
  ASSERT_TRUE(late.has_value());
  v1::AttachRequest request = SmallJob(*late);
  request.set_job("late");
  EXPECT_EQ(rpc_->Attach(request).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(rpc_->ListJobs()->jobs_size(), 1) << "it may go on until the deadline";
  EXPECT_EQ(daemon_->WaitExit(), 0);
  ExpectNothingLeft();
}

TEST_F(ZerodTest, SecondSigtermIsImmediate) {
  Start({"--drain-seconds", "3600"});
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value()) << daemon_->Log();
  ASSERT_TRUE(rpc_->Attach(SmallJob(*client)).ok());
  daemon_->Signal(SIGTERM);
  ASSERT_TRUE(daemon_->WaitNotified("STOPPING=1"));
  daemon_->Signal(SIGTERM);
  EXPECT_EQ(daemon_->WaitExit(), 0);
  ExpectNothingLeft();
}

TEST_F(ZerodTest, DrainByAdminEndsWithTheLastJob) {
  Start();
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value()) << daemon_->Log();
  ASSERT_TRUE(rpc_->Attach(SmallJob(*client)).ok());
  ASSERT_TRUE(rpc_->Drain().ok());
  EXPECT_TRUE(rpc_->Status()->draining());
  auto late = FdConnect(daemon_->socket());
  v1::AttachRequest request = SmallJob(*late);
  request.set_job("late");
  EXPECT_EQ(rpc_->Attach(request).status().code(), absl::StatusCode::kUnavailable);
  ASSERT_TRUE(rpc_->DeleteJob("small").ok());
  EXPECT_EQ(daemon_->WaitExit(), 0);
  ExpectNothingLeft();
}

TEST_F(ZerodTest, SocketOfADeadDaemonIsReplacedOfALivingOneNot) {
  Start();
  {
    TemporaryDirectory elsewhere;
    const Ran second = RunProgram(
        ZEROD_BINARY, {"--socket", daemon_->socket(), "--metrics-listen", "127.0.0.1:0"});
    EXPECT_EQ(second.exit_code, 1);
    EXPECT_THAT(second.err, HasSubstr("a living daemon already serves"));
  }
  ASSERT_TRUE(rpc_->GetVersion().ok()) << "the first one goes on";
  daemon_->Signal(SIGKILL);
  EXPECT_EQ(daemon_->WaitExit(), std::nullopt);
  ASSERT_TRUE(std::filesystem::exists(daemon_->socket()));
  daemon_.reset();
  Start();
  EXPECT_TRUE(rpc_->GetVersion().ok());

  daemon_.reset();
  std::filesystem::remove(directory_.path() + "/z.sock");
  std::ofstream(directory_.path() + "/z.sock") << "precious";
  const Ran other = RunProgram(
      ZEROD_BINARY, {"--socket", directory_.path() + "/z.sock", "--metrics-listen", ""});
  EXPECT_EQ(other.exit_code, 1);
  EXPECT_THAT(other.err, HasSubstr("is no socket"));
  EXPECT_TRUE(std::filesystem::is_regular_file(directory_.path() + "/z.sock"));
}

TEST_F(ZerodTest, EmbeddedEndsByItself) {
  const std::string socket = directory_.path() + "/z.sock";
  const Ran ran = RunProgram(ZEROD_BINARY, {"--embedded", "--embedded-linger-seconds", "0.3",
                                            "--socket", socket});
  EXPECT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_THAT(ran.err, HasSubstr("no job and no client"));
  ExpectNothingLeft();
}

TEST_F(ZerodTest, EmbeddedStaysForAClient) {
  const std::string socket = directory_.path() + "/z.sock";
  std::optional<FdClient> client;
  const pid_t pid = fork();
  if (pid == 0) {
    execl(ZEROD_BINARY, ZEROD_BINARY, "--embedded", "--embedded-linger-seconds", "1", "--socket",
          socket.c_str(), "--log-level", "critical", nullptr);
    _exit(127);
  }
  ASSERT_TRUE(Eventually([&] {
    client = FdConnect(socket);
    return client.has_value();
  }));
  // Three lingers long it stays, and goes when the client has gone.
  pollfd silence{client->socket.get(), POLLIN, 0};
  EXPECT_EQ(poll(&silence, 1, 3000), 0) << "the daemon closed the connection";
  client.reset();
  int status = -1;
  ASSERT_TRUE(Eventually([&] { return waitpid(pid, &status, WNOHANG) == pid; }));
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_FALSE(std::filesystem::exists(socket));
}

// Random bytes, true hellos and halves of them, descriptors that nobody asked for.
void ThrowGarbage(const std::string& path, int rounds) {
  std::mt19937_64 random(7);
  for (int i = 0; i < rounds; ++i) {
    const shm::UniqueFd fd = ConnectUnix(path);
    if (!fd) continue;
    std::string bytes(random() % 200, 0);
    for (char& c : bytes) c = static_cast<char>(random());
    if (random() % 2 == 0) {
      shm::FdHello hello{};
      hello.magic = shm::kMagic;
      hello.format_version = random() % 4 == 0 ? 99 : shm::kFormatVersion;
      bytes.insert(0, reinterpret_cast<const char*>(&hello),
                   random() % 3 == 0 ? random() % sizeof(hello) : sizeof(hello));
    }
    if (bytes.empty()) continue;
    const std::vector<int> fds(random() % 3, 1);
    shm::SendFds(fd.get(), bytes.data(), bytes.size(), fds, absl::Seconds(5)).IgnoreError();
    if (random() % 2 == 0) shutdown(fd.get(), SHUT_WR);
  }
}

TEST_F(ZerodTest, GarbageOnTheSocketsHurtsNobodyElse) {
  Start();
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value()) << daemon_->Log();
  ASSERT_TRUE(rpc_->Attach(SmallJob(*client)).ok());
  const size_t fds = daemon_->OpenFds();
  ThrowGarbage(daemon_->socket() + ".fd", 300);
  ThrowGarbage(daemon_->socket(), 100);
  EXPECT_EQ(rpc_->ListJobs()->jobs(0).clients(0).state(), "attached");
  EXPECT_TRUE(rpc_->GetVersion().ok());
  auto another = FdConnect(daemon_->socket());
  ASSERT_TRUE(another.has_value());
  EXPECT_EQ(another->welcome.code, 0u);
  another.reset();
  EXPECT_TRUE(Eventually([&] { return daemon_->OpenFds() <= fds; }))
      << daemon_->OpenFds() << " descriptors, before " << fds;
}

TEST_F(ZerodTest, ADeathIsSeenWhileAForkedChildKeepsTheConnection) {
  Start();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t trainer = fork();
  if (trainer == 0) {
    auto client = FdConnect(daemon_->socket());
    if (!client.has_value() || client->welcome.code != 0) _exit(1);
    if (!Rpc::Connect(daemon_->address())->Attach(SmallJob(*client)).ok()) _exit(2);
    const pid_t worker = fork();  // inherits the connection, as a DataLoader's worker does
    if (worker == 0) pause();
    (void)!write(ends[1], &worker, sizeof(worker));
    pause();
  }
  pid_t worker = 0;
  ASSERT_EQ(read(ends[0], &worker, sizeof(worker)), static_cast<ssize_t>(sizeof(worker)));
  EXPECT_EQ(rpc_->Status()->clients(), 1u);
  kill(trainer, SIGKILL);
  waitpid(trainer, nullptr, 0);
  EXPECT_TRUE(Eventually([&] { return rpc_->Status()->clients() == 0; }));
  EXPECT_TRUE(Eventually([&] {
    const auto jobs = rpc_->ListJobs();
    return jobs.ok() && (jobs->jobs_size() == 0 || jobs->jobs(0).clients_size() == 0 ||
                         jobs->jobs(0).clients(0).state() != "attached");
  }));
  EXPECT_EQ(kill(worker, 0), 0) << "the worker still lives";
  kill(worker, SIGKILL);
  close(ends[0]);
  close(ends[1]);
}

TEST_F(ZerodTest, ZerodctlShowsAndEndsJobs) {
  Start();
  const auto ctl = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--address", daemon_->address()});
    return RunProgram(ZERODCTL_BINARY, arguments);
  };
  EXPECT_THAT(ctl({"jobs"}).out, HasSubstr("no jobs"));
  auto client = FdConnect(daemon_->socket());
  ASSERT_TRUE(client.has_value()) << daemon_->Log();
  ASSERT_TRUE(rpc_->Attach(SmallJob(*client)).ok());
  EXPECT_THAT(ctl({"status"}).out, HasSubstr("jobs       1"));
  EXPECT_THAT(ctl({"jobs"}).out, HasSubstr("small: "));
  EXPECT_THAT(ctl({"--json", "jobs"}).out, HasSubstr("\"parameters\": 256"));
  EXPECT_THAT(ctl({"jobs", "--json"}).out, HasSubstr("\"parameters\": 256"));
  EXPECT_THAT(ctl({"top", "--once"}).out, HasSubstr("small"));

  EXPECT_EQ(ctl({"jobs", "delete", "other"}).exit_code, 1);
  EXPECT_EQ(ctl({"jobs", "delete", "small"}).exit_code, 0);
  EXPECT_THAT(ctl({"jobs"}).out, HasSubstr("no jobs"));
  EXPECT_EQ(ctl({"drain"}).exit_code, 0);
  EXPECT_EQ(daemon_->WaitExit(), 0);
  const Ran nobody = ctl({"status"});
  EXPECT_EQ(nobody.exit_code, 1);
  EXPECT_THAT(nobody.err, HasSubstr("no daemon answers at"));
}

TEST(ZerodCommandLine, VersionHelpAndCheckConfig) {
  const Ran version = RunProgram(ZEROD_BINARY, {"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, HasSubstr("zerod 0."));
  const Ran help = RunProgram(ZEROD_BINARY, {"--help"});
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.out, HasSubstr("--metrics-listen"));
  const Ran checked =
      RunProgram(ZEROD_BINARY, {"--config", ZEROD_EXAMPLE_CONFIG, "--check-config"});
  EXPECT_EQ(checked.exit_code, 0) << checked.err;
  EXPECT_THAT(checked.out, HasSubstr("metrics_listen"));
  EXPECT_EQ(RunProgram(ZEROD_BINARY, {"--nonsense"}).exit_code, 2);
}

// What a configuration comes to needs no daemon: there is none at this address.
TEST(ZerodCommandLine, ZerodctlChecksConfigurations) {
  const TemporaryDirectory directory;
  const std::string file = directory.path() + "/config.json";
  const auto check = [&file](const std::string& text, std::vector<std::string> more) {
    std::ofstream(file) << text;
    more.insert(more.begin(), {"--address", "/nowhere", "check-config", file});
    return RunProgram(ZERODCTL_BINARY, more);
  };
  const Ran plain = check("{train_micro_batch_size_per_gpu: 3, bfloat16: {enabled: true}}",
                          {"--world", "4"});
  EXPECT_EQ(plain.exit_code, 0) << plain.err;
  EXPECT_THAT(plain.out, HasSubstr("= 12  (derived: micro batch x accumulation steps x ranks)"));
  EXPECT_THAT(plain.out, HasSubstr("warning: bfloat16: is deprecated"));
  EXPECT_THAT(plain.out, HasSubstr("= true  (file, deprecated: as bfloat16)"));

  const Ran json = check("{train_batch_size: 3}", {"--json"});
  EXPECT_EQ(json.exit_code, 0) << json.err;
  EXPECT_THAT(json.out, HasSubstr("\"train_micro_batch_size_per_gpu\": \"derived"));

  const char kAuto[] = R"({"train_batch_size": "auto", "zero_optimization":
      {"stage": 3, "stage3_param_persistence_threshold": "auto"}})";
  const Ran resolved = check(kAuto, {"--hidden-size", "64", "--auto", "train_batch_size=8"});
  EXPECT_EQ(resolved.exit_code, 0) << resolved.err;
  EXPECT_THAT(resolved.out, HasSubstr("= 640  (auto: 10 * hidden_size, hidden_size 64)"));
  const Ran unresolved = check(kAuto, {});
  EXPECT_EQ(unresolved.exit_code, 1);
  EXPECT_THAT(unresolved.err, HasSubstr("cannot be resolved for train_batch_size, zero_opt"));

  const Ran wrong = check(R"({"train_batch_size": 0, "gradient_cliping": 1})", {});
  EXPECT_EQ(wrong.exit_code, 1);
  EXPECT_EQ(wrong.out, "");
  EXPECT_THAT(wrong.err, HasSubstr("train_batch_size: 0 is not allowed"));
  EXPECT_THAT(wrong.err, HasSubstr("did you mean \"gradient_clipping\"?"));
  EXPECT_EQ(check(R"({"train_batch_size": 1, "mine": 1})", {"--deepspeed"}).exit_code, 0);
  std::filesystem::remove(file);
  EXPECT_EQ(RunProgram(ZERODCTL_BINARY, {"check-config", file}).exit_code, 1);
  const Ran keys = RunProgram(ZERODCTL_BINARY, {"config-keys"});
  EXPECT_EQ(keys.exit_code, 0);
  EXPECT_THAT(keys.out, HasSubstr("| `gradient_clipping` | works |"));
}

}  // namespace
}  // namespace zerod::server::testing
