// SPDX-License-Identifier: Apache-2.0
//
// The daemon that a training process starts for itself where no other answers. It belongs to
// nobody's process group and inherits nothing, so it survives the trainer and the launcher; it
// ends by itself when no client has come back for a while.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace zerod::client {

// Where the embedded daemon of (this user, job, node) has its files. The directory is
// XDG_RUNTIME_DIR/zerod, or /tmp/zerod-UID. Long job ids are hashed: a socket's path has 107 bytes.
struct EmbeddedPaths {
  std::string directory;
  std::string socket;
  std::string log;
  std::string lock;
};
EmbeddedPaths EmbeddedPathsOf(const std::string& job, uint32_t node_rank);

// The daemon's executable: $ZEROD_DAEMON, else `zerod` beside this library or in a bin/ beside or
// above it, else on the PATH. NOT_FOUND lists where it was looked for.
absl::StatusOr<std::string> FindDaemon();

// Starts the daemon unless one answers, and waits until it does, at most `limit`. `answers` tells
// whether one answers at the socket; `interrupted` ends the wait (CANCELLED). Only one process at
// a time gets as far as starting one; the others find it. Errors show the end of its log.
absl::Status StartEmbedded(const EmbeddedPaths& paths, absl::Duration limit,
                           const std::function<bool()>& answers,
                           const std::function<bool()>& interrupted);

}  // namespace zerod::client
