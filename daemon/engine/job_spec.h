// SPDX-License-Identifier: Apache-2.0
//
// What a configuration means to core.
#pragma once

#include "daemon/core/job.h"
#include "daemon/core/plan.h"
#include "daemon/engine/job_runner.h"

namespace zerod::engine {

core::JobSpec MakeJobSpec(const JobRequest& request, const core::JobPlan& plan);

}  // namespace zerod::engine
