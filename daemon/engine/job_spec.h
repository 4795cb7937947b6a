// SPDX-License-Identifier: Apache-2.0
//
// What a configuration means to core and to the movements.
#pragma once

#include "base/config.h"
#include "daemon/core/job.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "daemon/engine/job_runner.h"

namespace zerod::engine {

core::JobSpec MakeJobSpec(const JobRequest& request, const core::JobPlan& plan);

// The type of gradients between members: communication_data_type; where that is left out, the
// parameters' own, as in DeepSpeed.
core::DType WireType(const Config& config, core::DType parameters);

}  // namespace zerod::engine
