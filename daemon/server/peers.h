// SPDX-License-Identifier: Apache-2.0
//
// The other members of a job, as the job table and the engine see them. The gRPC behind it is in
// peer_network.cc.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/engine/job_runner.h"
#include "daemon/server/limits.h"

namespace zerod::server {

// A job's members other than this one. Thread-safe.
//
// Messages sent before Start, or before a member's Link is open, wait (in a bounded queue). A
// member that does not come before `join_timeout`, or whose Link breaks, is told to the runner by
// PeerDown, once.
class JobPeers : public engine::PeerSender {
 public:
  // From now on `runner` gets messages and losses. It outlives the call of Close.
  virtual void Start(engine::JobRunner* runner) = 0;
  // The job's part here is over: what is queued is still sent, then the Links end, with a goodbye
  // where `why` is OK. Does not wait for other members. The runner gets no call after it returns;
  // waits in rendezvous() end.
  virtual void Close(const absl::Status& why) = 0;
};

struct PeerJob {
  std::string id;
  std::string token;
  uint32_t members = 1;
  uint32_t self = 0;
  std::string coordinator;  // address of member 0; not used where self == 0
  absl::Duration join_timeout;
};

class PeerNetwork {
 public:
  // Serves Peer at `listen` ("host:port"). UNAVAILABLE where that cannot be bound.
  static absl::StatusOr<std::unique_ptr<PeerNetwork>> Start(const std::string& listen,
                                                            const std::string& advertise,
                                                            const std::string& boot_id,
                                                            const Limits& limits);
  // All JobPeers are gone.
  virtual ~PeerNetwork() = default;

  // REQUIRES: no other JobPeers of this id lives.
  virtual std::shared_ptr<JobPeers> Join(PeerJob job) = 0;
  // Members that come for this job, which no JobPeers serves, are told `why` instead of being asked
  // to wait; OK: they wait again.
  virtual void SetLost(const std::string& job, const absl::Status& why) = 0;
  // What other daemons reach this one at.
  virtual std::string address() const = 0;
  virtual void SetServing(bool serving) = 0;
};

}  // namespace zerod::server
