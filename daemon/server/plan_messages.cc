// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/plan_messages.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "base/config.h"
#include "base/status.h"
#include "daemon/core/layout.h"
#include "daemon/core/plan.h"
#include "daemon/core/traffic.h"
#include "daemon/server/attach_messages.h"

namespace zerod::server {
namespace {

constexpr uint64_t kChunkBytes = 64 * 1024;

absl::Status CheckPlace(const v1::PlanRequest& r, const Limits& limits) {
  if (r.nodes() == 0 || r.nodes() > core::kMembersMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("nodes is ", r.nodes(), "; it must be 1 to ", core::kMembersMax));
  }
  if (r.world() == 0 || r.world() > limits.world_max || r.world() % r.nodes() != 0 ||
      r.world() / r.nodes() > limits.local_world_max) {
    return absl::InvalidArgumentError(absl::StrCat(
        "there are ", r.world(), " ranks on ", r.nodes(), " nodes; it must be the same number on "
        "each node, at most ", limits.local_world_max, ", and at most ", limits.world_max,
        " in all"));
  }
  return absl::OkStatus();
}

// As engine::JobRunner chooses: the roomy plan where it fits, else the tight one.
absl::StatusOr<core::JobPlan> PlanMember(const Config& config, const core::Layout& layout,
                                         const v1::PlanRequest& r, core::MemberIndex self) {
  const uint32_t local_world = r.world() / r.nodes();
  const auto plan_for = [&](uint64_t available_bytes) {
    return core::PlanJob(config, layout, r.nodes(), self, local_world, available_bytes);
  };
  ASSIGN_OR_RETURN(core::JobPlan plan, plan_for(std::numeric_limits<uint64_t>::max()));
  const uint64_t memory = r.node_memory_bytes();
  if (memory == 0 || plan.memory.total() <= memory) return plan;
  ASSIGN_OR_RETURN(plan, plan_for(0));
  if (plan.memory.total() <= memory) return plan;
  return absl::ResourceExhaustedError(absl::StrCat(
      "node ", self, " would need ", plan.memory.total(), " bytes of its ", memory, ": ",
      plan.text));
}

void Fill(const core::JobPlan& plan, const core::TrafficPlan& traffic, v1::MemberPlan* member) {
  for (const auto& [kind, bytes] : plan.memory.Named()) {
    v1::PlannedMemory* memory = member->add_memory();
    memory->set_tier("host");  // the one tier that there is: state on GPUs and NVMe comes later
    memory->set_kind(kind);
    memory->set_bytes(bytes);
  }
  member->set_memory_bytes(plan.memory.total());
  member->set_rank_bytes(plan.client_bytes);
  member->set_bytes_gathered(traffic.gathered);
  member->set_bytes_scattered(traffic.scattered);
  member->set_bytes_sent(traffic.sent);
  member->set_bytes_received(traffic.received);
}

}  // namespace

absl::StatusOr<v1::PlanResponse> MakePlan(const v1::PlanRequest& request, const Limits& limits) {
  RETURN_IF_ERROR(CheckPlace(request, limits));
  ASSIGN_OR_RETURN(const Config config, Config::Parse(request.config(), request.world()));
  ASSIGN_OR_RETURN(const core::ModelDescription model, ParseModel(request.model(), config));
  ASSIGN_OR_RETURN(const core::Layout layout, core::Layout::Build(model, config.zerod.units));
  v1::PlanResponse response;
  response.set_parameters(layout.parameter_elements());
  response.set_units(static_cast<uint32_t>(layout.units().size()));
  response.set_stage(config.zero.stage);
  response.set_dtype(layout.dtype() == core::DType::kFloat32 ? "float32" : "bfloat16");
  response.set_local_world(request.world() / request.nodes());
  response.set_window_bytes_all(layout.chunks() * kChunkBytes);
  for (core::MemberIndex m = 0; m < request.nodes(); ++m) {
    ASSIGN_OR_RETURN(const core::JobPlan plan, PlanMember(config, layout, request, m));
    const core::TrafficPlan traffic = core::PlanTraffic(config, layout, plan, request.nodes(), m,
                                                        response.local_world());
    v1::MemberPlan* member = response.add_members();
    member->set_node_rank(m);
    Fill(plan, traffic, member);
    response.set_gradient_plan(plan.node_sum ? "node_sum" : "per_rank");
    response.set_window_bytes(plan.window.base_chunks * kChunkBytes);
    response.set_window_is_master(plan.master_in_window);
  }
  return response;
}

}  // namespace zerod::server
