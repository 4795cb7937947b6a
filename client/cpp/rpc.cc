// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/rpc.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "client/cpp/wait.h"
#include "proto/shm/format.h"
#include "proto/version.h"
#include "proto/zerod/v1/jobs.grpc.pb.h"

namespace zerod::client {
namespace {

absl::Status ToStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void FillModel(const AttachOptions& options, v1::Model* model) {
  for (const ModuleInfo& module : options.modules) {
    v1::Module* out = model->add_modules();
    out->set_path(module.path);
    out->set_type(module.type);
    out->set_is_container(module.is_container);
    out->set_leaf(module.leaf);
  }
  for (const ParameterInfo& parameter : options.parameters) {
    v1::Parameter* out = model->add_parameters();
    out->set_name(parameter.name);
    for (int64_t size : parameter.shape) out->add_shape(size);
    out->set_trainable(parameter.trainable);
    out->set_group(parameter.group);
    for (const std::string& path : parameter.modules) out->add_modules(path);
  }
  for (const OptimizerKind kind : options.groups) {
    model->add_groups(static_cast<v1::OptimizerKind>(kind));
  }
  model->set_dtype(static_cast<v1::DataType>(options.dtype));
}

absl::Status Damaged(const std::string& what) {
  return absl::InternalError(
      absl::StrCat("the daemon's answer to Attach makes no sense: ", what));
}

absl::StatusOr<std::vector<UnitPlan>> ReadUnits(const v1::AttachResponse& response) {
  // Bounds the address space that is reserved on the daemon's word: 2^46 bytes.
  constexpr uint64_t kChunksMax = uint64_t{1} << 30;
  const bool node_sum = response.gradient_plan() == v1::GRADIENT_PLAN_NODE_SUM;
  const uint64_t element_bytes = response.dtype() == v1::DATA_TYPE_FLOAT32 ? 4 : 2;
  std::vector<UnitPlan> units;
  for (const v1::UnitInfo& unit : response.units()) {
    const std::string name = absl::StrCat("unit '", unit.name(), "'");
    if (unit.chunks() > kChunksMax || unit.first_chunk() > kChunksMax) {
      return Damaged(absl::StrCat(name, " has chunks [", unit.first_chunk(), ", +",
                                  unit.chunks(), ")"));
    }
    if (unit.elements() > unit.chunks() * shm::kChunkBytes / element_bytes ||
        unit.trainable_elements() > unit.elements()) {
      return Damaged(absl::StrCat(name, " has ", unit.elements(), " elements, ",
                                  unit.trainable_elements(), " of them trainable, in ",
                                  unit.chunks(), " chunks"));
    }
    const uint64_t gradient_bytes = unit.trainable_elements() * sizeof(float);
    if (!node_sum && gradient_bytes > 0 &&
        (unit.gradient_offset() % sizeof(float) != 0 ||
         unit.gradient_offset() > response.gradient_bytes() ||
         gradient_bytes > response.gradient_bytes() - unit.gradient_offset())) {
      return Damaged(absl::StrCat(name, " has its gradient at ", unit.gradient_offset(),
                                  " of a file of ", response.gradient_bytes()));
    }
    units.push_back({unit.name(), unit.elements(), unit.trainable_elements(), unit.first_chunk(),
                     unit.chunks(), unit.gradient_offset(), unit.resident()});
  }
  return units;
}

absl::StatusOr<std::vector<ParameterPlan>> ReadPlaces(const AttachOptions& options,
                                                      const v1::AttachResponse& response) {
  const size_t count = options.parameters.size();
  if (static_cast<size_t>(response.places_size()) != count) {
    return Damaged(absl::StrCat(response.places_size(), " places for ", count, " parameters"));
  }
  std::vector<ParameterPlan> parameters;
  for (size_t i = 0; i < count; ++i) {
    const v1::ParameterPlace& place = response.places(static_cast<int>(i));
    const ParameterInfo& info = options.parameters[i];
    uint64_t elements = 1;
    for (int64_t size : info.shape) elements *= static_cast<uint64_t>(size);
    if (place.unit() >= static_cast<uint32_t>(response.units_size()) || place.index() >= count) {
      return Damaged(absl::StrCat("parameter '", info.name, "' is in unit ", place.unit(),
                                  " at index ", place.index()));
    }
    const v1::UnitInfo& unit = response.units(static_cast<int>(place.unit()));
    const uint64_t room = info.trainable ? unit.trainable_elements() : unit.elements();
    if (place.offset() > room || elements > room - place.offset()) {
      return Damaged(absl::StrCat("parameter '", info.name, "' is at elements [", place.offset(),
                                  ", +", elements, ") of unit '", unit.name(), "', which has ",
                                  room));
    }
    parameters.push_back(
        {info.name, place.unit(), place.offset(), elements, place.index(), info.trainable});
  }
  return parameters;
}

absl::StatusOr<AttachPlan> ReadPlan(const AttachOptions& options,
                                    const v1::AttachResponse& response) {
  AttachPlan plan;
  if (response.dtype() < v1::DATA_TYPE_FLOAT32 || response.dtype() > v1::DATA_TYPE_FLOAT16) {
    return Damaged(absl::StrCat("data type ", response.dtype()));
  }
  if (response.gradient_plan() != v1::GRADIENT_PLAN_PER_RANK &&
      response.gradient_plan() != v1::GRADIENT_PLAN_NODE_SUM) {
    return Damaged(absl::StrCat("gradient plan ", response.gradient_plan()));
  }
  if (response.gradient_plan() == v1::GRADIENT_PLAN_NODE_SUM &&
      (response.staged_part_elements() == 0 ||
       response.staged_part_elements() % shm::kParamAlignElements != 0)) {
    return Damaged(absl::StrCat("gradients are staged in parts of ",
                                response.staged_part_elements(), " elements"));
  }
  if (response.blob_offset() > response.transfer_bytes() || response.blob_offset() < 4) {
    return Damaged(absl::StrCat("the blob area is at ", response.blob_offset(), " of ",
                                response.transfer_bytes()));
  }
  ASSIGN_OR_RETURN(plan.units, ReadUnits(response));
  ASSIGN_OR_RETURN(plan.parameters, ReadPlaces(options, response));
  plan.generation = response.generation();
  plan.committed_step = response.committed_step();
  plan.initialized = response.initialized();
  plan.window_chunks = response.window_chunks();
  plan.node_sum = response.gradient_plan() == v1::GRADIENT_PLAN_NODE_SUM;
  plan.gradient_bytes = response.gradient_bytes();
  plan.staged_part_elements = response.staged_part_elements();
  plan.transfer_bytes = response.transfer_bytes();
  plan.blob_offset = response.blob_offset();
  plan.stage = response.stage();
  plan.dtype = static_cast<DType>(response.dtype());
  plan.loss_scale = response.loss_scale();
  plan.committed_skipped = response.committed_skipped();
  plan.guard_pages = response.guard_pages();
  plan.resolved_config = response.resolved_config();
  plan.plan_text = response.plan_text();
  plan.members = response.members();
  return plan;
}

class GrpcDaemon final : public DaemonRpc {
 public:
  explicit GrpcDaemon(const std::string& address) {
    grpc::ChannelArguments arguments;
    // A channel of its own: no back-off left over from an earlier try.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetMaxReceiveMessageSize(-1);  // a state blob may have up to 1 GiB
    arguments.SetMaxSendMessageSize(-1);
    stub_ = v1::Jobs::NewStub(
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  }

  absl::StatusOr<DaemonVersion> GetVersion(absl::Duration limit,
                                           const GiveUp& give_up) override {
    v1::GetVersionResponse response;
    RETURN_IF_ERROR(Call(
        [&](grpc::ClientContext* context, grpc::CompletionQueue* queue) {
          return stub_->AsyncGetVersion(context, v1::GetVersionRequest(), queue);
        },
        &response, limit, give_up));
    return DaemonVersion{response.version(), response.protocol(), response.shm_format(),
                         response.boot_id(), response.peer_address()};
  }

  absl::StatusOr<AttachPlan> Attach(const AttachOptions& options, const std::string& token,
                                    absl::Duration limit, const GiveUp& give_up) override {
    v1::AttachRequest request;
    request.set_token(token);
    request.set_protocol(kProtocolVersion);
    request.set_shm_format(shm::kFormatVersion);
    request.set_job(options.job);
    request.set_attempt(options.attempt);
    request.set_rank(options.rank);
    request.set_world(options.world);
    request.set_local_rank(options.local_rank);
    request.set_local_world(options.local_world);
    request.set_node_rank(options.node_rank);
    for (const std::string& peer : options.peers) request.add_peers(peer);
    request.set_job_token(options.job_token);
    request.set_config(options.config);
    FillModel(options, request.mutable_model());
    v1::AttachResponse response;
    RETURN_IF_ERROR(Call(
        [&](grpc::ClientContext* context, grpc::CompletionQueue* queue) {
          return stub_->AsyncAttach(context, request, queue);
        },
        &response, limit, give_up));
    return ReadPlan(options, response);
  }

  absl::StatusOr<std::string> ClientState(const std::string& token, absl::Duration limit,
                                          const GiveUp& give_up) override {
    v1::GetClientStateRequest request;
    request.set_token(token);
    v1::GetClientStateResponse response;
    RETURN_IF_ERROR(Call(
        [&](grpc::ClientContext* context, grpc::CompletionQueue* queue) {
          return stub_->AsyncGetClientState(context, request, queue);
        },
        &response, limit, give_up));
    return std::move(*response.mutable_blob());
  }

 private:
  // One call, with `give_up` looked at while it runs.
  template <typename Begin, typename Response>
  absl::Status Call(const Begin& begin, Response* response, absl::Duration limit,
                    const GiveUp& give_up) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + limit));
    grpc::CompletionQueue queue;
    grpc::Status status;
    auto reader = begin(&context, &queue);
    reader->Finish(response, &status, &context);
    absl::Status given_up;
    void* tag = nullptr;
    bool ok = false;
    for (;;) {
      const auto next = queue.AsyncNext(
          &tag, &ok, std::chrono::system_clock::now() + absl::ToChronoMilliseconds(kWaitSlice));
      if (next != grpc::CompletionQueue::TIMEOUT) break;
      if (!given_up.ok()) continue;  // cancelled, the queue tells in a moment
      given_up = give_up();
      if (!given_up.ok()) context.TryCancel();
    }
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
    return given_up.ok() ? ToStatus(status) : given_up;
  }

  std::unique_ptr<v1::Jobs::Stub> stub_;
};

}  // namespace

std::unique_ptr<DaemonRpc> DaemonRpc::Create(const std::string& address) {
  return std::make_unique<GrpcDaemon>(address);
}

absl::Status CheckVersion(const DaemonVersion& daemon, const std::string& address) {
  if (daemon.protocol == kProtocolVersion && daemon.shm_format == shm::kFormatVersion) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "the daemon at ", address, " is zerod ", daemon.version, " (protocol ", daemon.protocol,
      ", shared memory format ", daemon.shm_format, ") and this client is zerod ", ZEROD_VERSION,
      " (protocol ", kProtocolVersion, ", format ", shm::kFormatVersion,
      "); install the same version of both"));
}

}  // namespace zerod::client
