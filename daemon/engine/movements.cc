// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/movements.h"

#include <algorithm>

#include "daemon/core/plan.h"

namespace zerod::engine {

using core::MemberIndex;
using core::Range;

size_t MoveContext::StagingBytes() const {
  return members() == 1 ? 0 : 2 * sizeof(float) * (members() - 1) * piece_elements;
}

float* MoveContext::SendArea(std::byte* staging, MemberIndex m) const {
  const uint64_t place = m < self ? m : m - 1;
  return reinterpret_cast<float*>(staging) + place * piece_elements;
}

float* MoveContext::ReceiveArea(std::byte* staging, MemberIndex m) const {
  return SendArea(staging, m) + (members() - 1) * piece_elements;
}

Range MoveContext::Cut(Range range, size_t piece) const {
  const uint64_t begin = std::min(range.end, range.begin + piece * piece_elements);
  return {begin, std::min(range.end, begin + piece_elements)};
}

size_t MoveContext::Cuts(Range range) const {
  return range.empty() ? 0 : (range.size() + piece_elements - 1) / piece_elements;
}

}  // namespace zerod::engine
