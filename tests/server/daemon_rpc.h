// SPDX-License-Identifier: Apache-2.0
//
// Calls of a test to a daemon, each bounded. gRPC is included by daemon_rpc.cc alone.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/zerod/v1/admin.pb.h"
#include "proto/zerod/v1/jobs.pb.h"

namespace zerod::server::testing {

class Rpc {
 public:
  static std::unique_ptr<Rpc> Connect(const std::string& address);
  virtual ~Rpc() = default;
  // grpc.health.v1: 1 = SERVING, 2 = NOT_SERVING; "" is the whole server.
  virtual absl::StatusOr<int> Health(const std::string& service) = 0;
  // The raw answer of the reflection service to "list services".
  virtual absl::StatusOr<std::string> ReflectedServices() = 0;
  virtual absl::StatusOr<v1::GetVersionResponse> GetVersion() = 0;
  virtual absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request) = 0;
  virtual absl::StatusOr<v1::GetClientStateResponse> ClientState(const std::string& token) = 0;
  virtual absl::StatusOr<v1::StatusResponse> Status() = 0;
  virtual absl::StatusOr<v1::ListJobsResponse> ListJobs() = 0;
  virtual absl::Status DeleteJob(const std::string& id) = 0;
  virtual absl::Status Drain() = 0;
};

}  // namespace zerod::server::testing
