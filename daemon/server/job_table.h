// SPDX-License-Identifier: Apache-2.0
//
// The jobs of this node: made by the first client that attaches, ended by the engine, freed here.
// Thread-safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/config.h"
#include "daemon/engine/job_runner.h"
#include "daemon/server/limits.h"
#include "daemon/server/peers.h"
#include "daemon/server/session.h"

namespace zerod::server {

// What a client says with Attach, checked and typed.
struct AttachArguments {
  std::string job;
  uint32_t attempt = 0;
  uint32_t rank = 0;
  uint32_t world = 1;
  uint32_t local_rank = 0;
  uint32_t local_world = 1;
  uint32_t node_rank = 0;
  std::vector<std::string> peers;
  std::string job_token;
  Config config;
  std::shared_ptr<const core::Layout> layout;
};

struct AttachResult {
  engine::Attachment attachment;  // its fds have moved to the session
  core::JobPlan plan;
  uint32_t members = 1;
};

struct JobInfo {
  engine::JobRequest request;
  core::JobPlan plan;
  engine::JobSnapshot snapshot;
};

enum class Admission {
  kOpen,
  kNoNewJobs,  // Admin.Drain: the jobs that are there go on, their clients may come back
  kClosed,     // on the way out: nobody attaches
};

class JobTable {
 public:
  // Makes a job's runner; the engine's own, or a test's.
  using MakeRunner = std::function<absl::StatusOr<std::unique_ptr<engine::JobRunner>>(
      engine::JobRequest request, engine::PeerSender* peers,
      std::function<void(absl::Status)> ended)>;

  // All outlive the table. `fabric_bind_host`, `worker_threads`: see engine::JobRequest.
  JobTable(MakeRunner make_runner, PeerNetwork* network, SessionTable* sessions,
           std::string fabric_bind_host, uint32_t worker_threads, const Limits& limits);
  // REQUIRES: WaitEmpty has returned true.
  ~JobTable();

  // Errors: those of Jobs.Attach. Waits for this node's memory, never for another client. On
  // success the session holds the files that FdFetch asks for.
  absl::StatusOr<AttachResult> Attach(const std::shared_ptr<Session>& session,
                                      const AttachArguments& arguments);
  // The committed blob of the session's rank.
  absl::StatusOr<std::pair<core::Step, std::string>> ClientState(const Session& session);

  // Also the lost ones: those that failed with a committed state. Their ids are
  // refused, so that nobody starts from step 0 without knowing it, until Delete.
  std::vector<JobInfo> List();
  size_t size();
  // Ends a job and waits until its memory is free, or forgets a lost one. NOT_FOUND;
  // DEADLINE_EXCEEDED.
  absl::Status Delete(const std::string& id, absl::Duration timeout);

  void SetAdmission(Admission admission);  // only ever stricter
  Admission admission();
  void FailAll(const absl::Status& why);
  bool WaitEmpty(absl::Duration timeout);

 private:
  enum class State { kCreating, kRunning, kEnding };
  struct Entry {
    uint64_t incarnation = 0;
    State state = State::kCreating;
    std::string token;
    std::string coordinator;
    engine::JobRequest request;
    std::shared_ptr<JobPeers> peers;
    std::unique_ptr<engine::JobRunner> runner;  // constant from kRunning on
    uint32_t users = 0;                         // calls in flight: the runner stays
    bool ended = false;
    absl::Status status;
  };
  // Keeps a running entry's runner alive.
  class Use;

  absl::Status WaitForJob(std::unique_lock<std::mutex>* lock, const AttachArguments& arguments,
                          std::shared_ptr<Entry>* entry);
  absl::Status Create(std::unique_lock<std::mutex>* lock, const AttachArguments& arguments,
                      std::shared_ptr<Entry>* entry);
  void OnEnded(const std::weak_ptr<Entry>& weak, const absl::Status& status);
  void Reap();
  void RememberLost(JobInfo info);
  bool Forget(const std::string& id);  // a lost one; false where there is none
  std::deque<JobInfo>::iterator FindLost(const std::string& id);

  const MakeRunner make_runner_;
  PeerNetwork* const network_;
  SessionTable* const sessions_;
  const std::string fabric_bind_host_;
  const uint32_t worker_threads_;
  const Limits limits_;

  std::mutex mu_;  // guards the rest; never held while a runner is called
  std::condition_variable changed_;
  std::map<std::string, std::shared_ptr<Entry>> jobs_;
  std::deque<JobInfo> lost_;  // oldest first
  Admission admission_ = Admission::kOpen;
  uint64_t next_incarnation_ = 1;
  bool stopping_ = false;
  std::thread reaper_;
};

// What differs between a job that is there and what a client asks for: empty where nothing does.
// Sentences such as "zero_optimization.stage is 3 there, 2 here".
std::string DescribeDifference(const engine::JobRequest& there, const AttachArguments& here);

}  // namespace zerod::server
