// SPDX-License-Identifier: Apache-2.0
//
// A Rendezvous for members that share a process.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <unordered_map>

#include "daemon/fabric/fabric.h"

namespace zerod::fabric {

// Thread-safe. A key may be set once; a second, different value is ALREADY_EXISTS, because it
// means that two members claim one place.
class MapRendezvous : public Rendezvous {
 public:
  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;

  // Ends every Get, now and later, with UNAVAILABLE: what a remote map's death looks like.
  void Close();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<std::string, std::string> values_;  // guarded by mutex_
  bool closed_ = false;                                  // guarded by mutex_
};

}  // namespace zerod::fabric
