// SPDX-License-Identifier: Apache-2.0
//
// Every queue of the fabric has an end.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace zerod::fabric {

// Exchanges that a caller may have in flight. The engine bounds its own; beyond this the fabric
// fails, because an exchange that is neither started nor refused would stall the peers.
inline constexpr size_t kExchangesInFlightMax = 16384;

// Segments in flight on a lane (one direction between two members in one exchange): enough to
// keep the wire busy while one is being retired, few enough that a small, urgent exchange never
// waits behind a whole large one.
inline constexpr size_t kLaneSegmentsMax = 4;

// A local copy is cut into pieces of this size, between which the network is looked after.
inline constexpr size_t kCopyBytes = 4 << 20;

// A peer that moves bytes of other exchanges is not silent. It may keep one exchange waiting for
// this many stall timeouts, then that too is a stall: every wait ends.
inline constexpr int kQueueingStallTimeouts = 10;

inline absl::Status TooManyExchanges() {
  return absl::ResourceExhaustedError(
      absl::StrCat("more than ", kExchangesInFlightMax,
                   " exchanges in flight: start fewer before waiting for the first"));
}

}  // namespace zerod::fabric
