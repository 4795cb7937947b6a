// SPDX-License-Identifier: Apache-2.0
//
// Carries out one job on this node: owns its memory, its event loop (one thread: rings, process
// deaths, messages, results), its workers and its fabric, and feeds daemon/core.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/config.h"
#include "daemon/core/job.h"
#include "daemon/core/plan.h"
#include "daemon/fabric/fabric.h"
#include "daemon/metrics/metrics.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

// How the engine reaches the other members; implemented by the server over Peer streams.
class PeerSender {
 public:
  virtual ~PeerSender() = default;
  // Queues a message; never blocks. Order between two members is kept. A failure is told by
  // JobRunner::PeerDown.
  virtual void Send(core::MemberIndex to, core::Message message) = 0;
  // The rendezvous map of this job's fabric, kept by member 0.
  virtual fabric::Rendezvous* rendezvous() = 0;
};

struct JobRequest {
  std::string id;
  Config config;
  std::shared_ptr<const core::Layout> layout;
  uint32_t world = 1;
  uint32_t members = 1;
  core::MemberIndex self = 0;
  uint32_t local_world = 1;
  std::string fabric_bind_host = "127.0.0.1";
  absl::Duration fabric_stall_timeout = absl::Seconds(30);  // fabric::FabricOptions
  uint32_t worker_threads = 1;
};

struct ClientInfo {
  uint32_t rank = 0;
  uint32_t local_rank = 0;
  int pid = 0;       // for messages
  int pidfd = -1;    // readable, for good, once the process is gone; duplicated by Attach
};

// What a client is handed. The fds stay the job's; duplicate by sending.
struct Attachment {
  core::SlotIndex slot = 0;
  uint64_t generation = 0;
  core::Step committed_step = 0;
  uint64_t applied_steps = 0;
  double loss_scale = 1;           // of the next step
  bool committed_skipped = false;  // the committed step was skipped
  bool initialized = false;
  std::vector<int> fds;  // shm::kClientFiles files, then the doorbell
};

struct ClientSnapshot {
  uint32_t rank = 0;
  uint32_t local_rank = 0;
  int pid = 0;
  std::string state;
  uint64_t step = 0;
  uint32_t units_held = 0;
};

struct JobSnapshot {
  core::JobState state = core::JobState::kForming;
  bool lost = false;  // core::Job::lost
  std::string reason;
  uint64_t generation = 0;
  core::Step committed_step = 0;
  uint64_t applied_steps = 0;
  double last_step_seconds = 0;
  uint64_t bytes_gathered = 0;
  uint64_t bytes_scattered = 0;
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
  uint64_t window_growths = 0;
  std::vector<std::pair<std::string, uint64_t>> memory;
  std::vector<ClientSnapshot> clients;
};

class JobRunner {
 public:
  // Plans, admits and reserves the job's memory and starts its loop. RESOURCE_EXHAUSTED with the
  // numbers where it is not there; nothing is left behind then. `arena`, `peers` and `metrics`
  // outlive the runner. `ended` is called once, from the loop thread, when the job is over and
  // all its memory may be freed (the caller then destroys the runner from another thread).
  static absl::StatusOr<std::unique_ptr<JobRunner>> Create(JobRequest request, arena::Arena* arena,
                                                           PeerSender* peers,
                                                           metrics::Metrics* metrics,
                                                           std::function<void(absl::Status)> ended);
  virtual ~JobRunner() = default;

  // All of these are thread-safe. Those that answer wait for the loop, never for a client.
  // Errors of Attach: see core::Job::OnAttach.
  virtual absl::StatusOr<Attachment> Attach(const ClientInfo& client) = 0;
  virtual absl::StatusOr<std::pair<core::Step, std::string>> CommittedBlob(
      core::SlotIndex slot) = 0;
  virtual void PeerMessage(core::MemberIndex from, core::Message message) = 0;
  virtual void PeerDown(core::MemberIndex member, absl::Status why) = 0;
  // Ends the job everywhere.
  // `discard`: see core::Job::OnFail.
  virtual void Fail(absl::Status why, bool discard) = 0;
  virtual JobSnapshot Snapshot() = 0;

  virtual const core::JobPlan& plan() const = 0;  // constant
  virtual const JobRequest& request() const = 0;  // constant
};

}  // namespace zerod::engine
