// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace zerod {

// Of the package zerod.v1. Bumped when a change would be misunderstood by the other side; client
// and daemon, and daemon and daemon, must agree exactly.
inline constexpr uint32_t kProtocolVersion = 3;

}  // namespace zerod
