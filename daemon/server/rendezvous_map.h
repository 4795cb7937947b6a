// SPDX-License-Identifier: Apache-2.0
//
// The rendezvous of a job's fabric, where it lives: in member 0. Thread-safe.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "daemon/fabric/fabric.h"
#include "daemon/server/limits.h"

namespace zerod::server {

class RendezvousMap : public fabric::Rendezvous {
 public:
  explicit RendezvousMap(const Limits& limits) : limits_(limits) {}

  // RESOURCE_EXHAUSTED beyond the limits; ALREADY_EXISTS with another value.
  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;
  // As Get; CANCELLED when `cancelled` says so, asked every 100 ms.
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout,
                                  const std::function<bool()>& cancelled);
  // Every call, waiting or later, fails with UNAVAILABLE.
  void Close();

 private:
  const Limits limits_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;  // guarded by mu_
  size_t bytes_ = 0;                           // guarded by mu_
  bool closed_ = false;                        // guarded by mu_
};

}  // namespace zerod::server
