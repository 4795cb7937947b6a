// SPDX-License-Identifier: Apache-2.0
//
// Jobs and Admin: gRPC in front of the job table, nothing else. Private to the server.
#pragma once

#include <functional>
#include <string>

#include "absl/time/time.h"
#include "daemon/server/job_table.h"
#include "daemon/server/limits.h"
#include "daemon/server/session.h"
#include "proto/zerod/v1/admin.grpc.pb.h"
#include "proto/zerod/v1/jobs.grpc.pb.h"

namespace zerod::server {

// What both services tell of the daemon; constant.
struct Identity {
  std::string boot_id;
  std::string peer_address;
  std::string metrics_address;
  absl::Time started;
};

class JobsService final : public v1::Jobs::Service {
 public:
  // All outlive the service.
  JobsService(const Identity* identity, JobTable* jobs, SessionTable* sessions,
              const Limits& limits)
      : identity_(identity), jobs_(jobs), sessions_(sessions), limits_(limits) {}

  grpc::Status GetVersion(grpc::ServerContext*, const v1::GetVersionRequest*,
                          v1::GetVersionResponse*) override;
  grpc::Status CheckConfig(grpc::ServerContext*, const v1::CheckConfigRequest*,
                           v1::CheckConfigResponse*) override;
  grpc::Status Attach(grpc::ServerContext*, const v1::AttachRequest*,
                      v1::AttachResponse*) override;
  grpc::Status GetClientState(grpc::ServerContext*, const v1::GetClientStateRequest*,
                              v1::GetClientStateResponse*) override;

 private:
  const Identity* const identity_;
  JobTable* const jobs_;
  SessionTable* const sessions_;
  const Limits limits_;
};

class AdminService final : public v1::Admin::Service {
 public:
  // All outlive the service. `drain` returns at once.
  AdminService(const Identity* identity, JobTable* jobs, SessionTable* sessions,
               arena::Arena* arena, std::function<void()> drain, const Limits& limits)
      : identity_(identity),
        jobs_(jobs),
        sessions_(sessions),
        arena_(arena),
        drain_(std::move(drain)),
        limits_(limits),
        memory_(arena::MakeSystemMemorySource()) {}

  grpc::Status Status(grpc::ServerContext*, const v1::StatusRequest*,
                      v1::StatusResponse*) override;
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest*,
                        v1::ListJobsResponse*) override;
  grpc::Status DeleteJob(grpc::ServerContext*, const v1::DeleteJobRequest*,
                         v1::DeleteJobResponse*) override;
  grpc::Status Drain(grpc::ServerContext*, const v1::DrainRequest*, v1::DrainResponse*) override;
  grpc::Status Plan(grpc::ServerContext*, const v1::PlanRequest*, v1::PlanResponse*) override;

 private:
  const Identity* const identity_;
  JobTable* const jobs_;
  SessionTable* const sessions_;
  arena::Arena* const arena_;
  const std::function<void()> drain_;
  const Limits limits_;
  const std::unique_ptr<arena::MemorySource> memory_;
};

}  // namespace zerod::server
