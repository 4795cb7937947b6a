// SPDX-License-Identifier: Apache-2.0
//
// What a step of a job will move, before it runs.
#pragma once

#include <cstdint>

#include "base/config.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"

namespace zerod::core {

// Bytes of one step on one member, counted as the metrics of the same names count them
// (docs/metrics.md).
struct TrafficPlan {
  uint64_t gathered = 0;   // copies of parameters that arrive in the window
  uint64_t scattered = 0;  // gradients that the clients hand over
  uint64_t sent = 0;       // to other members
  uint64_t received = 0;   // from other members
};

// Of a job that runs evenly: every rank uses every unit once in each forward and backward pass, in
// the layout's order and back, and each trainable parameter gets one gradient in each micro-step.
// Exact where every unit keeps its place in the window; where units take turns, as if what is
// needed soonest were always what is kept.
TrafficPlan PlanTraffic(const Config& config, const Layout& layout, const JobPlan& plan,
                        uint32_t members, MemberIndex self, uint32_t local_world);

}  // namespace zerod::core
