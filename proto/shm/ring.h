// SPDX-License-Identifier: Apache-2.0
//
// The two ends of a client's rings over the pages of proto/shm/format.h: SubmitRing in the
// training process, ServeRing in the daemon, and the hold words with both halves of their
// protocol. docs/formats/ring.md and docs/formats/window.md have the prose, and the reason for
// each fence.
//
// Data that a request speaks of (gradients, values of a PUT) must be visible before the request
// is: Push() publishes with a release store, which covers ordinary stores. NON-TEMPORAL STORES
// ARE NOT COVERED: whoever makes them runs `sfence` (_mm_sfence()) before Push(), on either side.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "proto/shm/format.h"

namespace zerod::shm {

// Copies `bytes` out of memory that another process may be writing, reading each byte once; what
// is checked afterwards is the copy. The compiler cannot fold the copy back into the shared
// source, as it may with memcpy.
void CopyShared(void* to, const void* from, size_t bytes);

// Writes magic and version into fresh, zeroed pages. The daemon does so before it passes them.
void InitPages(SubmitPage* submit, CompletePage* complete);
// FAILED_PRECONDITION where the pages are not of this format; the client looks before it starts.
absl::Status CheckPages(const SubmitPage* submit, const CompletePage* complete);

// --- Client -----------------------------------------------------------------------------------

// The client's end. One thread at a time: callers with several threads hold a mutex around Push,
// and one around Pop and Sleep (they may be different ones: the two directions share nothing).
// The pages stay mapped and the doorbell open while the ring lives; neither is owned.
// After a fork the child must not use it.
class SubmitRing {
 public:
  // Longest time that Sleep() spins before it asks the kernel. Zero: never spin.
  static constexpr absl::Duration kSpinMax = absl::Microseconds(20);

  // `complete` may be a read-only mapping. `doorbell_fd` is the eventfd that came with the files.
  SubmitRing(SubmitPage* submit, const CompletePage* complete, int doorbell_fd,
             absl::Duration spin = kSpinMax);

  // Publishes one request; rings the doorbell if the daemon sleeps. RESOURCE_EXHAUSTED: the ring
  // is full, nothing was published. The daemon's own code and text once it has failed this
  // attachment.
  absl::Status Push(const SubmitEntry& entry);

  // Takes the oldest completion. False: none is there (`*entry` unchanged).
  bool Pop(CompleteEntry* entry);

  // Waits at most `slice` for a completion or the attachment's failure: spins a little (less when
  // spinning was in vain lately), then sleeps. False only if nothing had come. The caller looks
  // between slices whether the daemon still lives.
  bool Sleep(absl::Duration slice);

  // The text that came with a completion; empty where it had none, or when kTextSlots later texts
  // have overwritten it.
  std::string Text(const CompleteEntry& entry) const;

  // OK, or what the daemon failed this attachment with. Sticky. Any thread.
  absl::Status Failure() const;

 private:
  bool Ready() const;
  bool Spin();

  SubmitPage* const submit_;
  const CompletePage* const complete_;
  const int doorbell_fd_;
  const int64_t spin_max_ns_;
  uint32_t tail_;
  uint32_t head_;
  int64_t spin_ns_;
};

// A client's hold words (its own page) against the daemon's unit words (read-only here).
// Different units may be claimed by different threads; one unit by one thread at a time.
class HoldWords {
 public:
  HoldWords(std::atomic<uint32_t>* holds, const std::atomic<uint64_t>* words, uint32_t units)
      : holds_(holds), words_(words), units_(units) {}

  // True: the copy of `version` is valid and will stay as it is until Unclaim(); no request is
  // needed. False: the unit is not held; Intend() and ask with GATHER. Claiming what is held
  // already, at the same version, is harmless. REQUIRES: unit < units() (everywhere below).
  bool Claim(uint32_t unit, uint32_t version);
  // Sets the hold without looking, to be done before GATHER is pushed: when its completion comes
  // the copy is already held, with no gap in which it could be evicted again.
  void Intend(uint32_t unit, uint32_t version);
  // Everything read from the copy before this call was read from that copy.
  void Unclaim(uint32_t unit);
  bool Held(uint32_t unit) const;
  UnitWord Word(uint32_t unit) const;
  uint32_t units() const { return units_; }

 private:
  std::atomic<uint32_t>* const holds_;
  const std::atomic<uint64_t>* const words_;
  const uint32_t units_;
};

// --- Daemon -----------------------------------------------------------------------------------

// The daemon's end. One thread at a time. Trusts nothing in the submit page: indices are its own,
// entries are copied before anyone looks at them, and every error below means "detach this client
// (Fail() it, then forget it)", never more. The pages stay mapped while the ring lives.
class ServeRing {
 public:
  ServeRing(const SubmitPage* submit, CompletePage* complete);

  // Takes the oldest request. False: none. INVALID_ARGUMENT: the client's tail makes no sense.
  // What the entry says is unchecked; an unknown `op` is the caller's to refuse.
  absl::StatusOr<bool> Pop(SubmitEntry* entry);

  // Publishes a completion (`entry.text_seq` is set here; texts beyond kTextBytes - 8 are cut).
  // RESOURCE_EXHAUSTED: the client does not read its completions. INVALID_ARGUMENT: its head makes
  // no sense. Follow one or more pushes by one Wake().
  absl::Status Push(const CompleteEntry& entry, absl::string_view text = {});

  // Wakes the client if it sleeps. Costs a fence otherwise.
  void Wake();

  // For a loop that is about to block in epoll_wait on the doorbell: call on every ring, and block
  // only if all said true; then, awake again, CancelSleep() on every ring, and Pop until empty.
  // False: a request (or nonsense) is there already.
  // Add the doorbell with kDoorbellEvents and never read it: the client shares its file
  // description and could make a read block. Edge triggering reports each ring without one.
  bool PrepareSleep();
  void CancelSleep();

  // Fails every present and future request of this attachment, and wakes the client. The first
  // call counts. REQUIRES: code != kOk.
  void Fail(absl::StatusCode code, absl::string_view text);

 private:
  const SubmitPage* const submit_;
  CompletePage* const complete_;
  uint32_t head_;
  uint32_t tail_;
  uint32_t text_seq_ = 0;
};

// EPOLLIN | EPOLLET, see PrepareSleep().
inline constexpr uint32_t kDoorbellEvents = 0x001u | (1u << 31);
// An eventfd for a new client, O_CLOEXEC and non-blocking, owned by the caller.
absl::StatusOr<int> MakeDoorbell();

// Takes a kValid copy back for eviction or rewriting: the hazard pointer's daemon half. True: no
// client claims it nor can from now on; `*word` is kAbsent. False: claimed, or not kValid to begin
// with (nobody can claim it then); `*word` is as it was. Only holds of the copy's own version claim
// it. `holds` are this unit's hold words, one per living client. One thread per word.
bool TryRetract(std::atomic<uint64_t>* word,
                absl::Span<const std::atomic<uint32_t>* const> holds);

}  // namespace zerod::shm
