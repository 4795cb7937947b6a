// SPDX-License-Identifier: Apache-2.0
//
// One attachment of one training process: its files, its ring, and what is known of its process.
// Lives on while the process may still read or write the files, and while gradients in them are
// part of a step under way.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "daemon/core/types.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/format.h"
#include "proto/shm/ring.h"
#include "storage/arena/arena.h"

namespace zerod::engine {

// A request that was not answered yet.
struct PendingRequest {
  shm::Op op = shm::Op::kNone;
  absl::Time since;
  core::UnitIndex unit = 0;
  uint64_t count = 0;           // PUT, READ: elements
  uint64_t staging_offset = 0;  // SCATTER under node_sum
  uint32_t part = 0;            // likewise: of the unit
  std::vector<bool> touched;    // likewise
};

class ClientSlot {
 public:
  enum class State {
    kAttached,
    kFailed,  // this attachment is over, its process lives and may still look at its holds
    kLeft,    // detached of its own will
    kDead,    // its process has ended
  };

  // Allocates the client's files. Thread-safe (it is the caller's thread that waits for pages).
  static absl::StatusOr<std::shared_ptr<ClientSlot>> Create(arena::Arena* arena,
                                                            const std::string& job,
                                                            core::SlotIndex slot, uint32_t rank,
                                                            int pid, shm::UniqueFd pidfd,
                                                            const core::Layout& layout,
                                                            const core::JobPlan& plan);

  // Everything below: the loop only.
  shm::ServeRing& ring() { return *ring_; }
  const shm::SubmitPage* submit() const {
    return reinterpret_cast<const shm::SubmitPage*>(files_[0].data());
  }
  shm::CompletePage* complete() const {
    return reinterpret_cast<shm::CompletePage*>(files_[1].data());
  }
  const std::atomic<uint32_t>* holds() const {
    return reinterpret_cast<const std::atomic<uint32_t>*>(files_[0].data() + sections_.hold);
  }
  const std::byte* trace() const { return files_[0].data() + sections_.trace; }
  const uint8_t* touched() const {
    return reinterpret_cast<const uint8_t*>(files_[0].data() + sections_.touched);
  }
  std::byte* gradient() const { return files_[2].data(); }
  std::byte* transfer() const { return files_[3].data(); }
  uint64_t gradient_bytes() const { return files_[2].bytes(); }
  uint64_t control_bytes() const;  // of the other three files

  // The client's own four files, then `units` and `window`, then the doorbell.
  std::vector<int> Fds(int units_fd, int window_fd) const;
  int doorbell() const { return doorbell_.get(); }
  int pidfd() const { return pidfd_.get(); }
  bool process_lives() const { return state != State::kDead; }

  const core::SlotIndex slot;
  const uint32_t rank;
  const int pid;
  State state = State::kAttached;
  absl::flat_hash_map<uint64_t, PendingRequest> pending;  // by cookie; at most kRingEntries

 private:
  ClientSlot(core::SlotIndex s, uint32_t r, int p) : slot(s), rank(r), pid(p) {}

  arena::Region files_[4];  // by shm::ClientFile
  shm::SubmitSections sections_{};
  shm::UniqueFd doorbell_;
  shm::UniqueFd pidfd_;
  std::unique_ptr<shm::ServeRing> ring_;
};

}  // namespace zerod::engine
