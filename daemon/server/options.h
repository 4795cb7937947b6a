// SPDX-License-Identifier: Apache-2.0
//
// What an operator may say to the daemon, by flags and by a YAML file (--config): one set of
// names, `--metrics-listen` being `metrics_listen` in the file. Flags win.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/server/limits.h"

namespace zerod::server {

struct Options {
  std::string socket;               // path of the gRPC socket; the fd socket is at `socket`.fd
  uint32_t socket_mode = 0600;
  std::vector<uid_t> allow_uids;    // beside our own and root
  std::vector<gid_t> allow_gids;    // beside the socket's group where its mode lets it write
  std::string peer_listen = "127.0.0.1:0";
  std::string peer_advertise;       // empty: what peer_listen is bound to
  bool insecure_peers = false;
  std::string metrics_listen;       // empty: none
  uint64_t memory_reserve_bytes = uint64_t{256} << 20;
  uint32_t worker_threads = 0;      // per job; 0: a thread per core this process may run on
  std::string log_level = "info";
  std::string log_file;             // empty: standard error
  bool embedded = false;
  absl::Duration embedded_linger = absl::Seconds(30);
  Limits limits;
};

struct CommandLine {
  enum class Action {
    kRun,
    kExit,  // `text` was asked for (--help, --version, --check-config): print it, exit 0
  };
  Action action = Action::kRun;
  std::string text;
  Options options;
};

// Reads flags and file. INVALID_ARGUMENT with one sentence for the operator.
absl::StatusOr<CommandLine> ParseCommandLine(int argc, const char* const* argv);

// "host:port" -> its parts; "[::1]:80" loses its brackets.
struct HostPort {
  std::string host;
  uint16_t port = 0;
};
absl::StatusOr<HostPort> ParseHostPort(const std::string& text);
bool IsLoopback(const std::string& host);

}  // namespace zerod::server
