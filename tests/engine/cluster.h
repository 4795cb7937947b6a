// SPDX-License-Identifier: Apache-2.0
//
// All members of a job in this process: real JobRunners, Gloo between them, messages handed over
// directly, clients as threads or forked processes.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "daemon/engine/job_runner.h"
#include "tests/engine/fake_client.h"
#include "tests/fabric/map_rendezvous.h"

namespace zerod::engine::testing {

// Counts what a job told it. Thread-safe.
class FakeMetrics : public metrics::Metrics {
 public:
  std::string address() const override { return ""; }
  std::unique_ptr<metrics::JobMetrics> ForJob(const std::string& job) override;
  std::string Text() const override { return ""; }

  uint64_t observed(metrics::Latency what) const;
  uint64_t traffic(metrics::Traffic what) const;
  uint64_t memory(const std::string& kind) const;
  uint64_t deaths() const;
  uint64_t committed() const;

 private:
  friend class FakeJobMetrics;
  mutable std::mutex mu_;  // guards the rest
  std::map<metrics::Latency, uint64_t> observed_;
  std::map<metrics::Traffic, uint64_t> traffic_;
  std::map<std::string, uint64_t> memory_;
  uint64_t deaths_ = 0;
  uint64_t committed_ = 0;
};

// A process that does nothing but live until it is told to end.
class Sleeper {
 public:
  Sleeper();
  ~Sleeper() { Kill(); }
  void Kill();
  int pid() const { return pid_; }
  int pidfd() const { return pidfd_; }

 private:
  int pid_ = -1;
  int pidfd_ = -1;
};

struct ClusterOptions {
  std::string config;  // JSON
  core::ModelDescription model;
  uint32_t members = 1;
  uint32_t local_world = 1;
  uint64_t available_bytes = uint64_t{8} << 30;
  uint32_t worker_threads = 2;
};

class Cluster {
 public:
  explicit Cluster(ClusterOptions options);
  ~Cluster();  // ends the runners

  uint32_t world() const { return options_.members * options_.local_world; }
  const core::Layout& layout() const { return *layout_; }
  const ClusterOptions& options() const { return options_; }
  JobRunner& runner(uint32_t member) { return *runners_[member]; }
  arena::Arena& arena(uint32_t member) { return *arenas_[member]; }
  FakeMetrics& metrics(uint32_t member) { return *metrics_[member]; }

  // The client of `rank` as a thread of this process, or on behalf of `process`.
  absl::StatusOr<Attachment> Attach(uint32_t rank, const Sleeper* process = nullptr);
  std::unique_ptr<FakeClient> Client(uint32_t rank, const Attachment& attachment);
  // Attaches all ranks and runs `body` for each in a thread of its own.
  void RunClients(const std::function<void(uint32_t rank, FakeClient& client)>& body);

  // How a member's job ended; waits at most a minute (UNKNOWN then).
  absl::Status WaitForEnd(uint32_t member);

 private:
  class Sender;
  ClusterOptions options_;
  std::shared_ptr<const core::Layout> layout_;
  fabric::MapRendezvous rendezvous_;
  std::vector<std::unique_ptr<arena::Arena>> arenas_;
  std::vector<std::unique_ptr<FakeMetrics>> metrics_;
  std::vector<std::unique_ptr<Sender>> senders_;
  std::vector<std::unique_ptr<JobRunner>> runners_;
  std::mutex mu_;  // guards the rest
  std::condition_variable changed_;
  std::vector<std::optional<absl::Status>> ended_;
  std::vector<JobRunner*> reachable_;
};

// embed, `blocks` like siblings h.0 ... with two parameters each, a frozen parameter, a norm.
core::ModelDescription SmallModel(core::DType dtype, int blocks, int64_t width);
std::string ConfigText(uint32_t stage, core::DType dtype, const std::string& zero_keys = "",
                       const std::string& zerod_keys = "");

}  // namespace zerod::engine::testing
