// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace zerod::fabric {
namespace {

// The finalizer of SplitMix64: a bijection in which every input bit reaches every output bit.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

absl::Status CheckTransfers(uint32_t size, uint64_t tag, const std::vector<Transfer>& transfers,
                            const char* what) {
  for (const Transfer& transfer : transfers) {
    if (transfer.peer >= size) {
      return absl::InvalidArgumentError(
          absl::StrCat("exchange ", tag, " names member ", transfer.peer, " in a ", what,
                       ", but the job has ", size, " members (0 to ", size - 1, ")"));
    }
    if (transfer.data == nullptr && transfer.bytes > 0) {
      return absl::InvalidArgumentError(absl::StrCat("exchange ", tag, " has a ", what, " of ",
                                                     transfer.bytes, " bytes without memory"));
    }
  }
  return absl::OkStatus();
}

std::vector<Lane> LanesOf(uint32_t rank, uint32_t size, uint64_t tag,
                          const std::vector<Transfer>& transfers, bool sends) {
  std::vector<Lane> by_peer;
  by_peer.reserve(size);
  for (uint32_t peer = 0; peer < size; ++peer) by_peer.emplace_back(peer, sends);
  for (const Transfer& transfer : transfers) {
    if (transfer.peer != rank) by_peer[transfer.peer].Add(tag, transfer);
  }
  // Each member starts with the one after it, so that not all of them go to member 0 first.
  std::rotate(by_peer.begin(), by_peer.begin() + rank, by_peer.end());
  by_peer.erase(std::remove_if(by_peer.begin(), by_peer.end(),
                               [](const Lane& lane) { return lane.exhausted(); }),
                by_peer.end());
  return by_peer;
}

}  // namespace

uint64_t SlotOf(uint64_t tag, uint32_t order, size_t bytes) {
  return Mix(tag ^ Mix(uint64_t{order} + 0x9e3779b97f4a7c15u) ^ Mix(uint64_t{bytes}));
}

void Lane::Add(uint64_t tag, const Transfer& transfer) {
  const uint32_t order = added_++;
  if (transfer.bytes == 0) return;
  transfers_.push_back(Segment{static_cast<char*>(transfer.data), transfer.bytes,
                               SlotOf(tag, order, transfer.bytes)});
}

Segment Lane::Next(size_t segment_bytes) {
  CHECK(!exhausted());
  const Segment& transfer = transfers_[next_transfer_];
  Segment piece{transfer.data + next_offset_bytes_,
                std::min(segment_bytes, transfer.bytes - next_offset_bytes_), transfer.slot};
  next_offset_bytes_ += piece.bytes;
  if (next_offset_bytes_ == transfer.bytes) {
    ++next_transfer_;
    next_offset_bytes_ = 0;
  }
  return piece;
}

absl::StatusOr<Plan> MakePlan(uint32_t rank, uint32_t size, uint64_t tag,
                              const std::vector<Transfer>& sends,
                              const std::vector<Transfer>& receives) {
  if (tag >> 63 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("exchange tag ", tag, " is not below 2^63"));
  }
  RETURN_IF_ERROR(CheckTransfers(size, tag, sends, "send"));
  RETURN_IF_ERROR(CheckTransfers(size, tag, receives, "receive"));

  Plan plan;
  std::vector<Transfer> from, to;
  auto to_self = [rank](const Transfer& transfer) { return transfer.peer == rank; };
  std::copy_if(sends.begin(), sends.end(), std::back_inserter(from), to_self);
  std::copy_if(receives.begin(), receives.end(), std::back_inserter(to), to_self);
  if (from.size() != to.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange ", tag, " sends ", from.size(), " transfers to its own member ",
                     rank, " but receives ", to.size()));
  }
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].bytes != to[i].bytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "exchange ", tag, ": transfer ", i, " of member ", rank, " to itself sends ",
          from[i].bytes, " bytes but receives ", to[i].bytes));
    }
    if (from[i].bytes == 0 || from[i].data == to[i].data) continue;
    plan.copies.push_back(Copy{static_cast<const char*>(from[i].data),
                               static_cast<char*>(to[i].data), from[i].bytes});
  }
  // Receives first: their notice lets a peer send at once.
  plan.lanes = LanesOf(rank, size, tag, receives, /*sends=*/false);
  std::vector<Lane> outgoing = LanesOf(rank, size, tag, sends, /*sends=*/true);
  std::move(outgoing.begin(), outgoing.end(), std::back_inserter(plan.lanes));
  return plan;
}

}  // namespace zerod::fabric
