// SPDX-License-Identifier: Apache-2.0
//
// A JobRunner without memory and threads, which remembers what it is told.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/engine/job_runner.h"

namespace zerod::server::testing {

class FakeRunner : public engine::JobRunner {
 public:
  FakeRunner(engine::JobRequest request, engine::PeerSender* peers,
             std::function<void(absl::Status)> ended)
      : peers_(peers), request_(std::move(request)), ended_(std::move(ended)) {}

  absl::StatusOr<engine::Attachment> Attach(const engine::ClientInfo& client) override {
    ++attached_;
    engine::Attachment attachment;
    attachment.slot = client.local_rank;
    attachment.generation = 1;
    attachment.fds = {0, 1};
    return attachment;
  }
  absl::StatusOr<std::pair<core::Step, std::string>> CommittedBlob(core::SlotIndex slot) override {
    return std::pair<core::Step, std::string>(3, "blob " + std::to_string(slot));
  }
  void PeerMessage(core::MemberIndex from, core::Message message) override {
    std::lock_guard lock(mu_);
    messages_.emplace_back(from, std::move(message));
  }
  void PeerDown(core::MemberIndex member, absl::Status why) override {
    std::lock_guard lock(mu_);
    downs_.emplace_back(member, std::move(why));
  }
  void Fail(absl::Status why, bool /*discard*/) override { End(std::move(why)); }
  engine::JobSnapshot Snapshot() override {
    std::lock_guard lock(mu_);
    return snapshot_;
  }
  // From now on it is one that failed with a state somebody may come back for.
  void SetLost(core::Step step, const std::string& reason) {
    std::lock_guard lock(mu_);
    snapshot_.lost = true;
    snapshot_.committed_step = step;
    snapshot_.reason = reason;
  }
  const core::JobPlan& plan() const override { return plan_; }
  const engine::JobRequest& request() const override { return request_; }

  void End(absl::Status status) {
    std::function<void(absl::Status)> ended;
    {
      std::lock_guard lock(mu_);
      ended = std::exchange(ended_, nullptr);
    }
    if (ended != nullptr) ended(std::move(status));
  }
  int attached() const { return attached_; }
  engine::PeerSender* peers() const { return peers_; }
  std::vector<std::pair<core::MemberIndex, core::Message>> messages() {
    std::lock_guard lock(mu_);
    return messages_;
  }
  std::vector<std::pair<core::MemberIndex, absl::Status>> downs() {
    std::lock_guard lock(mu_);
    return downs_;
  }

 private:
  engine::PeerSender* const peers_;
  const engine::JobRequest request_;
  const core::JobPlan plan_;
  std::atomic<int> attached_{0};
  std::mutex mu_;
  std::function<void(absl::Status)> ended_;
  engine::JobSnapshot snapshot_;
  std::vector<std::pair<core::MemberIndex, core::Message>> messages_;
  std::vector<std::pair<core::MemberIndex, absl::Status>> downs_;
};

}  // namespace zerod::server::testing
