// SPDX-License-Identifier: Apache-2.0
//
// A process that is connected to the fd socket. Its token ties gRPC calls to it; `gone_fd` tells
// its end.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/fd_socket.h"

namespace zerod::server {

// Thread-safe.
class Session {
 public:
  // UNAVAILABLE where the system has no descriptor left.
  static absl::StatusOr<std::shared_ptr<Session>> Create(pid_t pid, uid_t uid);
  // Use Create.
  Session(std::string token, pid_t pid, uid_t uid, shm::UniqueFd gone)
      : token_(std::move(token)), pid_(pid), uid_(uid), gone_(std::move(gone)) {}

  const std::string& token() const { return token_; }  // kFdTokenBytes random bytes
  pid_t pid() const { return pid_; }
  uid_t uid() const { return uid_; }

  // An eventfd that becomes readable, and stays so, when the process is dead or has closed its
  // connection. Owned by the session; a duplicate keeps telling.
  int gone_fd() const { return gone_.get(); }
  void MarkGone();

  // What FdFetch is answered with, once. A later Attach replaces it.
  void SetFiles(std::vector<shm::UniqueFd> files);
  // FAILED_PRECONDITION: Attach comes first.
  absl::StatusOr<std::vector<shm::UniqueFd>> TakeFiles();

  // Where Attach put it.
  struct Place {
    std::string job;
    uint64_t incarnation = 0;  // tells jobs of one id apart
    uint32_t slot = 0;
  };
  void SetPlace(Place place);
  // FAILED_PRECONDITION: Attach comes first.
  absl::StatusOr<Place> place() const;
  // The job is over: memory that was not fetched is let go.
  void ForgetJob(uint64_t incarnation);

 private:
  const std::string token_;
  const pid_t pid_;
  const uid_t uid_;
  const shm::UniqueFd gone_;
  mutable std::mutex mu_;
  bool is_gone_ = false;                // guarded by mu_
  bool placed_ = false;                 // guarded by mu_
  Place place_;                         // guarded by mu_
  std::vector<shm::UniqueFd> files_;    // guarded by mu_
};

// The sessions by token. Thread-safe.
class SessionTable {
 public:
  void Add(const std::shared_ptr<Session>& session);
  void Remove(const Session& session);
  // PERMISSION_DENIED: no connected process has this token.
  absl::StatusOr<std::shared_ptr<Session>> Find(const std::string& token) const;
  void ForgetJob(uint64_t incarnation);
  size_t size() const;

 private:
  mutable std::mutex mu_;
  std::map<std::string, std::shared_ptr<Session>> sessions_;  // guarded by mu_
};

}  // namespace zerod::server
