// SPDX-License-Identifier: Apache-2.0
//
// The client over an attachment. client.cc: mapping, gathers, releases. client_step.cc: gradients,
// steps, the exchange of values.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cpp/attachment.h"
#include "client/cpp/fork_guard.h"
#include "client/cpp/gradients.h"
#include "client/cpp/mapping.h"
#include "client/cpp/wait.h"
#include "proto/shm/format.h"
#include "proto/shm/ring.h"

namespace zerod::client {

template <typename T>
T* At(const FileMapping& mapping, uint64_t offset) {
  return reinterpret_cast<T*>(mapping.data() + offset);
}

class ClientImpl final : public Client {
 public:
  explicit ClientImpl(Attachment attachment) : attachment_(std::move(attachment)) {}
  ~ClientImpl() override;
  absl::Status Start();

  const std::vector<UnitView>& units() const override { return units_; }
  const std::vector<ParameterView>& parameters() const override { return parameters_; }
  uint64_t generation() const override { return plan().generation; }
  uint64_t resumed_step() const override { return plan().committed_step; }
  bool resumed_skipped() const override { return plan().committed_skipped; }
  double loss_scale() const override { return loss_scale_.load(std::memory_order_relaxed); }
  bool initialized() const override { return plan().initialized; }
  uint32_t members() const override { return plan().members; }
  uint32_t stage() const override { return plan().stage; }
  DType dtype() const override { return plan().dtype; }
  const std::string& resolved_config() const override { return plan().resolved_config; }
  const std::string& plan_text() const override { return plan().plan_text; }
  bool guard_pages() const override { return plan().guard_pages; }
  uint64_t step() const override { return step_.load(std::memory_order_relaxed); }

  absl::Status Gather(uint32_t unit) override;
  bool TryGather(uint32_t unit) override;
  void Release(uint32_t unit) override;
  void ReleaseAll() override;
  bool Held(uint32_t unit) const override;
  absl::Status Land(uint32_t parameter, const void* gradient, DType dtype) override;
  bool Scattered(uint32_t unit) const override;
  absl::Status Scatter(uint32_t unit, bool last) override;
  absl::StatusOr<uint32_t> HandOver(uint32_t unit) override;
  absl::Status EndMicroStep() override;
  absl::Status Reclaim(uint32_t unit) override;
  absl::StatusOr<StepResult> Step(const StepRequest& request) override;
  absl::Status Put(uint32_t unit, uint64_t begin, const float* values, uint64_t count,
                   StateKind kind) override;
  absl::Status Read(uint32_t unit, uint64_t begin, float* values, uint64_t count,
                    StateKind kind) override;
  absl::StatusOr<OptimizerProgress> ReadProgress() override;
  absl::Status Restore(const OptimizerProgress& progress) override;
  absl::StatusOr<std::vector<double>> AllReduce(const std::vector<double>& values,
                                                ScalarOp op) override;
  absl::StatusOr<std::string> ClientState() override;
  absl::Status Detach() override;
  ClientCounters counters() const override;
  const void* base() const override { return space_->base(); }
  uint64_t reserved_bytes() const override { return space_->bytes(); }
  std::shared_ptr<const void> memory() const override { return space_; }

 private:
  const AttachPlan& plan() const { return attachment_.plan; }
  const shm::CompletePage* complete() const {
    return At<const shm::CompletePage>(complete_file_, 0);
  }
  shm::SubmitPage* submit() const { return At<shm::SubmitPage>(submit_file_, 0); }
  int FileFd(shm::ClientFile file) const {
    return attachment_.files[static_cast<size_t>(file)].get();
  }
  absl::Status CheckUsable() const;
  absl::Status CheckUnit(uint32_t unit) const;
  absl::Status CheckRange(uint32_t unit, uint64_t begin, uint64_t count) const;

  // mu_ held. The copy is claimed and valid: maps it if it moved, and counts the unit as held.
  absl::Status Open(uint32_t unit);
  bool TryGatherLocked(uint32_t unit, absl::Status* error);
  void ReleaseLocked(uint32_t unit);
  void Unhold(uint32_t unit);  // the hold word alone, unless a thread waits for the unit
  absl::Status MapResident();
  // PUT and READ, one piece of the transfer area at a time.
  absl::Status Exchange(shm::SubmitEntry entry, const float* in, float* out);
  absl::Status CheckProgressFits() const;
  // Turn::kTransfer held: sends the request and waits, until an interrupt leaves it behind.
  absl::Status Transfer(const shm::SubmitEntry& entry, absl::string_view what);
  // Waits for an operation that an interrupt left behind, if there is one.
  absl::Status Settle(uint64_t* left_behind, absl::string_view what);
  absl::Status PostStep(const StepRequest& request);
  // The gradients of this step are used up, or dropped; `committed`: and its number too.
  absl::Status ForgetStep(bool committed);

  Attachment attachment_;
  ForkGuard fork_guard_;
  std::vector<UnitView> units_;
  std::vector<ParameterView> parameters_;
  FileMapping submit_file_;
  FileMapping complete_file_;
  FileMapping gradient_file_;
  FileMapping transfer_file_;
  FileMapping units_file_;
  std::shared_ptr<AddressSpace> space_;
  std::unique_ptr<shm::HoldWords> holds_;
  std::unique_ptr<Requests> requests_;
  std::unique_ptr<Gradients> gradients_;  // Turn::kLanding
  std::atomic<uint64_t> step_{1};         // written under mu_
  std::atomic<double> loss_scale_{1};     // of the next step
  std::atomic<bool> left_{false};         // Detach() succeeded

  // Before Requests' own mutex in the order of locking.
  mutable std::mutex mu_;
  struct UnitHold {
    bool held = false;
    bool mapped = false;
    uint32_t epoch = 0;  // of what is mapped
    uint32_t waiting = 0;  // threads that have asked for it: their hold stands until the answer
  };
  std::vector<UnitHold> unit_holds_;  // mu_
  std::vector<uint32_t> held_;        // mu_: the held units
  uint32_t trace_len_ = 0;            // mu_
  ClientCounters counters_;           // mu_

  uint64_t transfer_left_behind_ = 0;  // Turn::kTransfer
  uint64_t scalar_left_behind_ = 0;    // Turn::kScalar
  uint64_t step_left_behind_ = 0;      // Turn::kStep
};

}  // namespace zerod::client
