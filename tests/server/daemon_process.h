// SPDX-License-Identifier: Apache-2.0
//
// A real zerod for tests: started on sockets in a temporary directory, ended with the object.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/fd_socket.h"

namespace zerod::server::testing {

inline constexpr std::chrono::seconds kPatience{30};

// True as soon as `condition` is, false after `patience`.
bool Eventually(const std::function<bool()>& condition,
                absl::Duration patience = absl::FromChrono(kPatience));

class TemporaryDirectory {
 public:
  TemporaryDirectory();   // anyone may look into it
  ~TemporaryDirectory();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// What a program that ends by itself said and how it ended.
struct Ran {
  int exit_code = -1;  // -1: a signal, or it did not end
  std::string out;
  std::string err;
};
Ran RunProgram(const std::string& program, const std::vector<std::string>& arguments);

class DaemonProcess {
 public:
  // Waits for READY=1; ready() is false where it ended or did not come. `--socket` and a metrics
  // port are added to the arguments.
  DaemonProcess(const std::string& directory, std::vector<std::string> arguments);
  ~DaemonProcess();  // SIGKILL where it still runs

  bool ready() const { return ready_; }
  pid_t pid() const { return pid_; }
  std::string socket() const { return directory_ + "/z.sock"; }
  std::string address() const { return "unix:" + socket(); }
  std::string Log() const;
  void Signal(int signal_number);
  // Its exit code once it has ended; nullopt after kPatience or for a death by signal.
  std::optional<int> WaitExit();
  // The next datagrams that a service manager would get, until one has `text`.
  bool WaitNotified(const std::string& text);
  size_t OpenFds() const;

 private:
  const std::string directory_;
  pid_t pid_ = -1;
  bool ready_ = false;
  shm::UniqueFd pidfd_;
  shm::UniqueFd notify_;
};

// A connection to a Unix socket, or an empty fd.
shm::UniqueFd ConnectUnix(const std::string& path);

// The fd socket's handshake. The connection is the client's life.
struct FdClient {
  shm::UniqueFd socket;
  shm::FdWelcome welcome{};
  std::string token() const;
};
std::optional<FdClient> FdConnect(const std::string& grpc_socket);

}  // namespace zerod::server::testing
