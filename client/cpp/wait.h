// SPDX-License-Identifier: Apache-2.0
//
// Requests on their way to the daemon, and the waits for their answers. Every wait ends by the
// answer, the attachment's failure, the daemon's death (its end of the fd socket hangs up), or the
// caller's interrupt, each looked at no later than every kWaitSlice.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "proto/shm/ring.h"

namespace zerod::client {

// For messages, in whole seconds.
std::string InSeconds(absl::Duration spent);

inline constexpr absl::Duration kWaitSlice = absl::Milliseconds(100);
// Requests with a completion to come; below kRingEntries, so that the completion ring cannot
// overflow whatever the daemon does.
inline constexpr size_t kPendingMax = shm::kRingEntries - 16;

// Whom waits ask and tell, in the waiting thread and without any lock of Requests. Each may be
// empty.
struct Watchers {
  std::function<bool()> interrupt;                  // true ends the wait
  std::function<void(const std::string&)> on_wait;  // see AttachOptions
  absl::Duration notice = absl::InfiniteDuration();
};

// Thread-safe.
class Requests {
 public:
  struct Answer {
    absl::Status status;
    uint64_t result = 0;
  };

  // Operations that own a piece of shared memory for their whole duration.
  enum class Turn { kLanding, kTransfer, kScalar, kStep };

  // `socket_fd` and the pages outlive this; nothing is owned. `peer` names the daemon in messages.
  Requests(shm::SubmitPage* submit, const shm::CompletePage* complete, int doorbell_fd,
           int socket_fd, std::string peer, Watchers watchers);

  // Sends a request that is answered; returns its cookie. Waits where too many are on their way.
  absl::StatusOr<uint64_t> Post(shm::SubmitEntry entry);
  // Sends a request without an answer.
  absl::Status PostUnanswered(const shm::SubmitEntry& entry);
  // The same for what may be left out: does nothing where the ring is full or the job has failed.
  void Hint(const shm::SubmitEntry& entry);

  // Waits for the answer; the cookie is used up, unless CANCELLED: then it may be waited for
  // again, or given up by Abandon(). `what` completes "interrupted while waiting for ...".
  absl::StatusOr<Answer> Wait(uint64_t cookie, absl::string_view what);
  // The index of one of `cookies` whose answer has come; none is used up.
  absl::StatusOr<size_t> WaitAny(absl::Span<const uint64_t> cookies, absl::string_view what);
  // The answer, if it has come; the cookie is used up then.
  std::optional<Answer> TryTake(uint64_t cookie);
  // Nobody will wait for it.
  void Abandon(uint64_t cookie);

  // One caller at a time per kind; waits like every other wait.
  absl::Status Acquire(Turn turn, absl::string_view what);
  void Release(Turn turn);

  // The daemon has taken everything that was sent.
  bool AllTaken() const;
  // OK, or why the attachment has failed. Cheap.
  absl::Status Failure() const { return ring_.Failure(); }
  bool Failed() const { return complete_->failed.load(std::memory_order_relaxed) != 0; }

 private:
  struct Pending {
    bool done = false;
    bool abandoned = false;
    Answer answer;
  };

  void Drain();  // mu_ held, and nobody polls
  enum class News { kRing, kThread };
  struct WaitState {
    absl::Time start;
    absl::Time looked;      // for a death and an interrupt
    absl::Duration notice;  // from the start
  };
  WaitState BeginWait() const;
  // Waits for news, at most `slice`; `lock` is released meanwhile. kRing: from the daemon; kThread:
  // from another thread of this process. An error ends the wait: failure, death or interrupt.
  absl::Status Slice(std::unique_lock<std::mutex>* lock, News news, absl::Duration slice,
                     absl::string_view what, WaitState* wait);
  void Tell(std::unique_lock<std::mutex>* lock, absl::string_view what, absl::Time now,
            WaitState* wait) const;
  bool DaemonGone() const;
  absl::Status PushLocked(std::unique_lock<std::mutex>* lock, const shm::SubmitEntry& entry);

  const shm::SubmitPage* const submit_;
  const shm::CompletePage* const complete_;
  const int socket_fd_;
  const std::string peer_;
  const Watchers watchers_;

  std::mutex mu_;
  std::condition_variable changed_;  // an answer was delivered, a turn ended, the poller left
  shm::SubmitRing ring_;             // Push: mu_. Pop and Sleep: mu_, or being the poller.
  bool polling_ = false;             // a thread sleeps on the ring, without mu_
  uint64_t next_cookie_ = 1;
  absl::flat_hash_map<uint64_t, Pending> pending_;
  std::array<bool, 4> busy_{};
};

// Holds a turn until it goes out of scope.
class TurnHolder {
 public:
  TurnHolder(Requests* requests, Requests::Turn turn) : requests_(requests), turn_(turn) {}
  TurnHolder(const TurnHolder&) = delete;
  TurnHolder& operator=(const TurnHolder&) = delete;
  ~TurnHolder() { requests_->Release(turn_); }

 private:
  Requests* const requests_;
  const Requests::Turn turn_;
};

}  // namespace zerod::client
