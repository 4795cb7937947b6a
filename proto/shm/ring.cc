// SPDX-License-Identifier: Apache-2.0
#include "proto/shm/ring.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "absl/strings/str_cat.h"

namespace zerod::shm {
namespace {

static_assert(kDoorbellEvents == (uint32_t{EPOLLIN} | uint32_t{EPOLLET}));
static_assert((kRingEntries & (kRingEntries - 1)) == 0);

// When spinning was in vain, the next budget is halved down to this, so that a later change for
// the better is still noticed.
constexpr int64_t kSpinFloorNs = 1000;

// The words of a text slot are read while they may be rewritten, so both sides use relaxed
// atomics on them; the slot's seq tells whether what was read is one text.
constexpr size_t kTextCapacity = sizeof(TextSlot::text);

int64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE_FLAG: the two sides are different processes.
void FutexWait(const std::atomic<uint32_t>* word, uint32_t expected, absl::Duration slice) {
  const timespec limit = absl::ToTimespec(std::max(slice, absl::ZeroDuration()));
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(word), FUTEX_WAIT, expected, &limit, nullptr,
          0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

template <typename T>
void CopyWords(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    const T value = __atomic_load_n(reinterpret_cast<const T*>(from + i), __ATOMIC_RELAXED);
    memcpy(to + i, &value, sizeof(T));
  }
}

// The mirror image, for what the other side may read meanwhile. `to` is 4-byte aligned.
void StoreText(TextSlot* slot, uint32_t seq, absl::string_view text) {
  const size_t bytes = std::min(text.size(), kTextCapacity);
  __atomic_store_n(&slot->seq, 0, __ATOMIC_RELAXED);
  std::atomic_thread_fence(std::memory_order_release);  // no word below is seen with the old seq
  __atomic_store_n(&slot->bytes, static_cast<uint32_t>(bytes), __ATOMIC_RELAXED);
  for (size_t i = 0; i < bytes; i += 4) {
    uint32_t value = 0;
    memcpy(&value, text.data() + i, std::min<size_t>(4, bytes - i));
    __atomic_store_n(reinterpret_cast<uint32_t*>(slot->text + i), value, __ATOMIC_RELAXED);
  }
  __atomic_store_n(&slot->seq, seq, __ATOMIC_RELEASE);
}

// Empty where the slot does not hold the text `seq`, or ceased to while it was read.
std::string LoadText(const TextSlot* slot, uint32_t seq) {
  if (seq == 0 || __atomic_load_n(&slot->seq, __ATOMIC_ACQUIRE) != seq) return {};
  const uint32_t bytes = __atomic_load_n(&slot->bytes, __ATOMIC_RELAXED);
  char text[kTextCapacity];
  CopyWords<uint32_t>(text, slot->text, kTextCapacity);
  std::atomic_thread_fence(std::memory_order_acquire);
  if (__atomic_load_n(&slot->seq, __ATOMIC_RELAXED) != seq) return {};
  return std::string(text, std::min<size_t>(bytes, kTextCapacity));
}

}  // namespace

void CopyShared(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const size_t head =
      std::min<size_t>(bytes, (8 - (reinterpret_cast<uintptr_t>(in) & 7)) & 7);
  CopyWords<uint8_t>(out, in, head);
  const size_t body = (bytes - head) & ~size_t{7};
  CopyWords<uint64_t>(out + head, in + head, body);
  CopyWords<uint8_t>(out + head + body, in + head + body, bytes - head - body);
}

void InitPages(SubmitPage* submit, CompletePage* complete) {
  submit->magic = kMagic;
  submit->version = kFormatVersion;
  complete->magic = kMagic;
  complete->version = kFormatVersion;
}

absl::Status CheckPages(const SubmitPage* submit, const CompletePage* complete) {
  for (const auto& [name, magic, version] :
       {std::tuple{"submit", submit->magic, submit->version},
        std::tuple{"complete", complete->magic, complete->version}}) {
    if (magic != kMagic) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the ", name, " page is not zerod's (magic ", absl::Hex(magic),
          "); is what listens on this socket a zerod daemon?"));
    }
    if (version != kFormatVersion) {
      return absl::FailedPreconditionError(
          absl::StrCat("the ", name, " page has format ", version, ", this client speaks ",
                       kFormatVersion, "; install the same version of zerod on both sides"));
    }
  }
  return absl::OkStatus();
}

// --- Client -----------------------------------------------------------------------------------

SubmitRing::SubmitRing(SubmitPage* submit, const CompletePage* complete, int doorbell_fd,
                       absl::Duration spin)
    : submit_(submit),
      complete_(complete),
      doorbell_fd_(doorbell_fd),
      spin_max_ns_(absl::ToInt64Nanoseconds(
          std::clamp(spin, absl::ZeroDuration(), kSpinMax))),
      tail_(submit->tail.load(std::memory_order_relaxed)),
      head_(submit->cq_head.load(std::memory_order_relaxed)),
      spin_ns_(spin_max_ns_) {}

absl::Status SubmitRing::Push(const SubmitEntry& entry) {
  if (absl::Status failure = Failure(); !failure.ok()) return failure;
  // Acquire: the daemon has finished copying a slot before we write it anew.
  if (tail_ - complete_->sq_head.load(std::memory_order_acquire) >= kRingEntries) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the submission ring is full: the daemon has not taken any of the last ", kRingEntries,
        " requests; wait for completions before sending more"));
  }
  const char* bytes = reinterpret_cast<const char*>(&entry);
  char* slot = reinterpret_cast<char*>(&submit_->entry[tail_ % kRingEntries]);
  for (size_t i = 0; i < sizeof(SubmitEntry); i += 8) {
    uint64_t word;
    memcpy(&word, bytes + i, 8);
    __atomic_store_n(reinterpret_cast<uint64_t*>(slot + i), word, __ATOMIC_RELAXED);
  }
  submit_->tail.store(++tail_, std::memory_order_release);
  // The tail must be visible before we look whether the daemon sleeps, else both sides can miss
  // each other: it the entry, we the flag (docs/formats/ring.md).
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (complete_->sleeping.load(std::memory_order_relaxed) != 0) {
    const uint64_t one = 1;
    ssize_t written;
    do {
      written = write(doorbell_fd_, &one, sizeof(one));
    } while (written < 0 && errno == EINTR);
    // EAGAIN: the counter is full, so the daemon has been rung already.
    if (written < 0 && errno != EAGAIN) {
      return absl::InternalError(
          absl::StrCat("cannot ring the daemon's doorbell: ", strerror(errno)));
    }
  }
  return absl::OkStatus();
}

bool SubmitRing::Pop(CompleteEntry* entry) {
  if (complete_->tail.load(std::memory_order_acquire) == head_) return false;
  CopyShared(entry, &complete_->entry[head_ % kRingEntries], sizeof(*entry));
  submit_->cq_head.store(++head_, std::memory_order_release);
  return true;
}

bool SubmitRing::Ready() const {
  return complete_->tail.load(std::memory_order_acquire) != head_ ||
         complete_->failed.load(std::memory_order_acquire) != 0;
}

bool SubmitRing::Spin() {
  const int64_t end = NowNs() + spin_ns_;
  do {
    for (int i = 0; i < 16; ++i) {
      if (Ready()) {
        spin_ns_ = spin_max_ns_;
        return true;
      }
      Pause();
    }
  } while (NowNs() < end);
  spin_ns_ = std::min(spin_max_ns_, std::max(kSpinFloorNs, spin_ns_ / 2));
  return false;
}

bool SubmitRing::Sleep(absl::Duration slice) {
  if (Ready()) return true;
  if (spin_ns_ > 0 && slice > absl::ZeroDuration() && Spin()) return true;
  // Read before the flag is set: a wake that answers the flag changes it afterwards, and then
  // futex_wait returns at once.
  const uint32_t seen = complete_->wake.load(std::memory_order_acquire);
  submit_->sleeping.store(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // flag visible before we look again
  if (!Ready()) FutexWait(&complete_->wake, seen, slice);
  submit_->sleeping.store(0, std::memory_order_relaxed);
  return Ready();
}

std::string SubmitRing::Text(const CompleteEntry& entry) const {
  return LoadText(&complete_->texts[entry.text_seq % kTextSlots], entry.text_seq);
}

absl::Status SubmitRing::Failure() const {
  const uint32_t code = complete_->failed.load(std::memory_order_acquire);
  if (code == 0) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(code), LoadText(&complete_->failure, 1));
}

bool HoldWords::Claim(uint32_t unit, uint32_t version) {
  Intend(unit, version);
  const UnitWord word = Word(unit);
  if (word.state == CopyState::kValid && word.version == version) return true;
  Unclaim(unit);
  return false;
}

void HoldWords::Intend(uint32_t unit, uint32_t version) {
  holds_[unit].store(version + 1, std::memory_order_relaxed);
  // The hold must be visible before the word is read: the daemon marks the word and then reads
  // the holds, and one of the two must see the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void HoldWords::Unclaim(uint32_t unit) { holds_[unit].store(0, std::memory_order_release); }

bool HoldWords::Held(uint32_t unit) const {
  return holds_[unit].load(std::memory_order_relaxed) != 0;
}

UnitWord HoldWords::Word(uint32_t unit) const {
  return UnpackUnitWord(words_[unit].load(std::memory_order_acquire));
}

// --- Daemon -----------------------------------------------------------------------------------

ServeRing::ServeRing(const SubmitPage* submit, CompletePage* complete)
    : submit_(submit),
      complete_(complete),
      head_(complete->sq_head.load(std::memory_order_relaxed)),
      tail_(complete->tail.load(std::memory_order_relaxed)) {}

absl::StatusOr<bool> ServeRing::Pop(SubmitEntry* entry) {
  const uint32_t tail = submit_->tail.load(std::memory_order_acquire);
  const uint32_t pending = tail - head_;
  if (pending == 0) return false;
  if (pending > kRingEntries) {
    return absl::InvalidArgumentError(
        absl::StrCat("the client's submission ring is damaged: its tail is ", tail, ", ", pending,
                     " ahead of ", head_, ", and the ring has ", kRingEntries,
                     " entries; the client is detached"));
  }
  CopyShared(entry, &submit_->entry[head_ % kRingEntries], sizeof(*entry));
  complete_->sq_head.store(++head_, std::memory_order_release);
  return true;
}

absl::Status ServeRing::Push(const CompleteEntry& entry, absl::string_view text) {
  const uint32_t head = submit_->cq_head.load(std::memory_order_acquire);
  const uint32_t unread = tail_ - head;
  if (unread > kRingEntries) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the client's completion head is damaged: it is ", head, " where ", tail_,
        " completions were sent; the client is detached"));
  }
  if (unread == kRingEntries) {
    return absl::ResourceExhaustedError(absl::StrCat("the client has left ", kRingEntries,
                                                     " completions unread; it is detached"));
  }
  CompleteEntry out = entry;
  out.text_seq = 0;
  if (!text.empty()) {
    if (++text_seq_ == 0) text_seq_ = 1;
    StoreText(&complete_->texts[text_seq_ % kTextSlots], text_seq_, text);
    out.text_seq = text_seq_;
  }
  complete_->entry[tail_ % kRingEntries] = out;
  complete_->tail.store(++tail_, std::memory_order_release);
  return absl::OkStatus();
}

void ServeRing::Wake() {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the tail is visible before we look
  if (submit_->sleeping.load(std::memory_order_relaxed) == 0) return;
  complete_->wake.fetch_add(1, std::memory_order_release);
  FutexWakeAll(&complete_->wake);
}

bool ServeRing::PrepareSleep() {
  complete_->sleeping.store(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the flag is visible before we look
  if (submit_->tail.load(std::memory_order_acquire) == head_) return true;
  CancelSleep();
  return false;
}

void ServeRing::CancelSleep() { complete_->sleeping.store(0, std::memory_order_relaxed); }

void ServeRing::Fail(absl::StatusCode code, absl::string_view text) {
  if (complete_->failed.load(std::memory_order_relaxed) != 0) return;
  StoreText(&complete_->failure, 1, text);
  complete_->failed.store(static_cast<uint32_t>(code), std::memory_order_release);
  // Whatever its sleeping flag says: this is the last word, and it costs one call.
  complete_->wake.fetch_add(1, std::memory_order_release);
  FutexWakeAll(&complete_->wake);
}

absl::StatusOr<int> MakeDoorbell() {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot make an eventfd: ", strerror(errno),
                     "; raise the daemon's limit of open files (ulimit -n, LimitNOFILE=)"));
  }
  return fd;
}

bool TryRetract(std::atomic<uint64_t>* word,
                absl::Span<const std::atomic<uint32_t>* const> holds) {
  const uint64_t before = word->load(std::memory_order_relaxed);
  UnitWord unit = UnpackUnitWord(before);
  if (unit.state != CopyState::kValid) return false;
  const uint32_t own = unit.version + 1;
  unit.state = CopyState::kEvicting;
  word->store(PackUnitWord(unit), std::memory_order_relaxed);
  // The mark must be visible before the holds are read; mirror image of HoldWords::Intend().
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const std::atomic<uint32_t>* hold : holds) {
    // Acquire: with a hold that is gone, the client's reads of the copy are over.
    if (hold->load(std::memory_order_acquire) == own) {
      word->store(before, std::memory_order_release);
      return false;
    }
  }
  unit.state = CopyState::kAbsent;
  word->store(PackUnitWord(unit), std::memory_order_release);
  return true;
}

}  // namespace zerod::shm
