// SPDX-License-Identifier: Apache-2.0
//
// What an Exchange amounts to: lanes (everything that goes one way between this member and one
// peer, in order) and local copies. Pure: no sockets, no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/fabric/fabric.h"

namespace zerod::fabric {

// Where both ends of a transfer meet: a pure function of what both know, so that the order in
// which members start their exchanges does not matter.
//   `order`: the place of the transfer among those of its lane, from 0, empty ones included.
// The size is part of it, so that members that disagree about a transfer never meet (and end by
// the stall timeout) instead of writing a part of what was expected.
// For one (order, bytes) the map is a bijection of the tag: such transfers never collide. Two
// transfers that differ there collide by chance only, 2^-64 for each pair that is in flight
// between two members at one time.
uint64_t SlotOf(uint64_t tag, uint32_t order, size_t bytes);

struct Segment {
  char* data = nullptr;
  size_t bytes = 0;
  uint64_t slot = 0;  // the same for all segments of a transfer: they meet in order
};

class Lane {
 public:
  Lane(uint32_t peer, bool sends) : peer_(peer), sends_(sends) {}

  uint32_t peer() const { return peer_; }
  bool sends() const { return sends_; }

  void Add(uint64_t tag, const Transfer& transfer);
  bool exhausted() const { return next_transfer_ == transfers_.size(); }
  // The next piece, of at most segment_bytes. REQUIRES: !exhausted().
  Segment Next(size_t segment_bytes);

 private:
  uint32_t peer_;
  bool sends_;
  uint32_t added_ = 0;
  std::vector<Segment> transfers_;  // whole ones, none of them empty
  size_t next_transfer_ = 0;
  size_t next_offset_bytes_ = 0;
};

struct Copy {
  const char* from = nullptr;
  char* to = nullptr;
  size_t bytes = 0;
};

struct Plan {
  std::vector<Lane> lanes;
  std::vector<Copy> copies;
};

// INVALID_ARGUMENT: a peer >= size, a tag >= 2^63, a null pointer with bytes, or transfers to
// oneself whose sends and receives do not pair up.
absl::StatusOr<Plan> MakePlan(uint32_t rank, uint32_t size, uint64_t tag,
                              const std::vector<Transfer>& sends,
                              const std::vector<Transfer>& receives);

}  // namespace zerod::fabric
