// SPDX-License-Identifier: Apache-2.0
//
// The JobRunner: one loop thread that owns core::Job and everything below marked "loop". What it
// does lies in job_runner.cc (birth, the public calls), loop.cc (waiting, deaths, time limits),
// requests.cc (what clients say), actions.cc (what core wants done) and staging.cc (of that, what
// concerns gradients in staging).
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "daemon/core/job.h"
#include "daemon/engine/apply.h"
#include "daemon/engine/client_slot.h"
#include "daemon/engine/gradient_book.h"
#include "daemon/engine/job_runner.h"
#include "daemon/engine/mailbox.h"
#include "daemon/engine/matrices.h"
#include "daemon/engine/mover.h"
#include "daemon/engine/movements.h"
#include "daemon/engine/shard_store.h"
#include "daemon/engine/side_buffer.h"
#include "daemon/engine/window_files.h"
#include "daemon/engine/workers.h"

namespace zerod::engine {

// Messages of one member that wait for the loop; more end the job.
inline constexpr uint32_t kPeerMessagesMax = 4096;
// Requests of one client that are served before the others' turn comes.
inline constexpr int kServeBatch = 64;

class JobRunnerImpl : public JobRunner {
 public:
  JobRunnerImpl(JobRequest request, arena::Arena* arena, PeerSender* peers,
                std::function<void(absl::Status)> ended);
  ~JobRunnerImpl() override;

  // Reserves everything and starts the threads. After an error: destroy.
  absl::Status Init(metrics::Metrics* metrics);

  absl::StatusOr<Attachment> Attach(const ClientInfo& client) override;
  absl::StatusOr<std::pair<core::Step, std::string>> CommittedBlob(core::SlotIndex slot) override;
  void PeerMessage(core::MemberIndex from, core::Message message) override;
  void PeerDown(core::MemberIndex member, absl::Status why) override;
  void Fail(absl::Status why, bool discard) override;
  JobSnapshot Snapshot() override;
  const core::JobPlan& plan() const override { return plan_; }
  const JobRequest& request() const override { return request_; }

 private:
  struct SlotInfo {
    std::shared_ptr<ClientSlot> client;  // of the last attachment, dead or alive
    bool preparing = false;              // Attach allocates its files on another thread
    absl::Status preparing_failure;      // what the attachment was failed with meanwhile
    std::optional<std::pair<core::Step, std::string>> pending_blob;
    core::Step step = 0;  // of its last request that named one
    std::optional<absl::Time> room_since;  // that it wants some
  };
  struct Gauges {  // what was told to the metrics last
    uint32_t clients = 0;
    uint64_t committed = 0;
    uint64_t applied = 0;
    uint64_t generation = 0;
    uint64_t gathers = 0;
    uint64_t steps = 0;
    uint64_t scalars = 0;
    friend bool operator==(const Gauges&, const Gauges&) = default;
  };
  struct CommittedState {
    core::Step step = 0;
    std::string blob;
  };

  // job_runner.cc
  absl::Status Plan();
  absl::Status Reserve();
  absl::Status ReserveScratch();
  size_t StagingBytes() const;
  void Call(const std::function<void()>& closure);  // on the loop, waits for it
  absl::StatusOr<Attachment> BeginAttach(const ClientInfo& info);
  absl::Status Watch(const ClientSlot& client);
  void FinishAttach(const ClientInfo& info, absl::StatusOr<std::shared_ptr<ClientSlot>>* client,
                    Attachment* attachment);
  JobSnapshot SnapshotOnLoop();
  void ReportMemory();

  // loop.cc
  void Loop();
  bool PrepareSleep();
  void CancelSleep();
  void HandleEvent(uint64_t data);
  void OnProcessDied(core::SlotIndex slot);
  void StopServing(ClientSlot* client);
  void Forget(ClientSlot* client);  // the same, and its death is no longer waited for
  absl::Duration CheckTimers();  // until the next one
  void ReportGauges();
  uint32_t AttachedClients() const;
  std::optional<absl::Time> OldestStep() const;  // since when a STEP waits for its answer
  uint32_t LivingProcesses() const;

  // requests.cc
  bool Serve(core::SlotIndex slot, int limit);  // true: it may have more
  void Reject(ClientSlot* client, const absl::Status& why);
  absl::Status Handle(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::Status Remember(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::Status CheckRange(const shm::SubmitEntry& entry) const;
  absl::Status HandleScatter(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::Status HandleStep(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::StatusOr<core::Range> ScatteredRange(const shm::SubmitEntry& entry) const;
  std::vector<bool> ScatteredParameters(const ClientSlot& client, const shm::SubmitEntry& entry,
                                        core::Range range) const;
  absl::Status HandlePutOrRead(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::Status HandleScalar(ClientSlot* client, const shm::SubmitEntry& entry);
  absl::Status CheckProgress(const shm::SubmitEntry& entry) const;
  absl::Status HandleRestore(ClientSlot* client, const shm::SubmitEntry& entry);

  // actions.cc
  void RunActions();
  void Do(core::Complete& action);
  void Do(core::FailSlot& action);
  void Do(core::Send& action);
  void Do(core::Connect& action);
  void Do(core::StartAllGather& action);
  void Do(core::StartReduce& action);
  void Do(core::ComputeNorm& action);
  void Do(core::CommitBlobs& action);
  void Do(core::StartApply& action);
  void Do(core::StartMeasure& action);
  void Do(core::StartPut& action);
  void Do(core::StartRead& action);
  void Do(core::DropGradients& action);
  void Do(core::End& action);

  // staging.cc
  void Do(core::StartAccumulate& action);
  void Do(core::StartSetAside& action);
  void Do(core::DropAside& action);
  StagedGradient FindStaged(core::SlotIndex slot, core::UnitIndex u, uint64_t cookie) const;
  void CopyAside(const core::StartSetAside& action, std::shared_ptr<SetAsideTask> task,
                 SideBuffer::Memory memory);
  void GiveSideMemoryBack();

  // actions.cc
  void Observe(const PendingRequest& request, const core::Complete& action);
  void WriteProgress(const core::OptimizerProgress& progress, ClientSlot* client) const;
  std::vector<size_t> TouchedMatrices(const ApplyTask& task) const;
  void ComputeSquares(core::Step step, const std::vector<core::UnitIndex>& units,
                      std::function<void()> done);
  absl::Status CheckTransfer(core::UnitIndex unit, core::MemberIndex origin, core::SlotIndex slot,
                             uint64_t begin, uint64_t count) const;
  // Where READ and PUT of a gradient find it; null for other kinds.
  std::shared_ptr<const Sources> GradientSources(core::StateKind kind, core::UnitIndex unit) const;
  void Broken(const absl::Status& status);  // ends the job, from inside an action
  void NotePut(core::UnitIndex unit, uint64_t begin, uint64_t count);
  bool Initialized() const;
  std::vector<std::shared_ptr<ClientSlot>> Clients() const;

  // --- Constant after Init.
  const JobRequest request_;
  arena::Arena* const arena_;
  PeerSender* const peers_;
  const std::function<void(absl::Status)> ended_;
  core::JobPlan plan_;
  std::unique_ptr<core::Partition> partition_;
  std::unique_ptr<Mailbox> mailbox_;
  shm::UniqueFd epoll_;
  MoveContext move_;
  MoveContext reduce_;  // the same, for gradients: pieces of another size

  // --- Synchronised by themselves.
  std::unique_ptr<metrics::JobMetrics> metrics_;
  std::unique_ptr<Workers> workers_;
  std::vector<std::atomic<uint32_t>> peer_messages_;  // per member: waiting for the loop
  std::atomic<bool> stop_{false};

  // --- Loop.
  arena::Region staging_;
  arena::Region scratch_;  // of matrices_
  std::unique_ptr<WindowFiles> window_;
  std::unique_ptr<ShardStore> store_;
  std::unique_ptr<GradientBook> book_;
  std::unique_ptr<SideBuffer> side_;
  std::unique_ptr<Mover> mover_;
  std::unique_ptr<MatrixQueue> matrices_;
  std::unique_ptr<fabric::Fabric> fabric_;
  std::unique_ptr<core::Job> job_;
  std::vector<SlotInfo> slots_;
  std::map<uint32_t, CommittedState> blobs_;  // by rank
  std::vector<std::vector<core::Range>> put_;  // per unit: elements that were PUT, disjoint, sorted
  std::thread connector_;  // while the fabric connects
  const std::shared_ptr<fabric::ConnectCancel> connect_cancel_ =
      std::make_shared<fabric::ConnectCancel>();
  bool over_ = false;      // core has said End
  bool norm_was_needed_ = false;
  core::Step observed_step_ = 0;  // the last whose time was measured
  absl::Time last_step_at_;  // when the last STEP of the step under way came
  std::optional<absl::Time> forming_since_;     // some client waits for the others
  bool was_occupied_ = false;  // some trainer has attached
  std::optional<absl::Time> deserted_since_;    // no client's process lives
  std::vector<std::pair<std::string, uint64_t>> memory_;  // bytes reserved, by kind
  double last_step_seconds_ = 0;
  uint64_t bytes_gathered_ = 0;
  uint64_t bytes_scattered_ = 0;
  uint64_t bytes_sent_ = 0;
  uint64_t bytes_received_ = 0;
  Gauges reported_;
  uint64_t reported_window_bytes_ = 0;
  std::thread loop_;
};

}  // namespace zerod::engine
