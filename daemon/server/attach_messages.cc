// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/attach_messages.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "daemon/server/options.h"
#include "proto/shm/format.h"
#include "proto/version.h"

namespace zerod::server {
namespace {

constexpr size_t kJobIdMax = 128;
constexpr size_t kTokenMax = 1024;

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

absl::Status CheckVersions(const v1::AttachRequest& request) {
  if (request.protocol() == kProtocolVersion && request.shm_format() == shm::kFormatVersion) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "the client speaks protocol ", request.protocol(), " with shared memory format ",
      request.shm_format(), ", the daemon protocol ", kProtocolVersion, " with format ",
      shm::kFormatVersion, ": install the same version of zerod for both"));
}

absl::Status CheckJobId(const std::string& id) {
  bool ok = !id.empty() && id.size() <= kJobIdMax;
  for (char c : id) ok = ok && (absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-');
  if (ok) return absl::OkStatus();
  return Invalid(
      "the job id must have 1 to 128 characters, each a letter, a digit, '.', '_' or '-'");
}

absl::Status CheckPlace(const v1::AttachRequest& r, const Limits& limits) {
  if (r.world() == 0 || r.world() > limits.world_max) {
    return Invalid(absl::StrCat("world is ", r.world(), "; it must be 1 to ", limits.world_max));
  }
  if (r.rank() >= r.world()) {
    return Invalid(absl::StrCat("rank is ", r.rank(), " in a world of ", r.world()));
  }
  if (r.local_world() == 0 || r.local_world() > limits.local_world_max ||
      r.local_world() > r.world()) {
    return Invalid(absl::StrCat("local_world is ", r.local_world(), "; it must be 1 to ",
                                std::min(limits.local_world_max, r.world())));
  }
  if (r.local_rank() >= r.local_world()) {
    return Invalid(absl::StrCat("local_rank is ", r.local_rank(), " among ", r.local_world(),
                                " ranks on this node"));
  }
  const uint32_t members = std::max(1, r.peers_size());
  if (members > core::kMembersMax) {
    return Invalid(absl::StrCat("the job has ", members, " nodes; at most ", core::kMembersMax,
                                " are served"));
  }
  if (r.node_rank() >= members) {
    return Invalid(absl::StrCat("node_rank is ", r.node_rank(), ", and the list of peers has ",
                                r.peers_size(), " addresses: each node's daemon must be in it"));
  }
  if (members == 1 && r.local_world() != r.world()) {
    return Invalid(absl::StrCat("world is ", r.world(), ", but this node has ", r.local_world(),
                                " ranks and the list of peers names no other node"));
  }
  if (members > 1 && r.local_world() + members - 1 > r.world()) {
    return Invalid(absl::StrCat("world is ", r.world(), "; ", r.local_world(),
                                " ranks here and at least one on each of ", members - 1,
                                " other nodes are more"));
  }
  if (r.job_token().size() > kTokenMax || (members > 1 && r.job_token().empty())) {
    return Invalid("a job of several nodes needs a job_token of 1 to 1024 bytes, the same for all "
                   "its clients");
  }
  for (const std::string& peer : r.peers()) {
    if (members > 1) RETURN_IF_ERROR(ParseHostPort(peer).status());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<core::ModelDescription> ParseModel(const v1::Model& model, const Config& config) {
  core::ModelDescription description;
  switch (model.dtype()) {
    case v1::DATA_TYPE_FLOAT32: description.dtype = core::DType::kFloat32; break;
    case v1::DATA_TYPE_BFLOAT16: description.dtype = core::DType::kBFloat16; break;
    case v1::DATA_TYPE_FLOAT16: description.dtype = core::DType::kFloat16; break;
    default: return Invalid("model.dtype must be float32, bfloat16 or float16");
  }
  const core::DType configured = config.fp16.enabled ? core::DType::kFloat16
                                 : config.bf16       ? core::DType::kBFloat16
                                                     : core::DType::kFloat32;
  if (description.dtype != configured) {
    return Invalid(absl::StrCat("the configuration asks for ", core::DTypeName(configured),
                                " (bf16.enabled, fp16.enabled), and the model's parameters are to "
                                "be ", core::DTypeName(description.dtype)));
  }
  description.modules.reserve(model.modules_size());
  for (const v1::Module& m : model.modules()) {
    description.modules.push_back({m.path(), m.type(), m.is_container(), m.leaf()});
  }
  description.parameters.reserve(model.parameters_size());
  for (const v1::Parameter& p : model.parameters()) {
    core::ParameterDescription parameter;
    parameter.name = p.name();
    parameter.shape.assign(p.shape().begin(), p.shape().end());
    parameter.trainable = p.trainable();
    parameter.group = p.group();
    parameter.modules.assign(p.modules().begin(), p.modules().end());
    description.parameters.push_back(std::move(parameter));
  }
  for (const int kind : model.groups()) {
    // Unknown values are kept as they came.
    if (kind < v1::OPTIMIZER_KIND_ADAM || kind > static_cast<int>(core::kOptimizerKindLast)) {
      return Invalid(absl::StrCat("model.groups has the unknown optimizer ", kind));
    }
    description.groups.push_back(static_cast<core::OptimizerKind>(kind));
  }
  return description;
}

absl::StatusOr<AttachArguments> ParseAttachRequest(const v1::AttachRequest& request,
                                                   const Limits& limits) {
  RETURN_IF_ERROR(CheckVersions(request));
  RETURN_IF_ERROR(CheckJobId(request.job()));
  RETURN_IF_ERROR(CheckPlace(request, limits));
  AttachArguments arguments;
  arguments.job = request.job();
  arguments.attempt = request.attempt();
  arguments.rank = request.rank();
  arguments.world = request.world();
  arguments.local_rank = request.local_rank();
  arguments.local_world = request.local_world();
  arguments.node_rank = request.node_rank();
  arguments.peers.assign(request.peers().begin(), request.peers().end());
  arguments.job_token = request.job_token();
  ASSIGN_OR_RETURN(arguments.config, Config::Parse(request.config(), request.world()));
  ASSIGN_OR_RETURN(const core::ModelDescription model,
                   ParseModel(request.model(), arguments.config));
  ASSIGN_OR_RETURN(core::Layout layout, core::Layout::Build(model, arguments.config.zerod.units));
  arguments.layout = std::make_shared<const core::Layout>(std::move(layout));
  return arguments;
}

v1::AttachResponse MakeAttachResponse(const AttachArguments& arguments,
                                      const AttachResult& result) {
  const core::Layout& layout = *arguments.layout;
  const core::JobPlan& plan = result.plan;
  v1::AttachResponse response;
  response.set_generation(result.attachment.generation);
  response.set_committed_step(result.attachment.committed_step);
  response.set_applied_steps(result.attachment.applied_steps);
  response.set_initialized(result.attachment.initialized);
  response.set_layout_hash(layout.hash().Bytes());
  for (size_t u = 0; u < layout.units().size(); ++u) {
    const core::Unit& unit = layout.units()[u];
    v1::UnitInfo* info = response.add_units();
    info->set_name(unit.name);
    info->set_elements(unit.elements);
    info->set_first_chunk(unit.first_chunk);
    info->set_chunks(unit.chunks);
    info->set_trainable_elements(unit.trainable_elements);
    if (u < plan.gradient_offsets.size()) info->set_gradient_offset(plan.gradient_offsets[u]);
    info->set_resident(u < plan.window.resident.size() && plan.window.resident[u]);
  }
  for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
    const core::Parameter& parameter = layout.parameters()[i];
    v1::ParameterPlace* place = response.add_places();
    place->set_unit(parameter.unit);
    place->set_offset(parameter.offset);
    place->set_index(i);
  }
  response.set_window_chunks(plan.window.max_chunks);
  response.set_window_bytes(plan.window.base_chunks * shm::kChunkBytes);
  response.set_gradient_plan(plan.node_sum ? v1::GRADIENT_PLAN_NODE_SUM
                                           : v1::GRADIENT_PLAN_PER_RANK);
  response.set_gradient_bytes(plan.gradient_file_bytes);
  response.set_staged_part_elements(plan.staged_part_elements);
  response.set_transfer_bytes(plan.transfer_bytes);
  response.set_blob_offset(plan.transfer_values_bytes);
  response.set_stage(arguments.config.zero.stage);
  response.set_dtype(static_cast<v1::DataType>(layout.dtype()));
  response.set_guard_pages(arguments.config.zerod.guard_pages);
  response.set_resolved_config(arguments.config.ToJson());
  response.set_plan_text(plan.text);
  response.set_members(result.members);
  response.set_slot(result.attachment.slot);
  response.set_loss_scale(result.attachment.loss_scale);
  response.set_committed_skipped(result.attachment.committed_skipped);
  return response;
}

}  // namespace zerod::server
