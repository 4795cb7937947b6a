// SPDX-License-Identifier: Apache-2.0
//
// The rendezvous of a job's fabric as the members other than 0 see it: SetKey and GetKey of member
// 0. Thread-safe.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "daemon/fabric/fabric.h"
#include "daemon/server/limits.h"
#include "proto/zerod/v1/peer.grpc.pb.h"

namespace zerod::server {

class RemoteRendezvous : public fabric::Rendezvous {
 public:
  // `stub` outlives the rendezvous.
  RemoteRendezvous(v1::Peer::Stub* stub, v1::Credentials credentials, const Limits& limits)
      : stub_(stub), credentials_(std::move(credentials)), limits_(limits) {}

  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;
  // Calls end within a slice, with UNAVAILABLE.
  void Close() { closed_ = true; }

 private:
  v1::Peer::Stub* const stub_;
  const v1::Credentials credentials_;
  const Limits limits_;
  std::atomic<bool> closed_{false};
};

}  // namespace zerod::server
