// SPDX-License-Identifier: Apache-2.0
//
// Real processes: one is killed, stopped or cut off in the middle of a transfer; the survivors
// say so in time, and get away.
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace zerod::fabric {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kStallMs = 1000;
constexpr auto kSlack = std::chrono::milliseconds(2500);  // a loaded machine's

// A child process whose standard output is read line by line.
class Process {
 public:
  explicit Process(const std::vector<std::string>& arguments) {
    int ends[2];
    if (pipe(ends) != 0) return;
    pid_ = fork();
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      close(ends[0]);
      close(ends[1]);
      std::vector<char*> argv;
      for (const std::string& each : arguments) argv.push_back(const_cast<char*>(each.c_str()));
      argv.push_back(nullptr);
      execvp(argv[0], argv.data());
      _exit(127);
    }
    close(ends[1]);
    output_ = ends[0];
  }
  ~Process() {
    if (pid_ > 0 && !reaped_) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    if (output_ >= 0) close(output_);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void Signal(int signal) { kill(pid_, signal); }

  // The next line that begins with `beginning`; empty where it does not come in time.
  std::string AwaitLine(const std::string& beginning, std::chrono::milliseconds timeout) {
    const auto deadline = Clock::now() + timeout;
    for (;;) {
      for (size_t end; (end = buffer_.find('\n')) != std::string::npos;) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        if (absl::StartsWith(line, beginning)) return line;
      }
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
      pollfd ready = {output_, POLLIN, 0};
      if (left.count() <= 0 || poll(&ready, 1, static_cast<int>(left.count())) <= 0) return "";
      char chunk[4096];
      const ssize_t bytes = read(output_, chunk, sizeof(chunk));
      if (bytes <= 0) return "";
      buffer_.append(chunk, static_cast<size_t>(bytes));
    }
  }

  // The exit status; REQUIRES: its output ended or it is about to end.
  int Wait() {
    int status = -1;
    waitpid(pid_, &status, 0);
    reaped_ = true;
    return status;
  }

 private:
  pid_t pid_ = -1;
  int output_ = -1;
  bool reaped_ = false;
  std::string buffer_;
};

bool RunCommand(const std::vector<std::string>& arguments) {
  return Process(arguments).Wait() == 0;
}

class ProcessTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/fabric_test_XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    directory_ = name;
  }
  void TearDown() override {
    members_.clear();
    std::filesystem::remove_all(directory_);
  }

  // `prefix` comes before the command of the member.
  void StartMember(int rank, int size, const std::string& host,
                   std::vector<std::string> prefix = {}) {
    for (const std::string& each :
         {std::string(FABRIC_MEMBER_PATH), directory_, absl::StrCat(rank), absl::StrCat(size),
          host, absl::StrCat(kStallMs), std::string("33554432")}) {
      prefix.push_back(each);
    }
    members_.push_back(std::make_unique<Process>(prefix));
  }
  void StartOnLoopback(int size) {
    for (int rank = 0; rank < size; ++rank) StartMember(rank, size, "127.0.0.1");
    AwaitMoving();
  }
  void AwaitMoving() {
    for (auto& member : members_) {
      ASSERT_EQ(member->AwaitLine("moving", std::chrono::seconds(20)), "moving");
    }
  }
  // The member says that it ended with `code`, destroys its fabric and exits, all in time.
  void ExpectEnd(int rank, const std::string& code, std::chrono::milliseconds timeout) {
    Process& member = *members_[rank];
    const std::string line = member.AwaitLine("ended", timeout);
    EXPECT_TRUE(absl::StartsWith(line, "ended " + code)) << "rank " << rank << ": '" << line << "'";
    ASSERT_EQ(member.AwaitLine("destroyed", kSlack), "destroyed") << rank;
    EXPECT_EQ(member.Wait(), 0);
  }

  std::string directory_;
  std::vector<std::unique_ptr<Process>> members_;
};

TEST_F(ProcessTest, KilledPeerIsUnavailableAtOnce) {
  ASSERT_NO_FATAL_FAILURE(StartOnLoopback(3));
  members_[2]->Signal(SIGKILL);
  ExpectEnd(0, "UNAVAILABLE", kSlack);
  ExpectEnd(1, "UNAVAILABLE", kSlack);
}

TEST_F(ProcessTest, StoppedPeerIsAStall) {
  ASSERT_NO_FATAL_FAILURE(StartOnLoopback(2));
  members_[1]->Signal(SIGSTOP);
  ExpectEnd(0, "DEADLINE_EXCEEDED", std::chrono::milliseconds(kStallMs) + kSlack);
  members_[1]->Signal(SIGCONT);
  // It finds its peer gone, or has been silent by its own clock.
  EXPECT_NE(members_[1]->AwaitLine("ended", std::chrono::milliseconds(kStallMs) + kSlack), "");
  EXPECT_EQ(members_[1]->AwaitLine("destroyed", kSlack), "destroyed");
}

TEST_F(ProcessTest, ShortStopIsNoStall) {
  ASSERT_NO_FATAL_FAILURE(StartOnLoopback(2));
  members_[1]->Signal(SIGSTOP);
  EXPECT_EQ(members_[0]->AwaitLine("ended", std::chrono::milliseconds(kStallMs / 3)), "");
  members_[1]->Signal(SIGCONT);
  EXPECT_EQ(members_[0]->AwaitLine("ended", std::chrono::milliseconds(2 * kStallMs)), "");
}

// Two hosts, each a network namespace of this test's own, joined by a veth pair.
class NetworkTest : public ProcessTest {
 protected:
  void SetUp() override {
    ProcessTest::SetUp();
    if (geteuid() != 0) GTEST_SKIP() << "network namespaces need root";
    for (int host = 0; host < 2; ++host) {
      namespaces_.push_back(absl::StrCat("zerod-fabric-", getpid(), "-", host));
      links_.push_back(absl::StrCat("zf", getpid() % 100000, "h", host));
      if (!RunCommand({"ip", "netns", "add", namespaces_[host]})) {
        GTEST_SKIP() << "no network namespaces here (no `ip`, or not permitted)";
      }
    }
    ASSERT_TRUE(RunCommand({"ip", "link", "add", links_[0], "netns", namespaces_[0], "type",
                            "veth", "peer", "name", links_[1], "netns", namespaces_[1]}));
    for (int host = 0; host < 2; ++host) {
      ASSERT_TRUE(In(host, {"ip", "address", "add", absl::StrCat("10.77.0.", host + 1, "/24"),
                            "dev", links_[host]}));
      ASSERT_TRUE(In(host, {"ip", "link", "set", links_[host], "up"}));
      ASSERT_TRUE(In(host, {"ip", "link", "set", "lo", "up"}));
      StartMember(host, 2, absl::StrCat("10.77.0.", host + 1), Prefix(host));
    }
    AwaitMoving();
  }
  void TearDown() override {
    ProcessTest::TearDown();
    for (const std::string& each : namespaces_) RunCommand({"ip", "netns", "delete", each});
  }
  std::vector<std::string> Prefix(int host) {
    return {"ip", "netns", "exec", namespaces_[host]};
  }
  bool In(int host, const std::vector<std::string>& command) {
    std::vector<std::string> all = Prefix(host);
    all.insert(all.end(), command.begin(), command.end());
    return RunCommand(all);
  }

  std::vector<std::string> namespaces_;
  std::vector<std::string> links_;
};

// No reset, no end of file: packets are lost from now on, and nobody says so.
TEST_F(NetworkTest, SilentCutIsAStallOnBothSides) {
  ASSERT_TRUE(In(1, {"ip", "link", "set", links_[1], "down"}));
  ExpectEnd(0, "DEADLINE_EXCEEDED", std::chrono::milliseconds(kStallMs) + kSlack);
  ExpectEnd(1, "DEADLINE_EXCEEDED", std::chrono::milliseconds(kStallMs) + kSlack);
}

// A slow network is not a silent one: 4 MB/s, where 32 MiB take several stall timeouts.
TEST_F(NetworkTest, SlowNetworkIsNoStall) {
  for (int host = 0; host < 2; ++host) {
    if (!In(host, {"tc", "qdisc", "add", "dev", links_[host], "root", "tbf", "rate", "32mbit",
                   "burst", "64kb", "latency", "200ms"})) {
      GTEST_SKIP() << "no `tc` with a token bucket here";
    }
  }
  EXPECT_EQ(members_[0]->AwaitLine("ended", std::chrono::milliseconds(5 * kStallMs)), "");
}

}  // namespace
}  // namespace zerod::fabric
