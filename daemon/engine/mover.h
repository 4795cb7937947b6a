// SPDX-License-Identifier: Apache-2.0
//
// Moves the bytes of log entries: each entry is a Movement cut into pieces, the same on all
// members, which pass through a fixed number of staging slots, first in, first out:
//   Prepare (workers) -> exchange 0 (fabric) -> Finish (workers) -> exchange 1 (fabric, if any)
// All members take the same pieces in the same order and a piece waits for nothing but the same
// piece elsewhere, so the oldest piece always has a slot everywhere and nothing can lock up.
// The loop only.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "daemon/engine/mailbox.h"
#include "daemon/engine/workers.h"
#include "daemon/fabric/fabric.h"

namespace zerod::engine {

class Movement {
 public:
  using Transfers = std::vector<fabric::Transfer>;

  virtual ~Movement() = default;
  virtual size_t pieces() const = 0;
  // `staging`: Mover::Options::slot_bytes of this piece alone. Prepare and Finish run on workers,
  // parts of a piece at once; Exchange on the loop.
  virtual size_t PrepareParts(size_t /*piece*/) const { return 0; }
  virtual void Prepare(size_t /*piece*/, size_t /*part*/, std::byte* /*staging*/) {}
  virtual void Exchange(size_t /*piece*/, std::byte* /*staging*/, Transfers* /*sends*/,
                        Transfers* /*receives*/) {}
  virtual size_t FinishParts(size_t /*piece*/) const { return 0; }
  virtual void Finish(size_t /*piece*/, size_t /*part*/, std::byte* /*staging*/) {}
  virtual void SecondExchange(size_t /*piece*/, Transfers* /*sends*/, Transfers* /*receives*/) {}
};

class Mover {
 public:
  struct Options {
    size_t slots = 4;
    size_t slot_bytes = 0;
    std::byte* staging = nullptr;  // slots * slot_bytes
  };
  // `sent` and `received` count payload bytes.
  Mover(Options options, Workers* workers, Mailbox* mailbox,
        std::function<void(uint64_t sent, uint64_t received)> count);

  // Null until connected; one member needs none. Outlives what is moved.
  void set_fabric(fabric::Fabric* fabric) { fabric_ = fabric; }

  // `seq` of the log entry; `done` once, on the loop.
  void Start(uint64_t seq, std::shared_ptr<Movement> movement,
             std::function<void(absl::Status)> done);

 private:
  struct Entry {
    uint64_t seq = 0;
    std::shared_ptr<Movement> movement;
    std::function<void(absl::Status)> done;
    size_t next = 0;  // first piece that was not begun
    size_t busy = 0;  // pieces in slots
    absl::Status status;
  };
  using EntryPtr = std::shared_ptr<Entry>;

  void Pump();
  void Begin(const EntryPtr& entry, size_t piece, size_t slot);
  void Move(const EntryPtr& entry, size_t piece, size_t slot, int phase,
            std::function<void()> next);
  void Finish(const EntryPtr& entry, size_t piece, size_t slot);
  void Retire(const EntryPtr& entry, size_t slot);
  void RunParts(const EntryPtr& entry, size_t slot, size_t parts,
                std::function<void(size_t)> part, std::function<void()> next);
  std::byte* Staging(size_t slot) const { return options_.staging + slot * options_.slot_bytes; }

  const Options options_;
  Workers* const workers_;
  Mailbox* const mailbox_;
  const std::function<void(uint64_t, uint64_t)> count_;
  fabric::Fabric* fabric_ = nullptr;
  std::deque<EntryPtr> queue_;  // with pieces to begin
  std::vector<size_t> free_slots_;
};

}  // namespace zerod::engine
