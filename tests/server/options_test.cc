// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/options.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "daemon/server/systemd.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/shm/fd_passing.h"

namespace zerod::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class OptionsTest : public ::testing::Test {
 protected:
  OptionsTest() {
    char pattern[] = "/tmp/zerod-options-XXXXXX";
    directory_ = mkdtemp(pattern);
    unsetenv("RUNTIME_DIRECTORY");
  }
  ~OptionsTest() override {
    unlink((directory_ + "/zerod.yaml").c_str());
    rmdir(directory_.c_str());
  }
  absl::StatusOr<CommandLine> Parse(std::vector<std::string> arguments,
                                    const std::string& yaml = "") {
    if (!yaml.empty()) {
      const std::string path = directory_ + "/zerod.yaml";
      std::ofstream(path) << yaml;
      arguments.insert(arguments.begin(), {"--config", path});
    }
    std::vector<const char*> argv = {"zerod"};
    for (const std::string& a : arguments) argv.push_back(a.c_str());
    return ParseCommandLine(static_cast<int>(argv.size()), argv.data());
  }
  std::string Error(std::vector<std::string> arguments, const std::string& yaml = "") {
    const auto line = Parse(std::move(arguments), yaml);
    EXPECT_EQ(line.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(line.status().message());
  }

  std::string directory_;
};

TEST_F(OptionsTest, Defaults) {
  const auto line = Parse({});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->action, CommandLine::Action::kRun);
  const Options& o = line->options;
  EXPECT_EQ(o.socket, "/run/zerod/zerod.sock");
  EXPECT_EQ(o.socket_mode, 0600u);
  EXPECT_EQ(o.peer_listen, "127.0.0.1:0");
  EXPECT_EQ(o.metrics_listen, "127.0.0.1:9470");
  EXPECT_GE(o.worker_threads, 1u);
  EXPECT_EQ(o.limits.lease, absl::Seconds(5));
  EXPECT_EQ(Parse({"--embedded"})->options.metrics_listen, "127.0.0.1:0");
  EXPECT_EQ(Parse({"--metrics-listen", ""})->options.metrics_listen, "");
  setenv("RUNTIME_DIRECTORY", "/run/one:/run/two", 1);
  EXPECT_EQ(Parse({})->options.socket, "/run/one/zerod.sock");
}

TEST_F(OptionsTest, FileAndFlagsAreOneSetAndFlagsWin) {
  const auto line = Parse({"--lease-seconds", "3", "--allow-uid", "7"},
                          "socket: /tmp/x/z.sock\nsocket_mode: \"0660\"\nallow_gid: [1, 2]\n"
                          "allow_uid: []\nlease_seconds: 9\ninsecure_peers: true\n"
                          "peer_listen: 10.0.0.1:9471\nmetrics_listen: \"\"\nlog_level: debug\n");
  ASSERT_TRUE(line.ok()) << line.status();
  const Options& o = line->options;
  EXPECT_EQ(o.socket, "/tmp/x/z.sock");
  EXPECT_EQ(o.socket_mode, 0660u);
  EXPECT_THAT(o.allow_gids, ElementsAre(1, 2));
  EXPECT_THAT(o.allow_uids, ElementsAre(7));
  EXPECT_EQ(o.limits.lease, absl::Seconds(3));
  EXPECT_EQ(o.peer_listen, "10.0.0.1:9471");
  EXPECT_EQ(o.metrics_listen, "");
  EXPECT_EQ(o.log_level, "debug");
}

TEST_F(OptionsTest, TheFileSaysWhatIsWrong) {
  EXPECT_THAT(Error({}, "metric_listen: 127.0.0.1:1\n"),
              HasSubstr("unknown key \"metric_listen\"; did you mean \"metrics_listen\"?"));
  EXPECT_THAT(Error({}, "qqqqqqqqqq: 1\n"), HasSubstr("served are: socket, socket_mode"));
  EXPECT_THAT(Error({}, "config: other.yaml\n"), HasSubstr("unknown key \"config\""));
  EXPECT_THAT(Error({}, "check_config: true\n"), HasSubstr("unknown key"));
  EXPECT_THAT(Error({}, "log_level: info\nlog_level: debug\n"), HasSubstr("twice"));
  EXPECT_THAT(Error({}, "- a\n- b\n"), HasSubstr("must be a map"));
  EXPECT_THAT(Error({}, "a: [b\n"), HasSubstr("not YAML"));
  EXPECT_THAT(Error({}, "log_level: {a: b}\n"), HasSubstr("log_level"));
  EXPECT_THAT(Error({}, "log_level: []\n"), HasSubstr("empty list"));
  EXPECT_THAT(Error({}, "log_level:\n"), HasSubstr("log_level"));
  EXPECT_THAT(Error({}, "worker_threads: many\n"), HasSubstr("many"));
  EXPECT_THAT(Error({}, "worker_threads: -1\n"), HasSubstr("-1"));
  EXPECT_THAT(Error({"--config", "/nowhere/zerod.yaml"}), HasSubstr("/nowhere/zerod.yaml"));
}

TEST_F(OptionsTest, ValuesAreChecked) {
  EXPECT_THAT(Error({"--peer-listen", "0.0.0.0:1"}), HasSubstr("--insecure-peers"));
  EXPECT_THAT(Error({"--peer-listen", "10.0.0.1:1"}), HasSubstr("--insecure-peers"));
  EXPECT_THAT(Error({"--insecure-peers", "--peer-listen", "0.0.0.0:1"}),
              HasSubstr("--peer-advertise"));
  EXPECT_TRUE(Parse({"--insecure-peers", "--peer-listen", "0.0.0.0:1", "--peer-advertise",
                     "node7:1"}).ok());
  EXPECT_THAT(Error({"--peer-listen", "9471"}), HasSubstr("HOST:PORT"));
  EXPECT_THAT(Error({"--metrics-listen", ":1"}), HasSubstr("HOST:PORT"));
  EXPECT_THAT(Error({"--socket", "z.sock"}), HasSubstr("absolute"));
  EXPECT_THAT(Error({"--socket", "/" + std::string(200, 'x')}), HasSubstr("shorter"));
  EXPECT_THAT(Error({"--socket-mode", "0999"}), HasSubstr("octal"));
  EXPECT_THAT(Error({"--socket-mode", "0060"}), HasSubstr("owner"));
  EXPECT_THAT(Error({"--lease-seconds", "0"}), HasSubstr("--lease-seconds"));
  EXPECT_THAT(Error({"--lease-seconds", "nan"}), HasSubstr("--lease-seconds"));
  EXPECT_THAT(Error({"--log-level", "loud"}), HasSubstr("one of trace"));
  EXPECT_THAT(Error({"extra"}), HasSubstr("extra"));
}

TEST_F(OptionsTest, TheTimesStayInOrderWithEveryLease) {
  EXPECT_TRUE(Limits().CheckOrder().ok()) << Limits().CheckOrder();
  for (const char* lease : {"0.5", "1", "5", "29", "31", "600", "3600"}) {
    const auto line = Parse({"--lease-seconds", lease});
    ASSERT_TRUE(line.ok()) << line.status();
    EXPECT_TRUE(line->options.limits.CheckOrder().ok()) << lease;
  }
  Limits limits;
  limits.heartbeat_interval = limits.lease;
  EXPECT_THAT(std::string(limits.CheckOrder().message()), HasSubstr("heartbeat_interval"));
  limits = Limits();
  limits.fabric_stall = limits.lease;
  EXPECT_THAT(std::string(limits.CheckOrder().message()), HasSubstr("fabric_stall"));
}

TEST(HostPort, Parses) {
  EXPECT_EQ(ParseHostPort("node7:80")->host, "node7");
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]:80")->port, 80);
  for (const char* bad :
       {"", ":", ":80", "node7", "node7:", "::1:80", "[]:80", "a:65536", "a:-1"}) {
    EXPECT_FALSE(ParseHostPort(bad).ok()) << bad;
  }
  EXPECT_TRUE(IsLoopback("127.8.9.1"));
  EXPECT_TRUE(IsLoopback("::1"));
  EXPECT_FALSE(IsLoopback("0.0.0.0"));
  EXPECT_FALSE(IsLoopback("node7"));
}

TEST(Systemd, WatchdogIsForThisProcessOnly) {
  unsetenv("WATCHDOG_PID");
  unsetenv("WATCHDOG_USEC");
  EXPECT_FALSE(SystemdWatchdogInterval().has_value());
  setenv("WATCHDOG_USEC", "3000000", 1);
  EXPECT_EQ(SystemdWatchdogInterval(), absl::Milliseconds(1500));
  setenv("WATCHDOG_PID", "1", 1);
  EXPECT_FALSE(SystemdWatchdogInterval().has_value());
  setenv("WATCHDOG_PID", std::to_string(getpid()).c_str(), 1);
  EXPECT_TRUE(SystemdWatchdogInterval().has_value());
  setenv("WATCHDOG_USEC", "soon", 1);
  EXPECT_FALSE(SystemdWatchdogInterval().has_value());
}

TEST(Systemd, SpeaksToAnAbstractSocket) {
  shm::UniqueFd fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = "zerod-test-" + std::to_string(getpid());
  memcpy(address.sun_path + 1, name.data(), name.size());
  const socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  ASSERT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  setenv("NOTIFY_SOCKET", ("@" + name).c_str(), 1);
  EXPECT_TRUE(NotifySystemd("READY=1").ok());
  char text[64];
  EXPECT_EQ(recv(fd.get(), text, sizeof(text), MSG_DONTWAIT), 7);
  setenv("NOTIFY_SOCKET", "relative", 1);
  EXPECT_FALSE(NotifySystemd("READY=1").ok());
  unsetenv("NOTIFY_SOCKET");
  EXPECT_TRUE(NotifySystemd("READY=1").ok());
}

}  // namespace
}  // namespace zerod::server
