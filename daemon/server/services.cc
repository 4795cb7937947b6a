// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/services.h"

#include <unistd.h>

#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "daemon/server/attach_messages.h"
#include "daemon/server/grpc_status.h"
#include "daemon/server/plan_messages.h"
#include "proto/shm/format.h"
#include "proto/version.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr absl::Duration kDeleteWait = absl::Seconds(30);

const char* StateName(core::JobState state) {
  switch (state) {
    case core::JobState::kForming: return "forming";
    case core::JobState::kRunning: return "running";
    case core::JobState::kFailed: return "failed";
    case core::JobState::kEnded: return "ended";
  }
  return "unknown";
}

void Fill(const JobInfo& info, v1::JobStatus* job) {
  const engine::JobSnapshot& snapshot = info.snapshot;
  const core::Layout& layout = *info.request.layout;
  job->set_job(info.request.id);
  job->set_state(StateName(snapshot.state));
  job->set_reason(snapshot.reason);
  job->set_generation(snapshot.generation);
  job->set_committed_step(snapshot.committed_step);
  job->set_applied_steps(snapshot.applied_steps);
  job->set_members(info.request.members);
  job->set_node_rank(info.request.self);
  job->set_world(info.request.world);
  job->set_stage(info.request.config.zero.stage);
  job->set_dtype(core::DTypeName(layout.dtype()));
  job->set_gradient_plan(info.plan.node_sum ? "node_sum" : "per_rank");
  job->set_parameters(layout.parameter_elements());
  for (const auto& [kind, bytes] : snapshot.memory) {
    v1::MemoryUse* use = job->add_memory();
    use->set_kind(kind);
    use->set_bytes(bytes);
  }
  for (const engine::ClientSnapshot& c : snapshot.clients) {
    v1::ClientStatus* client = job->add_clients();
    client->set_rank(c.rank);
    client->set_local_rank(c.local_rank);
    client->set_pid(static_cast<uint64_t>(c.pid));
    client->set_state(c.state);
    client->set_step(c.step);
    client->set_units_held(c.units_held);
  }
  job->set_last_step_seconds(snapshot.last_step_seconds);
  job->set_bytes_gathered(snapshot.bytes_gathered);
  job->set_bytes_scattered(snapshot.bytes_scattered);
  job->set_bytes_sent(snapshot.bytes_sent);
  job->set_bytes_received(snapshot.bytes_received);
  job->set_window_growths(snapshot.window_growths);
}

// The client gets the sentence; the log keeps it for whoever looks later.
grpc::Status Refuse(const Limits& limits, const char* what, const absl::Status& status) {
  spdlog::info("{} refused: {}", what, status.ToString());
  return ToGrpc(status, limits.status_text_bytes_max);
}

}  // namespace

grpc::Status JobsService::GetVersion(grpc::ServerContext* /*context*/,
                                     const v1::GetVersionRequest* /*request*/,
                                     v1::GetVersionResponse* response) {
  response->set_version(ZEROD_VERSION);
  response->set_protocol(kProtocolVersion);
  response->set_shm_format(shm::kFormatVersion);
  response->set_boot_id(identity_->boot_id);
  response->set_peer_address(identity_->peer_address);
  response->set_pid(static_cast<uint64_t>(getpid()));
  return grpc::Status::OK;
}

grpc::Status JobsService::CheckConfig(grpc::ServerContext* /*context*/,
                                      const v1::CheckConfigRequest* request,
                                      v1::CheckConfigResponse* response) {
  if (request->world() == 0 || request->world() > limits_.world_max) {
    return ToGrpc(absl::InvalidArgumentError(absl::StrCat(
        "world is ", request->world(), "; it must be 1 to ", limits_.world_max)));
  }
  const absl::StatusOr<Config> config = Config::Parse(request->config(), request->world());
  if (!config.ok()) return ToGrpc(config.status(), limits_.status_text_bytes_max);
  response->set_resolved_config(config->ToJson());
  return grpc::Status::OK;
}

grpc::Status JobsService::Attach(grpc::ServerContext* /*context*/,
                                 const v1::AttachRequest* request, v1::AttachResponse* response) {
  const auto session = sessions_->Find(request->token());
  if (!session.ok()) return Refuse(limits_, "Attach", session.status());
  const auto arguments = ParseAttachRequest(*request, limits_);
  if (!arguments.ok()) return Refuse(limits_, "Attach", arguments.status());
  const auto result = jobs_->Attach(*session, *arguments);
  if (!result.ok()) return Refuse(limits_, "Attach", result.status());
  *response = MakeAttachResponse(*arguments, *result);
  return grpc::Status::OK;
}

grpc::Status JobsService::GetClientState(grpc::ServerContext* /*context*/,
                                         const v1::GetClientStateRequest* request,
                                         v1::GetClientStateResponse* response) {
  const auto session = sessions_->Find(request->token());
  if (!session.ok()) return Refuse(limits_, "GetClientState", session.status());
  auto state = jobs_->ClientState(**session);
  if (!state.ok()) return Refuse(limits_, "GetClientState", state.status());
  response->set_step(state->first);
  response->set_blob(std::move(state->second));
  return grpc::Status::OK;
}

grpc::Status AdminService::Status(grpc::ServerContext* /*context*/,
                                  const v1::StatusRequest* /*request*/,
                                  v1::StatusResponse* response) {
  response->set_version(ZEROD_VERSION);
  response->set_boot_id(identity_->boot_id);
  response->set_pid(static_cast<uint64_t>(getpid()));
  response->set_uptime_seconds(absl::ToDoubleSeconds(MonotonicNow() - identity_->started));
  response->set_draining(jobs_->admission() != Admission::kOpen);
  response->set_jobs(static_cast<uint32_t>(jobs_->size()));
  response->set_clients(static_cast<uint32_t>(sessions_->size()));
  std::ifstream statm("/proc/self/statm");
  uint64_t pages = 0;
  uint64_t resident = 0;
  statm >> pages >> resident;
  response->set_rss_bytes(resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
  const absl::StatusOr<arena::Available> available = memory_->Read();
  if (!available.ok()) return ToGrpc(available.status());
  response->set_memory_available_bytes(available->bytes);
  response->set_memory_reserved_bytes(arena_->reserved_bytes());
  response->set_peer_address(identity_->peer_address);
  response->set_metrics_address(identity_->metrics_address);
  return grpc::Status::OK;
}

grpc::Status AdminService::ListJobs(grpc::ServerContext* /*context*/,
                                    const v1::ListJobsRequest* /*request*/,
                                    v1::ListJobsResponse* response) {
  for (const JobInfo& info : jobs_->List()) Fill(info, response->add_jobs());
  return grpc::Status::OK;
}

grpc::Status AdminService::DeleteJob(grpc::ServerContext* /*context*/,
                                     const v1::DeleteJobRequest* request,
                                     v1::DeleteJobResponse* /*response*/) {
  spdlog::info("job {}: an operator deletes it", request->job());
  return ToGrpc(jobs_->Delete(request->job(), kDeleteWait));
}

grpc::Status AdminService::Drain(grpc::ServerContext* /*context*/,
                                 const v1::DrainRequest* /*request*/,
                                 v1::DrainResponse* /*response*/) {
  drain_();
  return grpc::Status::OK;
}

grpc::Status AdminService::Plan(grpc::ServerContext* /*context*/, const v1::PlanRequest* request,
                                v1::PlanResponse* response) {
  absl::StatusOr<v1::PlanResponse> plan = MakePlan(*request, limits_);
  if (!plan.ok()) return ToGrpc(plan.status(), limits_.status_text_bytes_max);
  *response = *std::move(plan);
  return grpc::Status::OK;
}

}  // namespace zerod::server
