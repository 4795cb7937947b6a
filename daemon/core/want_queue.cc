// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/want_queue.h"

#include <algorithm>

namespace zerod::core {
namespace {

auto Find(std::deque<WantQueue::Gather>& queue, UnitIndex unit) {
  return std::find_if(queue.begin(), queue.end(),
                      [unit](const WantQueue::Gather& g) { return g.unit == unit; });
}

}  // namespace

void WantQueue::Restart(MemberSet members) {
  demand_.clear();
  forecast_.clear();
  awaited_ = members;
}

void WantQueue::Add(UnitIndex unit, MemberIndex member, bool demand) {
  const MemberSet bit = MemberSet{1} << member;
  if (auto waiting = Find(demand_, unit); waiting != demand_.end()) {
    waiting->wants |= bit;
    return;
  }
  auto waiting = Find(forecast_, unit);
  if (waiting != forecast_.end()) {
    waiting->wants |= bit;
    if (demand) Promote(unit);
    return;
  }
  (demand ? demand_ : forecast_).push_back({unit, bit});
}

void WantQueue::Promote(UnitIndex unit) {
  auto waiting = Find(forecast_, unit);
  if (waiting == forecast_.end()) return;
  demand_.push_back(*waiting);
  forecast_.erase(waiting);
}

std::optional<WantQueue::Gather> WantQueue::Next() {
  std::deque<Gather>& queue = demand_.empty() ? forecast_ : demand_;
  const bool enough = in_flight_elements_ >= in_flight_elements_max_;
  if (awaited_ != 0 || queue.empty() || enough) return std::nullopt;
  const Gather next = queue.front();
  queue.pop_front();
  return next;
}

}  // namespace zerod::core
