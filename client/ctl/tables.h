// SPDX-License-Identifier: Apache-2.0
//
// What zerodctl prints. Pure: messages in, text out.
#pragma once

#include <string>

#include "google/protobuf/message.h"
#include "proto/zerod/v1/admin.pb.h"

namespace zerod::ctl {

// Every field by its name in the .proto; 64-bit numbers as numbers.
std::string ToJson(const google::protobuf::Message& message);

std::string StatusText(const v1::StatusResponse& status);
std::string JobsText(const v1::ListJobsResponse& jobs);
// One screen: the daemon in a line, a line per job with rates since `before`, `seconds` ago
// (a job that was not there then has none).
std::string TopText(const v1::StatusResponse& status, const v1::ListJobsResponse& before,
                    const v1::ListJobsResponse& now, double seconds);

// What Admin.Plan says of the job of this name: memory by tier, and a step's traffic.
std::string PlanText(const std::string& name, const v1::PlanResponse& plan);

// "1.5 GiB".
std::string Bytes(double bytes);

}  // namespace zerod::ctl
