// SPDX-License-Identifier: Apache-2.0
//
// zerodctl plan: what a job would take and move. The daemon works it out (Admin.Plan), with the
// code that plans real jobs: a tool links the contract and the configuration, and nothing of the
// daemon's, so a second set of formulas here could only drift from what the daemon does.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "client/ctl/configs.h"
#include "client/ctl/rpc.h"

namespace zerod::ctl {

struct PlanArguments {
  CheckConfigArguments config;  // its world is the ranks in all
  uint64_t parameters = 0;      // 0: `model` says
  std::string model;
  uint32_t nodes = 1;
  uint64_t node_memory_bytes = 0;
};

absl::Status Plan(Daemon* daemon, const PlanArguments& arguments, bool json);

}  // namespace zerod::ctl
