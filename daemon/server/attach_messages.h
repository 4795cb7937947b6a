// SPDX-License-Identifier: Apache-2.0
//
// Jobs.Attach between the wire and the job table.
#pragma once

#include "absl/status/statusor.h"
#include "daemon/server/job_table.h"
#include "daemon/server/limits.h"
#include "proto/zerod/v1/jobs.pb.h"

namespace zerod::server {

// Checks everything a request says by itself. FAILED_PRECONDITION for another version,
// INVALID_ARGUMENT naming the field for the rest.
absl::StatusOr<AttachArguments> ParseAttachRequest(const v1::AttachRequest& request,
                                                   const Limits& limits);

// A model as a client describes it, less what only the layout can tell. INVALID_ARGUMENT.
absl::StatusOr<core::ModelDescription> ParseModel(const v1::Model& model, const Config& config);

v1::AttachResponse MakeAttachResponse(const AttachArguments& arguments, const AttachResult& result);

}  // namespace zerod::server
