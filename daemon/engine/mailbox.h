// SPDX-License-Identifier: Apache-2.0
//
// The way into a job's event loop from other threads: closures, run by the loop in the order in
// which they came, and an eventfd that wakes it.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/shm/fd_passing.h"

namespace zerod::engine {

// Thread-safe. Bounded by its senders: workers and the fabric post one result per task in flight,
// callers of the runner wait for theirs, and messages of members are counted by the runner.
class Mailbox {
 public:
  // RESOURCE_EXHAUSTED where no descriptor is left.
  static absl::StatusOr<std::unique_ptr<Mailbox>> Create();

  void Post(std::function<void()> closure);
  // Everything posted so far, oldest first; also clears the eventfd.
  std::vector<std::function<void()>> Take();
  // Readable while something is there.
  int fd() const { return wake_.get(); }

 private:
  explicit Mailbox(shm::UniqueFd wake) : wake_(std::move(wake)) {}

  const shm::UniqueFd wake_;
  std::mutex mu_;
  std::vector<std::function<void()>> closures_;  // guarded by mu_
};

}  // namespace zerod::engine
