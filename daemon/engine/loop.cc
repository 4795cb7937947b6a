// SPDX-License-Identifier: Apache-2.0
//
// The event loop: rings, process deaths, closures of other threads, and the few time limits.
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "daemon/engine/job_runner_impl.h"

namespace zerod::engine {
namespace {

constexpr uint64_t kMailboxEvent = std::numeric_limits<uint64_t>::max();
constexpr absl::Duration kTimerMax = absl::Seconds(60);

}  // namespace

void JobRunnerImpl::Loop() {
  RunActions();
  while (!stop_.load()) {
    bool busy = false;
    for (const std::function<void()>& closure : mailbox_->Take()) {
      closure();
      RunActions();
      busy = true;
    }
    for (core::SlotIndex slot = 0; slot < slots_.size(); ++slot) {
      busy = Serve(slot, kServeBatch) || busy;
    }
    const absl::Duration limit = CheckTimers();
    RunActions();
    ReportGauges();
    // A ring that never runs empty must not keep deaths unseen.
    const bool idle = PrepareSleep() && !busy;
    epoll_event events[16];
    const int timeout_ms =
        !idle ? 0 : static_cast<int>(absl::ToInt64Milliseconds(absl::Ceil(
                       std::min(limit, kTimerMax), absl::Milliseconds(1))));
    const int count = epoll_wait(epoll_.get(), events, 16, timeout_ms);
    CancelSleep();
    CHECK(count >= 0 || errno == EINTR) << strerror(errno);
    for (int i = 0; i < count; ++i) HandleEvent(events[i].data.u64);
  }
}

bool JobRunnerImpl::PrepareSleep() {
  bool idle = true;
  for (const SlotInfo& slot : slots_) {
    if (slot.client == nullptr || slot.client->state != ClientSlot::State::kAttached) continue;
    if (!slot.client->ring().PrepareSleep()) idle = false;
  }
  if (!idle) CancelSleep();
  return idle;
}

void JobRunnerImpl::CancelSleep() {
  for (const SlotInfo& slot : slots_) {
    if (slot.client != nullptr) slot.client->ring().CancelSleep();
  }
}

void JobRunnerImpl::HandleEvent(uint64_t data) {
  if (data == kMailboxEvent || (data & 1) != 0) return;  // looked at in every turn
  OnProcessDied(static_cast<core::SlotIndex>(data >> 1));
}

void JobRunnerImpl::StopServing(ClientSlot* client) {
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, client->doorbell(), nullptr);
  client->pending.clear();
}

// Its descriptors have duplicates elsewhere, so closing them would not take them out of the set.
void JobRunnerImpl::Forget(ClientSlot* client) {
  StopServing(client);
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, client->pidfd(), nullptr);
}

void JobRunnerImpl::OnProcessDied(core::SlotIndex slot) {
  const std::shared_ptr<ClientSlot> client = slots_[slot].client;
  if (client == nullptr || client->state == ClientSlot::State::kDead) return;
  // What it said before it died counts: a DETACH and the exit often come together. A ring has room
  // for so much; what comes on top comes from whom it shared its memory with.
  Serve(slot, shm::kRingEntries);
  RunActions();
  Forget(client.get());
  const ClientSlot::State before = std::exchange(client->state, ClientSlot::State::kDead);
  if (before == ClientSlot::State::kLeft) return;
  // Who was told that the generation is over only follows.
  if (before == ClientSlot::State::kAttached) metrics_->CountClientDeath();
  job_->OnClientGone(slot, absl::StrCat("process ", client->pid, " died"));
  RunActions();
}

uint32_t JobRunnerImpl::AttachedClients() const {
  uint32_t count = 0;
  for (const SlotInfo& slot : slots_) {
    if (slot.client != nullptr && slot.client->state == ClientSlot::State::kAttached) ++count;
  }
  return count;
}

std::optional<absl::Time> JobRunnerImpl::OldestStep() const {
  std::optional<absl::Time> oldest;
  for (const SlotInfo& slot : slots_) {
    if (slot.client == nullptr) continue;
    for (const auto& [cookie, request] : slot.client->pending) {
      if (request.op != shm::Op::kStep) continue;
      oldest = std::min(oldest.value_or(request.since), request.since);
    }
  }
  return oldest;
}

uint32_t JobRunnerImpl::LivingProcesses() const {
  uint32_t count = 0;
  for (const SlotInfo& slot : slots_) {
    if (slot.preparing || (slot.client != nullptr && slot.client->process_lives())) ++count;
  }
  return count;
}

absl::Duration JobRunnerImpl::CheckTimers() {
  if (over_) return absl::InfiniteDuration();
  const absl::Time now = MonotonicNow();
  const Config::Zerod& config = request_.config.zerod;
  absl::Duration next = absl::InfiniteDuration();
  // Keeps `since` while `waits`; true once that has lasted `seconds`.
  const auto expired = [&](bool waits, std::optional<absl::Time>* since, double seconds) {
    if (!waits) {
      since->reset();
      return false;
    }
    if (!since->has_value()) *since = now;
    const absl::Duration left = **since + absl::Seconds(seconds) - now;
    if (left <= absl::ZeroDuration()) return true;
    next = std::min(next, left);
    return false;
  };
  // Of no use where there is no limit.
  std::optional<absl::Time> step_since =
      config.step_timeout_seconds > 0 ? OldestStep() : std::nullopt;
  bool no_room = false;
  for (core::SlotIndex i = 0; i < slots_.size() && config.step_timeout_seconds > 0; ++i) {
    no_room |= expired(job_->WantsRoom(i), &slots_[i].room_since, config.step_timeout_seconds);
  }
  const bool deserted = LivingProcesses() == 0;
  was_occupied_ |= AttachedClients() > 0;
  // The trainer that made the job is about to attach, however short a dead one is waited for.
  const double linger_seconds =
      was_occupied_ ? config.linger_seconds
                    : std::max(config.linger_seconds, config.attach_timeout_seconds);
  if (expired(deserted, &deserted_since_, linger_seconds)) {
    job_->OnFail(absl::DeadlineExceededError(absl::StrCat(
        "no trainer of job '", request_.id, "' has come back within ", linger_seconds,
        " seconds (zerod.linger_seconds): its state is freed")),
                  /*discard=*/true);
  } else if (expired(job_->state() == core::JobState::kForming && AttachedClients() > 0,
                     &forming_since_, config.attach_timeout_seconds)) {
    job_->OnFail(absl::DeadlineExceededError(absl::StrCat(
        "job '", request_.id, "' could not start within ", config.attach_timeout_seconds,
        " seconds (zerod.attach_timeout_seconds): ", job_->WaitingFor())));
  } else if (expired(step_since.has_value(), &step_since, config.step_timeout_seconds)) {
    job_->OnFail(absl::DeadlineExceededError(
        absl::StrCat("step ", job_->committed() + 1, " of job '", request_.id,
                     "' was not complete ", config.step_timeout_seconds,
                     " seconds after its first STEP (zerod.step_timeout_seconds): ",
                     job_->WaitingFor())));
  } else if (no_room) {
    job_->OnFail(absl::DeadlineExceededError(
        absl::StrCat("a rank of job '", request_.id, "' has waited ", config.step_timeout_seconds,
                     " seconds to hand over a gradient (zerod.step_timeout_seconds): ",
                     job_->WaitingFor())));
  }
  return next;
}

void JobRunnerImpl::ReportGauges() {
  const uint64_t window_bytes = window_->window_bytes();
  if (window_bytes != reported_window_bytes_) {
    metrics_->CountWindowGrowth(window_bytes - reported_window_bytes_);
    reported_window_bytes_ = window_bytes;
    ReportMemory();
  }
  Gauges now;
  now.clients = AttachedClients();
  now.committed = job_->committed();
  now.applied = job_->applied();
  now.generation = job_->generation();
  for (const SlotInfo& slot : slots_) {
    if (slot.client == nullptr) continue;
    for (const auto& [cookie, request] : slot.client->pending) {
      if (request.op == shm::Op::kGather) ++now.gathers;
      if (request.op == shm::Op::kStep) ++now.steps;
      if (request.op == shm::Op::kScalar) ++now.scalars;
    }
  }
  if (now == reported_) return;
  metrics_->SetClients(now.clients);
  metrics_->SetStep(now.committed, now.applied, now.generation);
  metrics_->SetWaiting("gather", now.gathers);
  metrics_->SetWaiting("step", now.steps);
  metrics_->SetWaiting("scalar", now.scalars);
  reported_ = now;
}

}  // namespace zerod::engine
