// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of landing a gradient: copies and sums in fp32, element by element, so that the
// bits do not depend on how a compiler or CPU vectorises it.
#pragma once

#include <cstdint>

#include "client/cpp/include/zerod/client.h"

namespace zerod::client {

// to[i] = from[i]. Large ones bypass the caches: another process reads them next, and much later.
// Includes the fence that ring.h asks for.
void LandCopy(float* to, const void* from, DType dtype, uint64_t count);
// to[i] += from[i].
void LandAdd(float* to, const void* from, DType dtype, uint64_t count);

}  // namespace zerod::client
