// SPDX-License-Identifier: Apache-2.0
//
// zerodctl's calls to a daemon. Every one is bounded. The gRPC headers are in rpc.cc alone.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/zerod/v1/admin.pb.h"
#include "proto/zerod/v1/jobs.pb.h"

namespace zerod::ctl {

class Daemon {
 public:
  // `address`: "unix:/path/zerod.sock", or the bare path.
  static std::unique_ptr<Daemon> Connect(const std::string& address);
  virtual ~Daemon() = default;

  virtual absl::StatusOr<v1::StatusResponse> Status() = 0;
  virtual absl::StatusOr<v1::ListJobsResponse> ListJobs() = 0;
  virtual absl::Status DeleteJob(const std::string& id) = 0;
  virtual absl::Status Drain() = 0;
  virtual absl::StatusOr<v1::PlanResponse> Plan(const v1::PlanRequest& request) = 0;
};

}  // namespace zerod::ctl
