// SPDX-License-Identifier: Apache-2.0
//
// What members ask to be gathered, before it becomes a log entry. An ALL_GATHER that several
// members want moves their shards in both directions of the network at once, and one that is not
// needed yet only stands in the way of those that are; so as long as enough is being moved, asks
// wait here, where they join and where demand overtakes forecast.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

#include "daemon/core/layout.h"
#include "daemon/core/types.h"

namespace zerod::core {

class WantQueue {
 public:
  struct Gather {
    UnitIndex unit = 0;
    MemberSet wants = 0;
  };

  // `in_flight_elements`: while so many are being gathered, nothing more is begun.
  WantQueue(const Layout* layout, uint64_t in_flight_elements)
      : layout_(layout), in_flight_elements_max_(in_flight_elements) {}

  // A version begins, or a generation: what waited is worth nothing. Nothing is begun until each
  // of `members` has said what it expects to need, because they all want much the same.
  void Restart(MemberSet members);
  void Add(UnitIndex unit, MemberIndex member, bool demand);
  // What was expected to be needed is needed now. Nothing where it has begun already.
  void Promote(UnitIndex unit);
  void Announced(MemberIndex member) { awaited_ &= ~(MemberSet{1} << member); }

  // Every ALL_GATHER, also one that was never asked for here.
  void Begun(UnitIndex unit) { in_flight_elements_ += Elements(unit); }
  void Ended(UnitIndex unit) { in_flight_elements_ -= Elements(unit); }

  // What to begin now, if anything; it is out of the queue then, and the caller says Begun.
  std::optional<Gather> Next();

 private:
  uint64_t Elements(UnitIndex unit) const { return layout_->units()[unit].elements; }

  const Layout* const layout_;
  const uint64_t in_flight_elements_max_;
  std::deque<Gather> demand_;
  std::deque<Gather> forecast_;
  MemberSet awaited_ = 0;
  uint64_t in_flight_elements_ = 0;
};

}  // namespace zerod::core
