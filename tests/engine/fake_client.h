// SPDX-License-Identifier: Apache-2.0
//
// A training process's side of the shared memory, as plain as can be: it looks up chunks in the
// table instead of mapping them at an address, and waits for every answer.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "daemon/engine/job_runner.h"
#include "proto/shm/ring.h"

namespace zerod::engine::testing {

struct StepOptions {
  core::HyperParameters hyper;
  std::string blob;
};
struct StepAnswer {
  double grad_norm = 0;
  bool skipped = false;
};

// One thread. Waits end by the answer, the attachment's failure, or a minute.
class FakeClient {
 public:
  // Maps the attachment's files; they stay good when the runner is gone.
  FakeClient(const Attachment& attachment, const core::Layout* layout, const core::JobPlan* plan);
  ~FakeClient();
  FakeClient(const FakeClient&) = delete;
  FakeClient& operator=(const FakeClient&) = delete;

  // Pushes any entry and waits for its completion where it has a cookie.
  absl::StatusOr<shm::CompleteEntry> Request(shm::SubmitEntry entry);
  absl::StatusOr<shm::CompleteEntry> Await(const shm::SubmitEntry& entry);
  absl::StatusOr<shm::CompleteEntry> AwaitAny();
  // An answer where there is one already.
  std::optional<shm::CompleteEntry> TryPop();
  absl::Status Failure() const { return ring_->Failure(); }
  absl::Status Push(const shm::SubmitEntry& entry) { return ring_->Push(entry); }
  void RingDoorbell();
  // Waits until the attachment has failed, and says how; OK after a minute.
  absl::Status WaitForFailure();

  uint64_t step() const { return step_; }  // the one this client computes
  core::SlotIndex slot() const { return slot_; }

  absl::Status Gather(core::UnitIndex u);
  void Release(core::UnitIndex u);  // drops the hold; no request
  // The unit's elements as fp32. REQUIRES: gathered.
  std::vector<float> Values(core::UnitIndex u) const;
  shm::UnitWord Word(core::UnitIndex u) const { return holds_->Word(u); }

  // Adds a gradient of the parameter (an index of the layout).
  void Land(uint32_t parameter, const std::vector<float>& gradient);
  // The next Land of it starts afresh (after a step that was refused).
  void Forget(uint32_t parameter) { touched_[parameter] = 0; }
  // node_sum: sends what was landed and waits until it was taken. per_rank: a request if `last`.
  absl::Status Scatter(core::UnitIndex u, bool last);
  // node_sum: of what was landed in the unit, this part alone.
  absl::Status ScatterPart(core::UnitIndex u, uint32_t part, bool last);
  // From here on Scatter does not wait for other ranks: it asks for room.
  void set_makes_room() { makes_room_ = true; }
  absl::Status EndMicroStep();
  absl::Status Reclaim(core::UnitIndex u);
  absl::StatusOr<StepAnswer> Step(const StepOptions& options);

  absl::Status Put(core::UnitIndex u, uint64_t begin, const std::vector<float>& values,
                   shm::StateKind kind = shm::StateKind::kMaster);
  absl::StatusOr<std::vector<float>> Read(core::UnitIndex u, uint64_t begin, uint64_t count,
                                          shm::StateKind kind);
  absl::StatusOr<core::OptimizerProgress> ReadProgress();
  // The loss scale of the next step.
  absl::StatusOr<double> Restore(const core::OptimizerProgress& progress);
  absl::StatusOr<std::vector<double>> AllReduce(const std::vector<double>& values,
                                                shm::ScalarOp op);
  absl::Status Barrier() { return AllReduce({}, shm::ScalarOp::kSum).status(); }
  absl::Status Detach();

  shm::SubmitPage* submit() { return reinterpret_cast<shm::SubmitPage*>(map_[0]); }
  std::byte* gradients() { return map_[2]; }
  std::byte* transfer() { return map_[3]; }
  // The daemon has taken everything that was pushed.
  bool AllTaken() { return complete()->sq_head.load() == submit()->tail.load(); }

 private:
  const shm::CompletePage* complete() const {
    return reinterpret_cast<const shm::CompletePage*>(map_[1]);
  }
  shm::SubmitEntry Entry(shm::Op op, core::UnitIndex u);

  const core::Layout* const layout_;
  const core::JobPlan plan_;
  const core::SlotIndex slot_;
  uint64_t step_;
  uint64_t next_cookie_ = 1;
  std::vector<std::byte*> map_;
  std::vector<size_t> map_bytes_;
  int doorbell_ = -1;
  uint8_t* touched_ = nullptr;
  const uint32_t* chunks_ = nullptr;
  std::unique_ptr<shm::SubmitRing> ring_;
  std::unique_ptr<shm::HoldWords> holds_;
  bool makes_room_ = false;
  std::vector<bool> staged_;                    // node_sum: touched since the last scatter
  std::vector<std::vector<float>> staged_sum_;  // per unit
};

}  // namespace zerod::engine::testing
