// SPDX-License-Identifier: Apache-2.0
//
// The daemon: everything wired together. No gRPC in here.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "daemon/server/options.h"

namespace zerod::server {

class Server {
 public:
  // Serves when it returns. Errors are sentences for the operator.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Options& options);
  // Ends what is left of jobs and connections and removes the sockets.
  virtual ~Server() = default;

  // Refuses new jobs (all clients where `closed`) and says so to health checks.
  virtual void Drain(bool closed) = 0;
  virtual bool draining() const = 0;
  // Ends all jobs: their clients' requests fail with UNAVAILABLE. True when all have ended within
  // `timeout`.
  virtual bool EndJobs(absl::Duration timeout) = 0;
  // Removes the sockets of a process that is about to exit without any further care.
  virtual void RemoveSockets() = 0;

  virtual size_t jobs() const = 0;
  virtual size_t clients() const = 0;  // connections to either socket
};

}  // namespace zerod::server
