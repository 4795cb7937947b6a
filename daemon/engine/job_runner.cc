// SPDX-License-Identifier: Apache-2.0
//
// Birth and death of a runner, and the calls that come from other threads.
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>

#include <algorithm>
#include <future>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"
#include "daemon/engine/job_runner_impl.h"
#include "daemon/engine/job_spec.h"
#include "kernels/cpu/kernels.h"

namespace zerod::engine {

absl::StatusOr<std::unique_ptr<JobRunner>> JobRunner::Create(
    JobRequest request, arena::Arena* arena, PeerSender* peers, metrics::Metrics* metrics,
    std::function<void(absl::Status)> ended) {
  auto runner = std::make_unique<JobRunnerImpl>(std::move(request), arena, peers, std::move(ended));
  RETURN_IF_ERROR(runner->Init(metrics));
  return runner;
}

JobRunnerImpl::JobRunnerImpl(JobRequest request, arena::Arena* arena, PeerSender* peers,
                             std::function<void(absl::Status)> ended)
    : request_(std::move(request)),
      arena_(arena),
      peers_(peers),
      ended_(std::move(ended)),
      peer_messages_(request_.members) {}

JobRunnerImpl::~JobRunnerImpl() {
  stop_.store(true);
  if (loop_.joinable()) {
    mailbox_->Post([] {});
    loop_.join();
  }
  // Whoever frees this waits: a peer that does not come must not make that long.
  connect_cancel_->Cancel();
  if (connector_.joinable()) connector_.join();
  // Closures that were posted and never ran may own the fabric or files: they end first.
  if (mailbox_ != nullptr) mailbox_->Take();
  fabric_.reset();
  if (workers_ != nullptr) workers_->Stop();
  if (mailbox_ != nullptr) mailbox_->Take();
}

absl::Status JobRunnerImpl::Plan() {
  if (request_.members < 1 || request_.members > core::kMembersMax ||
      request_.self >= request_.members || request_.local_world < 1 ||
      request_.local_world > request_.world) {
    return absl::InvalidArgumentError(absl::StrCat(
        "job '", request_.id, "': member ", request_.self, " of ", request_.members, ", ",
        request_.local_world, " of ", request_.world,
        " ranks on this node cannot be; a job has 1 to ", core::kMembersMax, " nodes"));
  }
  const auto plan_for = [&](uint64_t available_bytes) {
    return core::PlanJob(request_.config, *request_.layout, request_.members, request_.self,
                         request_.local_world, available_bytes);
  };
  // The roomy plan where it can be had, else the tight one: the arena says what can be had.
  const std::string what = absl::StrCat("job '", request_.id, "'");
  ASSIGN_OR_RETURN(plan_, plan_for(std::numeric_limits<uint64_t>::max()));
  const auto needed = [&] { return plan_.memory.total() + plan_.client_states_bytes_max; };
  if (absl::Status admitted = arena_->Admit(needed(), what); !admitted.ok()) {
    ASSIGN_OR_RETURN(plan_, plan_for(0));
    RETURN_IF_ERROR(arena_->Admit(needed(), what));
  }
  if (!plan_.node_sum && request_.local_world > kernels::kSourcesMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "job '", request_.id, "' has ", request_.local_world, " ranks on this node; the gradient "
        "plan per_rank sums at most ", kernels::kSourcesMax,
        ". Set zerod.gradient_plan to \"node_sum\""));
  }
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::Reserve() {
  partition_ = std::make_unique<core::Partition>(*request_.layout, request_.members);
  ASSIGN_OR_RETURN(window_, WindowFiles::Create(arena_, request_.id, request_.layout,
                                                plan_.window));
  ShardStore::Options options;
  options.job = request_.id;
  options.layout = request_.layout;
  options.partition = partition_.get();
  options.self = request_.self;
  options.stage = request_.config.zero.stage;
  options.resident = plan_.window.resident;
  options.form = plan_.form;
  options.master_in_window = plan_.master_in_window;
  options.node_sum = plan_.node_sum;
  ASSIGN_OR_RETURN(store_, ShardStore::Create(options, arena_));
  move_.layout = request_.layout;
  move_.partition = partition_.get();
  move_.plan = &plan_;
  move_.store = store_.get();
  move_.self = request_.self;
  move_.stage = request_.config.zero.stage;
  move_.wire = core::WireType(request_.config, request_.layout->dtype());
  move_.piece_elements = plan_.gather_piece_elements;
  reduce_ = move_;
  reduce_.piece_elements = plan_.reduce_piece_elements;
  const uint64_t staging_bytes = StagingBytes() * core::kPiecesInFlight;
  if (staging_bytes > 0) {
    ASSIGN_OR_RETURN(staging_, arena_->Allocate(absl::StrCat("staging of job ", request_.id),
                                                staging_bytes, staging_bytes,
                                                arena::Access::kPrivate));
  }
  RETURN_IF_ERROR(ReserveScratch());
  book_ = std::make_unique<GradientBook>(request_.layout, partition_.get(), request_.self,
                                         request_.local_world, &plan_, store_.get());
  side_ = std::make_unique<SideBuffer>(
      arena_, request_.id,
      plan_.node_sum ? request_.local_world * core::AsideBytesMax(*request_.layout,
                                                                  plan_.staged_part_elements)
                     : 0);
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::ReserveScratch() {
  if (plan_.memory.scratch == 0) return absl::OkStatus();
  for (const core::Parameter& p : request_.layout->parameters()) {
    const core::Range kept = store_->TrainRange(p.unit);
    const bool here = p.offset >= kept.begin && p.offset < kept.end;
    if (!request_.layout->IsByMatrix(p) || !here) continue;
    if (MatrixScratch(p) > plan_.matrix_scratch_elements || p.offset + p.elements > kept.end) {
      return absl::InternalError(absl::StrCat("the plan has no room to update '", p.name,
                                              "' by Muon. Please report this"));
    }
  }
  ASSIGN_OR_RETURN(scratch_, arena_->Allocate(absl::StrCat("scratch of job ", request_.id),
                                              plan_.memory.scratch, plan_.memory.scratch,
                                              arena::Access::kPrivate));
  return absl::OkStatus();
}

// Of one piece of any movement.
size_t JobRunnerImpl::StagingBytes() const {
  return std::max(move_.StagingBytes(), reduce_.StagingBytes());
}

absl::Status JobRunnerImpl::Init(metrics::Metrics* metrics) {
  RETURN_IF_ERROR(Plan());
  RETURN_IF_ERROR(Reserve());
  ASSIGN_OR_RETURN(mailbox_, Mailbox::Create());
  epoll_.Reset(epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = std::numeric_limits<uint64_t>::max();
  if (!epoll_ || epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, mailbox_->fd(), &event) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot make an epoll instance: ", strerror(errno),
                     "; raise the daemon's limit of open files (ulimit -n, LimitNOFILE=)"));
  }
  // Work under way at a time: a few pieces per unit, and those of the movements.
  workers_ = std::make_unique<Workers>(request_.worker_threads,
                                       4 * request_.layout->units().size() + 256, mailbox_.get());
  MatrixQueue::Options matrices;
  matrices.at_once = plan_.matrices_at_once;
  matrices.scratch_elements = plan_.matrix_scratch_elements;
  matrices.scratch = reinterpret_cast<float*>(scratch_.data());
  matrices_ = std::make_unique<MatrixQueue>(
      matrices, workers_.get(), [this](const absl::Status& status) { Broken(status); });
  Mover::Options options;
  options.slots = core::kPiecesInFlight;
  options.slot_bytes = StagingBytes();
  options.staging = staging_.data();
  metrics_ = metrics->ForJob(request_.id);
  mover_ = std::make_unique<Mover>(options, workers_.get(), mailbox_.get(),
                                   [this](uint64_t sent, uint64_t received) {
                                     bytes_sent_ += sent;
                                     bytes_received_ += received;
                                     metrics_->Add(metrics::Traffic::kSentToMembers, sent);
                                     metrics_->Add(metrics::Traffic::kReceivedFromMembers,
                                                   received);
                                   });
  slots_.resize(request_.local_world);
  put_.resize(request_.layout->units().size());
  window_->set_holders([this] {
    std::vector<WindowFiles::Holder> holders;
    for (const SlotInfo& slot : slots_) {
      if (slot.client == nullptr || slot.client->state == ClientSlot::State::kDead ||
          slot.client->state == ClientSlot::State::kLeft) {
        continue;
      }
      holders.push_back({slot.client->slot, slot.client->holds()});
    }
    return holders;
  });
  job_ = std::make_unique<core::Job>(MakeJobSpec(request_, plan_), window_.get());
  deserted_since_ = MonotonicNow();
  reported_window_bytes_ = window_->window_bytes();
  ReportMemory();
  loop_ = std::thread([this] { Loop(); });
  return absl::OkStatus();
}

void JobRunnerImpl::ReportMemory() {
  core::MemoryPlan actual;
  const uint64_t window = window_->window_bytes();
  if (plan_.master_in_window) {
    actual.parameters = window;
  } else {
    (request_.config.zero.stage < 3 ? actual.copies : actual.window) = window;
    actual.parameters = store_->master_bytes();
    actual.copies += store_->copies_bytes();
  }
  actual.gradients = store_->gradients_bytes();
  actual.moments = store_->moments_bytes();
  actual.accumulator = store_->accumulator_bytes();
  actual.staging = staging_.populated_bytes();
  if (scratch_) actual.scratch = scratch_.populated_bytes();
  actual.set_aside = side_->bytes();
  actual.control = window_->units_bytes();
  for (const SlotInfo& slot : slots_) {
    if (slot.client == nullptr) continue;
    actual.client_gradients += slot.client->gradient_bytes();
    actual.control += slot.client->control_bytes();
  }
  memory_ = actual.Named();
  for (const auto& [kind, bytes] : memory_) metrics_->SetMemory(kind, bytes);
}

// --- Calls of other threads --------------------------------------------------------------------

void JobRunnerImpl::Call(const std::function<void()>& closure) {
  CHECK(std::this_thread::get_id() != loop_.get_id()) << "the loop cannot wait for itself";
  // Shared: the loop may still be inside set_value() when the caller goes on.
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> answered = done->get_future();
  mailbox_->Post([&closure, done] {
    closure();
    done->set_value();
  });
  answered.wait();
}

// On the loop: takes the place in core, so that nobody allocates in vain.
absl::StatusOr<Attachment> JobRunnerImpl::BeginAttach(const ClientInfo& info) {
  if (info.local_rank >= slots_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("local rank ", info.local_rank, " of job '", request_.id, "', which has ",
                     slots_.size(), " ranks on this node. Check LOCAL_RANK and LOCAL_WORLD_SIZE"));
  }
  SlotInfo& slot = slots_[info.local_rank];
  if (slot.preparing) {
    return absl::UnavailableError(absl::StrCat("another process is attaching as local rank ",
                                               info.local_rank, ": ask again in a moment"));
  }
  if (slot.client != nullptr && (slot.client->state == ClientSlot::State::kAttached ||
                                 slot.client->state == ClientSlot::State::kFailed)) {
    return absl::AlreadyExistsError(absl::StrCat(
        "rank ", slot.client->rank, " (local rank ", info.local_rank, ") of job '", request_.id,
        "' is the living process ", slot.client->pid, ". Wait for its end, or end it"));
  }
  RETURN_IF_ERROR(job_->OnAttach(info.local_rank, info.rank));
  if (slot.client != nullptr) Forget(slot.client.get());
  slot.client.reset();
  slot.pending_blob.reset();
  slot.preparing = true;
  slot.preparing_failure = absl::OkStatus();
  Attachment attachment;
  attachment.slot = info.local_rank;
  attachment.generation = job_->generation();
  attachment.committed_step = job_->committed();
  attachment.applied_steps = job_->applied();
  attachment.loss_scale = job_->last_step().next_loss_scale;
  attachment.committed_skipped = job_->committed() > 0 && job_->last_step().skipped;
  attachment.initialized = Initialized();
  return attachment;
}

absl::Status JobRunnerImpl::Watch(const ClientSlot& client) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = uint64_t{client.slot} << 1;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, client.pidfd(), &event) == 0) {
    event.events = shm::kDoorbellEvents;
    event.data.u64 |= 1;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, client.doorbell(), &event) == 0) {
      return absl::OkStatus();
    }
  }
  const absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("cannot watch process ", client.pid, ": ", strerror(errno),
                   "; see /proc/sys/fs/epoll/max_user_watches"));
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, client.pidfd(), nullptr);
  return status;
}

void JobRunnerImpl::FinishAttach(const ClientInfo& info,
                                 absl::StatusOr<std::shared_ptr<ClientSlot>>* client,
                                 Attachment* attachment) {
  SlotInfo& slot = slots_[info.local_rank];
  slot.preparing = false;
  if (client->ok()) {
    const absl::Status watched = Watch(***client);
    if (!watched.ok()) *client = watched;
  }
  if (!client->ok()) {
    job_->OnClientGone(info.local_rank, absl::StrCat("it could not be attached: ",
                                                     client->status().message()));
    return;
  }
  slot.client = **client;
  attachment->fds = slot.client->Fds(window_->units_fd(), window_->window_fd());
  if (!slot.preparing_failure.ok()) {
    slot.client->ring().Fail(slot.preparing_failure.code(),
                             std::string(slot.preparing_failure.message()));
    StopServing(slot.client.get());
    slot.client->state = ClientSlot::State::kFailed;
  }
  ReportMemory();
}

absl::StatusOr<Attachment> JobRunnerImpl::Attach(const ClientInfo& info) {
  shm::UniqueFd pidfd(fcntl(info.pidfd, F_DUPFD_CLOEXEC, 0));
  if (!pidfd) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot keep a descriptor of process ", info.pid, ": ", strerror(errno),
                     "; raise the daemon's limit of open files (ulimit -n, LimitNOFILE=)"));
  }
  absl::StatusOr<Attachment> attachment = absl::UnknownError("not asked yet");
  Call([&] { attachment = BeginAttach(info); });
  if (!attachment.ok()) return attachment;
  // Here and not on the loop: populating gigabytes takes seconds.
  absl::StatusOr<std::shared_ptr<ClientSlot>> client =
      ClientSlot::Create(arena_, request_.id, info.local_rank, info.rank, info.pid,
                         std::move(pidfd), *request_.layout, plan_);
  Call([&] { FinishAttach(info, &client, &*attachment); });
  if (!client.ok()) return client.status();
  return attachment;
}

absl::StatusOr<std::pair<core::Step, std::string>> JobRunnerImpl::CommittedBlob(
    core::SlotIndex slot) {
  absl::StatusOr<std::pair<core::Step, std::string>> result =
      absl::NotFoundError(absl::StrCat("no client is attached as local rank ", slot));
  Call([&] {
    if (slot >= slots_.size() || slots_[slot].client == nullptr) return;
    const auto it = blobs_.find(slots_[slot].client->rank);
    if (it == blobs_.end()) {
      result = std::pair<core::Step, std::string>();
    } else {
      result = std::make_pair(it->second.step, it->second.blob);
    }
  });
  return result;
}

void JobRunnerImpl::PeerMessage(core::MemberIndex from, core::Message message) {
  if (from >= peer_messages_.size()) return;
  if (peer_messages_[from].fetch_add(1) >= kPeerMessagesMax) {
    peer_messages_[from].fetch_sub(1);
    PeerDown(from, absl::ResourceExhaustedError(
                       absl::StrCat("it sent more than ", kPeerMessagesMax,
                                    " messages that could not be handled in time")));
    return;
  }
  mailbox_->Post([this, from, message = std::move(message)] {
    peer_messages_[from].fetch_sub(1);
    job_->OnMessage(from, message);
  });
}

void JobRunnerImpl::PeerDown(core::MemberIndex member, absl::Status why) {
  mailbox_->Post([this, member, why = std::move(why)] { job_->OnMemberDown(member, why); });
}

void JobRunnerImpl::Fail(absl::Status why, bool discard) {
  mailbox_->Post([this, why = std::move(why), discard] { job_->OnFail(why, discard); });
}

JobSnapshot JobRunnerImpl::Snapshot() {
  JobSnapshot snapshot;
  Call([&] { snapshot = SnapshotOnLoop(); });
  return snapshot;
}

JobSnapshot JobRunnerImpl::SnapshotOnLoop() {
  JobSnapshot snapshot;
  snapshot.state = job_->state();
  snapshot.lost = job_->lost();
  snapshot.reason = job_->state() == core::JobState::kFailed
                        ? std::string(job_->failure().message())
                        : job_->WaitingFor();
  snapshot.generation = job_->generation();
  snapshot.committed_step = job_->committed();
  snapshot.applied_steps = job_->applied();
  snapshot.last_step_seconds = last_step_seconds_;
  snapshot.bytes_gathered = bytes_gathered_;
  snapshot.bytes_scattered = bytes_scattered_;
  snapshot.bytes_sent = bytes_sent_;
  snapshot.bytes_received = bytes_received_;
  snapshot.window_growths = window_->growths();
  snapshot.memory = memory_;
  const uint32_t units = static_cast<uint32_t>(request_.layout->units().size());
  for (const SlotInfo& slot : slots_) {
    if (slot.client == nullptr) continue;
    const ClientSlot& client = *slot.client;
    ClientSnapshot c;
    c.rank = client.rank;
    c.local_rank = client.slot;
    c.pid = client.pid;
    switch (client.state) {
      case ClientSlot::State::kAttached: c.state = "attached"; break;
      case ClientSlot::State::kFailed: c.state = "failed"; break;
      case ClientSlot::State::kLeft: c.state = "left"; break;
      case ClientSlot::State::kDead: c.state = "dead"; break;
    }
    c.step = slot.step;
    for (uint32_t u = 0; u < units; ++u) {
      if (client.holds()[u].load(std::memory_order_relaxed) != 0) ++c.units_held;
    }
    snapshot.clients.push_back(std::move(c));
  }
  return snapshot;
}

}  // namespace zerod::engine
