// SPDX-License-Identifier: Apache-2.0
//
// What a client says when the one at the other end of the fd socket is not the daemon it wants.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "client/cpp/rpc.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/fd_socket.h"
#include "proto/version.h"

namespace zerod::client {
namespace {

using ::testing::HasSubstr;

// Listens where a daemon's fd socket would be, and does `serve` for each connection.
class Listener {
 public:
  explicit Listener(std::function<void(int)> serve) {
    char name[] = "/tmp/zerod_attach_test.XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    directory_ = name;
    const std::string path = directory_ + "/d.sock.fd";
    socket_.Reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    memcpy(at.sun_path, path.c_str(), path.size() + 1);
    CHECK(bind(socket_.get(), reinterpret_cast<const sockaddr*>(&at), sizeof(at)) == 0);
    CHECK(listen(socket_.get(), 8) == 0);
    thread_ = std::thread([this, serve = std::move(serve)] {
      for (;;) {
        const shm::UniqueFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (!connection) return;
        ++connections;
        serve(connection.get());
      }
    });
  }
  ~Listener() {
    shutdown(socket_.get(), SHUT_RDWR);  // ends accept
    thread_.join();
    unlink((directory_ + "/d.sock.fd").c_str());
    rmdir(directory_.c_str());
  }
  AttachOptions Options() const {
    AttachOptions options;
    options.address = absl::StrCat("unix:", directory_, "/d.sock");
    options.job = "job";
    options.attach_timeout_seconds = 0.3;
    options.takeover_seconds = 0.3;
    return options;
  }

  std::atomic<int> connections{0};

 private:
  std::string directory_;
  shm::UniqueFd socket_;
  std::thread thread_;
};

void Welcome(int socket, const shm::FdWelcome& welcome) {
  shm::FdHello hello;
  CHECK(shm::ReceiveFds(socket, &hello, sizeof(hello), 0, absl::Seconds(10)).ok());
  CHECK_EQ(hello.magic, shm::kMagic);
  CHECK_EQ(hello.format_version, shm::kFormatVersion);
  CHECK(shm::SendFds(socket, &welcome, sizeof(welcome), {}, absl::Seconds(10)).ok());
}

shm::FdWelcome Refusal(absl::StatusCode code, const char* text) {
  shm::FdWelcome welcome{};
  welcome.magic = shm::kMagic;
  welcome.format_version = shm::kFormatVersion;
  welcome.code = static_cast<uint32_t>(code);
  strncpy(welcome.text, text, sizeof(welcome.text) - 1);
  return welcome;
}

TEST(Attach, ARefusalIsPassedOnAtOnce) {
  Listener listener([](int socket) {
    Welcome(socket, Refusal(absl::StatusCode::kPermissionDenied, "user 7 may not connect"));
  });
  const auto client = Client::Attach(listener.Options());
  EXPECT_EQ(client.status(), absl::PermissionDeniedError("user 7 may not connect"));
  EXPECT_EQ(listener.connections, 1);
}

TEST(Attach, NotNowIsAskedAgain) {
  Listener listener([](int socket) {
    Welcome(socket, Refusal(absl::StatusCode::kUnavailable, "the daemon drains"));
  });
  const auto client = Client::Attach(listener.Options());
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("the daemon drains"));
  EXPECT_GT(listener.connections, 2);
}

TEST(Attach, ALivingPredecessorIsWaitedForThenNamed) {
  Listener listener([](int socket) {
    Welcome(socket, Refusal(absl::StatusCode::kAlreadyExists, "rank 0 is process 4711"));
  });
  const absl::Time start = absl::Now();
  const auto client = Client::Attach(listener.Options());
  EXPECT_EQ(client.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("process 4711"));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(300));
  EXPECT_GT(listener.connections, 2);
}

TEST(Attach, WhatIsNoDaemonIsSaidToBeNone) {
  Listener listener([](int socket) { Welcome(socket, shm::FdWelcome{}); });
  const auto client = Client::Attach(listener.Options());
  EXPECT_EQ(client.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(client.status().message()), HasSubstr("no zerod daemon"));
}

TEST(Attach, OneThatHangsUpIsUnavailable) {
  Listener listener([](int) {});
  EXPECT_EQ(Client::Attach(listener.Options()).status().code(), absl::StatusCode::kUnavailable);
}

TEST(Attach, ALongWaitIsTold) {
  Listener listener([](int socket) {
    Welcome(socket, Refusal(absl::StatusCode::kUnavailable, "the daemon drains"));
  });
  AttachOptions options = listener.Options();
  options.attach_timeout_seconds = 600;
  options.notice_seconds = 0.01;
  std::vector<std::string> told;
  options.on_wait = [&](const std::string& text) { told.push_back(text); };
  options.interrupt = [&] { return told.size() == 2; };
  EXPECT_EQ(Client::Attach(options).status().code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(told[1], HasSubstr("still attaching after"));
  EXPECT_THAT(told[1], HasSubstr("for 600 s at most: the daemon drains"));
}

TEST(Attach, AnInterruptEndsTheTries) {
  Listener listener([](int socket) {
    Welcome(socket, Refusal(absl::StatusCode::kUnavailable, "the daemon drains"));
  });
  AttachOptions options = listener.Options();
  options.attach_timeout_seconds = 600;
  options.interrupt = [&] { return listener.connections > 1; };
  EXPECT_EQ(Client::Attach(options).status().code(), absl::StatusCode::kCancelled);
}

TEST(Attach, OptionsThatCannotWorkAreRefusedWithoutADaemon) {
  unsetenv("ZEROD_ADDRESS");
  unsetenv("ZEROD_JOB");
  unsetenv("TORCHELASTIC_RUN_ID");
  AttachOptions options;
  options.job = "job";
  options.embedded = false;
  EXPECT_THAT(std::string(Client::Attach(options).status().message()), HasSubstr("ZEROD_ADDRESS"));
  options.address = "localhost:50051";
  EXPECT_EQ(Client::Attach(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.address = "unix:/" + std::string(120, 'x');
  EXPECT_EQ(Client::Attach(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.address = "unix:/tmp/x";
  options.parameters = {{"w", {3, -1}, true, 0, {""}}};
  EXPECT_THAT(std::string(Client::Attach(options).status().message()), HasSubstr("'w'"));
  options.job.clear();
  options.world = 2;
  EXPECT_THAT(std::string(Client::Attach(options).status().message()), HasSubstr("ZEROD_JOB"));
}

TEST(Version, OtherOnesAreRefusedWithBothNames) {
  DaemonVersion daemon{"9.9.9", kProtocolVersion, shm::kFormatVersion, "boot", ""};
  EXPECT_TRUE(CheckVersion(daemon, "unix:/x").ok());
  daemon.protocol = kProtocolVersion + 1;
  absl::Status status = CheckVersion(daemon, "unix:/x");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("9.9.9"));
  EXPECT_THAT(std::string(status.message()), HasSubstr(ZEROD_VERSION));
  daemon.protocol = kProtocolVersion;
  daemon.shm_format = shm::kFormatVersion + 1;
  EXPECT_FALSE(CheckVersion(daemon, "unix:/x").ok());
}

}  // namespace
}  // namespace zerod::client
