// SPDX-License-Identifier: Apache-2.0
//
// What an optimizer's pass cannot beat: a loop with its reads and writes and next to no arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zerod::bench {

inline constexpr size_t kReadsMax = 2;
inline constexpr size_t kUpdatesMax = 3;

// Which arrays of floats the loop goes over, and how it goes about it; the limit is the best of all
// ways.
struct TrafficOptions {
  size_t reads;           // 1..kReadsMax arrays that are read
  size_t updates;         // 1..kUpdatesMax arrays that are read and written
  bool stream_copy;       // past the caches
  size_t prefetch_bytes;  // ahead, 0: leave it to the hardware
};

// Writes the arrays of `update` with the values they had, and, where it is not null, `copy` from
// the first of them. `copy` is aligned to 64 bytes and n a multiple of 32.
void Traffic(const TrafficOptions& options, const float* const* read, float* const* update,
             uint16_t* copy, size_t n);

}  // namespace zerod::bench
