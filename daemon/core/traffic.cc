// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/traffic.h"

#include <algorithm>
#include <vector>

namespace zerod::core {
namespace {

constexpr uint64_t kGradientBytes = sizeof(float);  // of an element, on the wire and in a file

// How often each unit's copy is filled in one step.
class Fills {
 public:
  Fills(const Config& config, const Layout& layout, const JobPlan& plan)
      : layout_(layout), window_(plan.window), fills_(layout.units().size(), 0) {
    const uint64_t micro_steps = config.gradient_accumulation_steps;
    for (UnitIndex u = 0; u < fills_.size(); ++u) {
      // Nothing changes what is frozen, so a copy that stays in the window stays valid.
      const bool trained = layout.units()[u].trainable_elements > 0;
      fills_[u] = window_.pinned[u] && !trained ? 0 : 1;
    }
    // At a turn from one pass to the next, what was used last is used first.
    const std::vector<bool> last = Kept(/*from_the_end=*/true);
    const std::vector<bool> first = Kept(/*from_the_end=*/false);
    for (UnitIndex u = 0; u < fills_.size(); ++u) {
      if (window_.pinned[u]) continue;
      if (!last[u]) fills_[u] += micro_steps;
      if (!first[u]) fills_[u] += micro_steps - 1;
    }
  }

  uint64_t of(UnitIndex u) const { return fills_[u]; }

 private:
  // The units, one after the other, that the part of the window they share has room for.
  std::vector<bool> Kept(bool from_the_end) const {
    const size_t units = fills_.size();
    uint64_t room = window_.base_chunks;
    for (UnitIndex u = 0; u < units; ++u) {
      if (window_.pinned[u]) room -= std::min(room, layout_.units()[u].chunks);
    }
    std::vector<bool> kept(units, false);
    for (size_t i = 0; i < units; ++i) {
      const UnitIndex u = static_cast<UnitIndex>(from_the_end ? units - 1 - i : i);
      if (window_.pinned[u]) continue;
      if (layout_.units()[u].chunks > room) break;
      room -= layout_.units()[u].chunks;
      kept[u] = true;
    }
    return kept;
  }

  const Layout& layout_;
  const WindowSpec& window_;
  std::vector<uint64_t> fills_;
};

}  // namespace

TrafficPlan PlanTraffic(const Config& config, const Layout& layout, const JobPlan& plan,
                        uint32_t members, MemberIndex self, uint32_t local_world) {
  const Partition partition(layout, members);
  const uint64_t peers = members - 1;
  const uint64_t element_bytes = DTypeBytes(layout.dtype());
  const Fills fills(config, layout, plan);
  TrafficPlan t;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    const Unit& unit = layout.units()[u];
    t.gathered += fills.of(u) * layout.UnitBytes(u);
    if (config.zero.stage > 0) {  // else each member's optimizer writes its own copy
      const uint64_t own = partition.Shard(u, self).size();
      t.sent += fills.of(u) * peers * own * element_bytes;
      t.received += members == 1 ? 0 : fills.of(u) * (unit.elements - own) * element_bytes;
    }
    const uint64_t own = partition.TrainableShard(u, self).size();
    const uint64_t others = members == 1 ? 0 : unit.trainable_elements - own;
    t.sent += others * kGradientBytes;
    t.received += peers * own * kGradientBytes;
    if (config.zero.stage == 0) {  // the reduced gradient, to all
      t.sent += peers * own * kGradientBytes;
      t.received += others * kGradientBytes;
    }
  }
  // Micro-steps are summed in each rank's file first, or by the node.
  const uint64_t handed_over = plan.node_sum ? config.gradient_accumulation_steps : 1;
  for (const Parameter& p : layout.parameters()) {
    if (p.trainable) t.scattered += p.elements * kGradientBytes * local_world * handed_over;
  }
  return t;
}

}  // namespace zerod::core
