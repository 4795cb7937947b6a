// SPDX-License-Identifier: Apache-2.0
//
// The control plane's calls as plain values. gRPC is included by rpc.cc alone; no channel outlives
// a DaemonRpc, so that nothing of gRPC runs while the process forks its workers.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/attachment.h"

namespace zerod::client {

struct DaemonVersion {
  std::string version;
  uint32_t protocol = 0;
  uint32_t shm_format = 0;
  std::string boot_id;
  std::string peer_address;
};

// Why a call should end before its answer; OK: go on. Polled every kWaitSlice.
using GiveUp = std::function<absl::Status()>;

class DaemonRpc {
 public:
  // `address`: "unix:/path". Connects with the first call.
  static std::unique_ptr<DaemonRpc> Create(const std::string& address);
  virtual ~DaemonRpc() = default;

  // `limit` bounds the whole call; DEADLINE_EXCEEDED beyond it.
  virtual absl::StatusOr<DaemonVersion> GetVersion(absl::Duration limit,
                                                   const GiveUp& give_up) = 0;
  // The plan is checked: every index and range in it is within bounds.
  virtual absl::StatusOr<AttachPlan> Attach(const AttachOptions& options,
                                            const std::string& token, absl::Duration limit,
                                            const GiveUp& give_up) = 0;
  virtual absl::StatusOr<std::string> ClientState(const std::string& token, absl::Duration limit,
                                                  const GiveUp& give_up) = 0;
};

// OK where client and daemon speak the same language; FAILED_PRECONDITION names both versions.
absl::Status CheckVersion(const DaemonVersion& daemon, const std::string& address);

}  // namespace zerod::client
