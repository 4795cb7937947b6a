// SPDX-License-Identifier: Apache-2.0
//
// What a fused AdamW cannot beat: a loop with its reads and writes and next to no arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zerod::bench {

// How the loop goes about it; the limit is the best of all.
struct TrafficOptions {
  bool copy;           // write the 16-bit copy
  bool stream_copy;    // past the caches
  size_t prefetch_bytes;  // ahead, 0: leave it to the hardware
};

// Reads g, p, m, v; writes p, m, v with the values they had, and copy from p. `copy` is aligned to
// 64 bytes and n a multiple of 32.
void Traffic(const TrafficOptions& options, const float* g, float* p, float* m, float* v,
             uint16_t* copy, size_t n);

}  // namespace zerod::bench
