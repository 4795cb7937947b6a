// SPDX-License-Identifier: Apache-2.0
//
// Time for limits and latencies: never jumps.
#pragma once

#include <time.h>

#include "absl/time/time.h"

namespace zerod::engine {

inline absl::Time MonotonicNow() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return absl::TimeFromTimespec(now);
}

}  // namespace zerod::engine
