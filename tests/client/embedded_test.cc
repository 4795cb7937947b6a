// SPDX-License-Identifier: Apache-2.0
//
// Starting a daemon: what it inherits, one starter at a time, and what is said when it does not
// come. The "daemon" is a shell script.
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/embedded.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace zerod::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

class Embedded : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/zerod_embedded_test.XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    directory_ = name;
    paths_ = {directory_ + "/run", directory_ + "/run/d.sock", directory_ + "/run/d.log",
              directory_ + "/run/d.lock"};
  }
  void TearDown() override {
    unsetenv("ZEROD_DAEMON");
    std::ifstream pids(directory_ + "/pids");
    for (pid_t pid; pids >> pid;) kill(pid, SIGKILL);
    (void)!system(("rm -rf " + directory_).c_str());
  }
  // A daemon that notes its pid, does `body` and, where it says `wait`, stays.
  void Daemon(const std::string& body) {
    const std::string path = directory_ + "/daemon";
    std::ofstream(path) << "#!/bin/sh\necho $$ >> " << directory_ << "/pids\n" << body << "\n";
    chmod(path.c_str(), 0755);
    setenv("ZEROD_DAEMON", path.c_str(), 1);
  }
  bool Answers() const { return access(paths_.socket.c_str(), F_OK) == 0; }
  absl::Status Start(absl::Duration limit = absl::Seconds(20)) {
    return StartEmbedded(paths_, limit, [&] { return Answers(); }, [] { return false; });
  }

  std::string directory_;
  EmbeddedPaths paths_;
};

TEST_F(Embedded, ADaemonThatEndsIsQuotedFromItsLog) {
  Daemon("echo 'the window does not fit' >&2; exit 1");
  const absl::Status status = Start();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the window does not fit"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(paths_.log));
}

TEST_F(Embedded, ADaemonThatNeverAnswersIsGivenUp) {
  Daemon("echo starting; exec sleep 1000");
  const absl::Status status = Start(absl::Milliseconds(300));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("does not answer"));
}

TEST_F(Embedded, AnInterruptEndsTheWait) {
  Daemon("exec sleep 1000");
  const absl::Status status = StartEmbedded(
      paths_, absl::Seconds(60), [] { return false; }, [] { return true; });
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
}

TEST_F(Embedded, AMissingProgramIsNamed) {
  setenv("ZEROD_DAEMON", "/nonexistent/zerod", 1);
  EXPECT_THAT(std::string(Start().message()), HasSubstr("/nonexistent/zerod"));
}

TEST_F(Embedded, AProgramThatCannotRunIsNamed) {
  const std::string path = directory_ + "/broken";
  std::ofstream(path) << "#!/nonexistent/interpreter\n";
  chmod(path.c_str(), 0755);
  setenv("ZEROD_DAEMON", path.c_str(), 1);
  const absl::Status status = Start();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cannot run"));
}

TEST_F(Embedded, NothingIsInherited) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);  // no CLOEXEC: a launcher's pipe
  ASSERT_LT(ends[1], 10);
  signal(SIGUSR1, SIG_IGN);
  Daemon("ls /proc/$$/fd > " + directory_ + "/fds; echo arguments: $@; pwd;"
         "echo session: $(cut -d' ' -f6 /proc/$$/stat) group: $(cut -d' ' -f5 /proc/$$/stat);"
         "grep SigIgn /proc/$$/status; umask; touch " + paths_.socket + "; exec sleep 1000");
  ASSERT_TRUE(Start().ok());
  signal(SIGUSR1, SIG_DFL);
  const std::string log = ReadFile(paths_.log);
  std::istringstream fds(ReadFile(directory_ + "/fds"));
  for (int fd; fds >> fd;) {
    EXPECT_TRUE(fd <= 2 || fd >= 10) << fd;  // from 10: the shell's own
    EXPECT_THAT(fd, Not(::testing::AnyOf(ends[0], ends[1])));
  }
  EXPECT_THAT(log, HasSubstr("arguments: --embedded --socket " + paths_.socket + "\n/\n"));
  EXPECT_THAT(log, Not(HasSubstr(absl::StrCat("session: ", getsid(0), " "))));
  EXPECT_THAT(log, Not(HasSubstr(absl::StrCat("group: ", getpgrp(), "\n"))));
  EXPECT_THAT(log, HasSubstr("SigIgn:\t0000000000000000"));
  EXPECT_THAT(log, HasSubstr("0077"));
  struct stat directory {};
  ASSERT_EQ(stat(paths_.directory.c_str(), &directory), 0);
  EXPECT_EQ(directory.st_mode & 0777, 0700u);
  // It is nobody's child here.
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1);
  close(ends[0]);
  close(ends[1]);
}

TEST_F(Embedded, TwoStartersStartOne) {
  Daemon("touch " + paths_.socket + "; exec sleep 1000");
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      if (!Start().ok()) ++failures;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  std::istringstream pids(ReadFile(directory_ + "/pids"));
  int count = 0;
  for (pid_t pid; pids >> pid;) ++count;
  EXPECT_EQ(count, 1);
}

TEST_F(Embedded, AForeignDirectoryIsRefused) {
  Daemon("exit 0");
  ASSERT_EQ(mkdir(paths_.directory.c_str(), 0755), 0);
  ASSERT_EQ(chmod(paths_.directory.c_str(), 0777), 0);
  EXPECT_EQ(Start().code(), absl::StatusCode::kPermissionDenied);
}

TEST(EmbeddedPaths, FitASocketsNameWhateverTheJobIsCalled) {
  setenv("XDG_RUNTIME_DIR", "/nonexistent", 1);
  const std::string long_job(128, 'x');
  for (const std::string& job : {std::string("plain-job_1.2"), long_job, std::string("../escape"),
                                 std::string()}) {
    const EmbeddedPaths paths = EmbeddedPathsOf(job, 12);
    EXPECT_LT(paths.socket.size() + 3, 100u) << job;
    EXPECT_EQ(paths.socket.find(".."), std::string::npos);
    EXPECT_EQ(paths.directory, absl::StrCat("/tmp/zerod-", geteuid()));
  }
  EXPECT_THAT(EmbeddedPathsOf("plain-job_1.2", 3).socket, HasSubstr("/plain-job_1.2.3.sock"));
  EXPECT_NE(EmbeddedPathsOf(long_job, 0).socket, EmbeddedPathsOf(long_job + "y", 0).socket);
  unsetenv("XDG_RUNTIME_DIR");
}

}  // namespace
}  // namespace zerod::client
