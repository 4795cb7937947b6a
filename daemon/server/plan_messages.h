// SPDX-License-Identifier: Apache-2.0
//
// Admin.Plan: what core would plan for a job that nobody has attached to.
#pragma once

#include "absl/status/statusor.h"
#include "daemon/server/limits.h"
#include "proto/zerod/v1/admin.pb.h"

namespace zerod::server {

// Reserves nothing and looks at no job. INVALID_ARGUMENT naming the field, or what core says of a
// job that cannot be.
absl::StatusOr<v1::PlanResponse> MakePlan(const v1::PlanRequest& request, const Limits& limits);

}  // namespace zerod::server
