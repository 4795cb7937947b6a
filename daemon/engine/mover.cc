// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/mover.h"

#include <utility>

#include "base/check.h"

namespace zerod::engine {
namespace {

// Tag of a piece's exchange: unique for the life of the fabric, below 2^63.
constexpr int kPieceBits = 20;
uint64_t Tag(uint64_t seq, size_t piece, int phase) {
  return (((seq << kPieceBits) | piece) << 1) | static_cast<uint64_t>(phase);
}

}  // namespace

Mover::Mover(Options options, Workers* workers, Mailbox* mailbox,
             std::function<void(uint64_t, uint64_t)> count)
    : options_(options), workers_(workers), mailbox_(mailbox), count_(std::move(count)) {
  for (size_t slot = 0; slot < options_.slots; ++slot) free_slots_.push_back(slot);
}

void Mover::Start(uint64_t seq, std::shared_ptr<Movement> movement,
                  std::function<void(absl::Status)> done) {
  CHECK_LT(movement->pieces(), size_t{1} << kPieceBits);
  auto entry = std::make_shared<Entry>();
  entry->seq = seq;
  entry->movement = std::move(movement);
  entry->done = std::move(done);
  if (entry->movement->pieces() == 0) {
    mailbox_->Post([entry] { entry->done(absl::OkStatus()); });
    return;
  }
  queue_.push_back(std::move(entry));
  Pump();
}

void Mover::Pump() {
  while (!queue_.empty() && !free_slots_.empty()) {
    const EntryPtr entry = queue_.front();
    const size_t piece = entry->next++;
    if (entry->next == entry->movement->pieces()) queue_.pop_front();
    const size_t slot = free_slots_.back();
    free_slots_.pop_back();
    ++entry->busy;
    Begin(entry, piece, slot);
  }
}

void Mover::RunParts(const EntryPtr& entry, size_t slot, size_t parts,
                     std::function<void(size_t)> part, std::function<void()> next) {
  if (parts == 0) return next();
  absl::Status status = workers_->Run(parts, std::move(part), std::move(next));
  if (status.ok()) return;
  entry->status.Update(status);
  mailbox_->Post([this, entry, slot] { Retire(entry, slot); });
}

void Mover::Begin(const EntryPtr& entry, size_t piece, size_t slot) {
  Movement* movement = entry->movement.get();
  RunParts(
      entry, slot, movement->PrepareParts(piece),
      [movement, piece, staging = Staging(slot)](size_t part) {
        movement->Prepare(piece, part, staging);
      },
      [this, entry, piece, slot] {
        Move(entry, piece, slot, 0, [this, entry, piece, slot] { Finish(entry, piece, slot); });
      });
}

void Mover::Move(const EntryPtr& entry, size_t piece, size_t slot, int phase,
                 std::function<void()> next) {
  Movement::Transfers sends, receives;
  if (phase == 0) {
    entry->movement->Exchange(piece, Staging(slot), &sends, &receives);
  } else {
    entry->movement->SecondExchange(piece, &sends, &receives);
  }
  if (sends.empty() && receives.empty()) {
    // Not at once: a long row of pieces would become a deep row of calls.
    mailbox_->Post(std::move(next));
    return;
  }
  CHECK(fabric_ != nullptr) << "an exchange before the fabric is connected";
  uint64_t sent = 0, received = 0;
  for (const fabric::Transfer& t : sends) sent += t.bytes;
  for (const fabric::Transfer& t : receives) received += t.bytes;
  count_(sent, received);
  fabric_->Exchange(
      Tag(entry->seq, piece, phase), std::move(sends), std::move(receives),
      [this, mailbox = mailbox_, entry, slot, next = std::move(next)](absl::Status status) {
        mailbox->Post([this, entry, slot, next, status] {
          if (status.ok()) return next();
          entry->status.Update(status);
          Retire(entry, slot);
        });
      });
}

void Mover::Finish(const EntryPtr& entry, size_t piece, size_t slot) {
  Movement* movement = entry->movement.get();
  RunParts(
      entry, slot, movement->FinishParts(piece),
      [movement, piece, staging = Staging(slot)](size_t part) {
        movement->Finish(piece, part, staging);
      },
      [this, entry, piece, slot] {
        Move(entry, piece, slot, 1, [this, entry, slot] { Retire(entry, slot); });
      });
}

void Mover::Retire(const EntryPtr& entry, size_t slot) {
  free_slots_.push_back(slot);
  --entry->busy;
  if (!entry->status.ok() && entry->next < entry->movement->pieces()) {
    // The fabric is dead: the pieces that were not begun never are.
    CHECK(!queue_.empty());
    for (auto it = queue_.begin(); it != queue_.end(); ++it) {
      if (*it == entry) {
        queue_.erase(it);
        break;
      }
    }
    entry->next = entry->movement->pieces();
  }
  if (entry->busy == 0 && entry->next == entry->movement->pieces()) entry->done(entry->status);
  Pump();
}

}  // namespace zerod::engine
