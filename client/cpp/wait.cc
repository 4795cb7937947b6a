// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/wait.h"

#include <poll.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"

namespace zerod::client {

std::string InSeconds(absl::Duration spent) {
  return absl::FormatDuration(absl::Trunc(spent, absl::Seconds(1)));
}

Requests::Requests(shm::SubmitPage* submit, const shm::CompletePage* complete, int doorbell_fd,
                   int socket_fd, std::string peer, Watchers watchers)
    : submit_(submit),
      complete_(complete),
      socket_fd_(socket_fd),
      peer_(std::move(peer)),
      watchers_(std::move(watchers)),
      ring_(submit, complete, doorbell_fd) {}

void Requests::Drain() {
  shm::CompleteEntry entry;
  while (ring_.Pop(&entry)) {
    auto found = pending_.find(entry.cookie);
    if (found == pending_.end()) continue;  // nothing of ours: the daemon answered twice
    if (found->second.abandoned) {
      pending_.erase(found);
      continue;
    }
    Answer& answer = found->second.answer;
    answer.result = entry.result;
    if (entry.code != 0) {
      answer.status =
          absl::Status(static_cast<absl::StatusCode>(entry.code), ring_.Text(entry));
    }
    found->second.done = true;
  }
}

bool Requests::DaemonGone() const {
  pollfd socket{socket_fd_, POLLRDHUP, 0};
  // The daemon sends nothing more on this socket, so its end is the only news there can be.
  return poll(&socket, 1, 0) > 0 &&
         (socket.revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL)) != 0;
}

absl::Status Requests::Slice(std::unique_lock<std::mutex>* lock, News news, absl::Duration slice,
                             absl::string_view what, WaitState* wait) {
  bool woken = false;
  // Only one thread sleeps on the ring; it wakes the others for what they may have waited for.
  if (polling_ || news == News::kThread) {
    woken = changed_.wait_for(*lock, absl::ToChronoNanoseconds(slice)) ==
            std::cv_status::no_timeout;
  } else {
    polling_ = true;
    lock->unlock();
    woken = ring_.Sleep(slice);
    lock->lock();
    polling_ = false;
    Drain();
    changed_.notify_all();
  }
  // An answer that came before the failure still counts, so the caller looks before it gives up.
  const absl::Time now = MonotonicNow();
  if (woken && now - wait->looked < kWaitSlice) return absl::OkStatus();
  wait->looked = now;
  if (DaemonGone()) {
    if (!polling_) Drain();
    RETURN_IF_ERROR(ring_.Failure());
    return absl::UnavailableError(
        absl::StrCat("the zerod daemon at ", peer_, " is gone (its connection closed) while this "
                     "process waited for ", what, "; the job's state in its memory is lost, its "
                     "log says why it ended"));
  }
  if (watchers_.interrupt) {
    lock->unlock();
    const bool interrupted = watchers_.interrupt();
    lock->lock();
    if (interrupted) {
      return absl::CancelledError(absl::StrCat("interrupted while waiting for ", what));
    }
  }
  Tell(lock, what, now, wait);
  return absl::OkStatus();
}

Requests::WaitState Requests::BeginWait() const {
  const absl::Time now = MonotonicNow();
  return {now, now, watchers_.notice};
}

// That it takes long, and again each time that as long as until then has passed.
void Requests::Tell(std::unique_lock<std::mutex>* lock, absl::string_view what, absl::Time now,
                    WaitState* wait) const {
  const absl::Duration waited = now - wait->start;
  if (!watchers_.on_wait || waited < wait->notice) return;
  wait->notice = 2 * waited;
  lock->unlock();
  watchers_.on_wait(absl::StrCat("still waiting for ", what, " after ",
                                 InSeconds(waited), ": 'zerodctl --address ", peer_,
                                 " jobs' says which ranks the job waits for"));
  lock->lock();
}

absl::Status Requests::PushLocked(std::unique_lock<std::mutex>* lock,
                                  const shm::SubmitEntry& entry) {
  WaitState wait = BeginWait();
  for (;;) {
    absl::Status pushed = ring_.Push(entry);
    if (!absl::IsResourceExhausted(pushed) || ring_.Failure() == pushed) return pushed;
    // Room is made without a completion, so look again soon.
    RETURN_IF_ERROR(Slice(lock, News::kRing, absl::Milliseconds(1), "room in the submission ring",
                          &wait));
  }
}

absl::StatusOr<uint64_t> Requests::Post(shm::SubmitEntry entry) {
  std::unique_lock<std::mutex> lock(mu_);
  if (!polling_) Drain();
  WaitState wait = BeginWait();
  while (pending_.size() >= kPendingMax) {
    RETURN_IF_ERROR(ring_.Failure());
    RETURN_IF_ERROR(Slice(&lock, News::kRing, kWaitSlice, "earlier requests", &wait));
  }
  entry.cookie = next_cookie_++;
  pending_[entry.cookie];
  absl::Status pushed = PushLocked(&lock, entry);
  if (!pushed.ok()) {
    pending_.erase(entry.cookie);
    return pushed;
  }
  return entry.cookie;
}

absl::Status Requests::PostUnanswered(const shm::SubmitEntry& entry) {
  std::unique_lock<std::mutex> lock(mu_);
  return PushLocked(&lock, entry);
}

void Requests::Hint(const shm::SubmitEntry& entry) {
  std::unique_lock<std::mutex> lock(mu_);
  ring_.Push(entry).IgnoreError();  // full, or failed: whoever waits next is told
}

absl::StatusOr<size_t> Requests::WaitAny(absl::Span<const uint64_t> cookies,
                                         absl::string_view what) {
  std::unique_lock<std::mutex> lock(mu_);
  if (!polling_) Drain();
  WaitState wait = BeginWait();
  for (;;) {
    for (size_t i = 0; i < cookies.size(); ++i) {
      auto found = pending_.find(cookies[i]);
      if (found == pending_.end()) {
        return absl::InternalError(absl::StrCat("no request has cookie ", cookies[i]));
      }
      if (found->second.done) return i;
    }
    RETURN_IF_ERROR(ring_.Failure());
    RETURN_IF_ERROR(Slice(&lock, News::kRing, kWaitSlice, what, &wait));
  }
}

absl::StatusOr<Requests::Answer> Requests::Wait(uint64_t cookie, absl::string_view what) {
  absl::StatusOr<size_t> which = WaitAny(absl::MakeConstSpan(&cookie, 1), what);
  std::unique_lock<std::mutex> lock(mu_);
  if (!which.ok()) {
    if (!absl::IsCancelled(which.status())) pending_.erase(cookie);
    return which.status();
  }
  Answer answer = std::move(pending_[cookie].answer);
  pending_.erase(cookie);
  changed_.notify_all();
  return answer;
}

std::optional<Requests::Answer> Requests::TryTake(uint64_t cookie) {
  std::unique_lock<std::mutex> lock(mu_);
  if (!polling_) Drain();
  auto found = pending_.find(cookie);
  if (found == pending_.end() || !found->second.done) return std::nullopt;
  Answer answer = std::move(found->second.answer);
  pending_.erase(found);
  return answer;
}

void Requests::Abandon(uint64_t cookie) {
  std::unique_lock<std::mutex> lock(mu_);
  auto found = pending_.find(cookie);
  if (found == pending_.end()) return;
  if (found->second.done) {
    pending_.erase(found);
  } else {
    found->second.abandoned = true;
  }
}

absl::Status Requests::Acquire(Turn turn, absl::string_view what) {
  std::unique_lock<std::mutex> lock(mu_);
  bool& busy = busy_[static_cast<size_t>(turn)];
  WaitState wait = BeginWait();
  while (busy) {
    RETURN_IF_ERROR(ring_.Failure());
    RETURN_IF_ERROR(Slice(&lock, News::kThread, kWaitSlice, what, &wait));
  }
  busy = true;
  return absl::OkStatus();
}

void Requests::Release(Turn turn) {
  std::unique_lock<std::mutex> lock(mu_);
  busy_[static_cast<size_t>(turn)] = false;
  changed_.notify_all();
}

bool Requests::AllTaken() const {
  return complete_->sq_head.load(std::memory_order_acquire) ==
         submit_->tail.load(std::memory_order_relaxed);
}

}  // namespace zerod::client
