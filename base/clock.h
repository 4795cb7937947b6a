// SPDX-License-Identifier: Apache-2.0
//
// Time for limits, leases and latencies: it never jumps. The wall clock (absl::Now) does, when it
// is set, and is only for what a person reads and for the deadlines that gRPC wants in it.
#pragma once

#include <time.h>

#include "absl/time/time.h"

namespace zerod {

// Comparable with other values of this function alone. Any thread.
inline absl::Time MonotonicNow() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return absl::TimeFromTimespec(now);
}

}  // namespace zerod
