// SPDX-License-Identifier: Apache-2.0
#include "tests/server/daemon_rpc.h"

#include <chrono>
#include <utility>

#include "daemon/server/grpc_status.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "proto/zerod/v1/admin.grpc.pb.h"
#include "proto/zerod/v1/jobs.grpc.pb.h"

namespace zerod::server::testing {
namespace {

constexpr std::chrono::seconds kCallMax{30};

// One request and one answer of any method, as bytes: the health and reflection protos are not
// installed, and their few fields are quickly written by hand.
absl::StatusOr<std::string> RawCall(grpc::GenericStub* stub, const std::string& method,
                                    const std::string& request) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kCallMax);
  grpc::CompletionQueue queue;
  const auto step = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return ok;
  };
  auto call = stub->PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  grpc::Slice slice(request);
  grpc::ByteBuffer response;
  bool answered = false;
  if (step()) {
    call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    if (step()) {
      call->Read(&response, nullptr);
      answered = step();
    }
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  step();
  if (!status.ok()) return FromGrpc(status);
  std::vector<grpc::Slice> slices;
  if (!answered || !response.Dump(&slices).ok()) return absl::UnknownError("no answer");
  std::string bytes;
  for (const grpc::Slice& s : slices) {
    bytes.append(reinterpret_cast<const char*>(s.begin()), s.size());
  }
  return bytes;
}

class RpcImpl final : public Rpc {
 public:
  explicit RpcImpl(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
    auto channel =
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
    generic_ = std::make_unique<grpc::GenericStub>(channel);
    jobs_ = v1::Jobs::NewStub(channel);
    admin_ = v1::Admin::NewStub(channel);
  }

  absl::StatusOr<int> Health(const std::string& service) override {
    std::string request;
    if (!service.empty()) {
      request = std::string("\x0a") + static_cast<char>(service.size()) + service;
    }
    auto response = RawCall(generic_.get(), "/grpc.health.v1.Health/Check", request);
    if (!response.ok()) return response.status();
    return response->size() == 2 && (*response)[0] == 8 ? (*response)[1] : 0;
  }
  absl::StatusOr<std::string> ReflectedServices() override {
    return RawCall(generic_.get(),
                   "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                   "\x3a\x01*");
  }
  absl::StatusOr<v1::GetVersionResponse> GetVersion() override {
    return Call<v1::GetVersionResponse>(jobs_.get(), &v1::Jobs::Stub::GetVersion,
                                        v1::GetVersionRequest());
  }
  absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request) override {
    return Call<v1::AttachResponse>(jobs_.get(), &v1::Jobs::Stub::Attach, request);
  }
  absl::StatusOr<v1::GetClientStateResponse> ClientState(const std::string& token) override {
    v1::GetClientStateRequest request;
    request.set_token(token);
    return Call<v1::GetClientStateResponse>(jobs_.get(), &v1::Jobs::Stub::GetClientState, request);
  }
  absl::StatusOr<v1::StatusResponse> Status() override {
    return Call<v1::StatusResponse>(admin_.get(), &v1::Admin::Stub::Status, v1::StatusRequest());
  }
  absl::StatusOr<v1::ListJobsResponse> ListJobs() override {
    return Call<v1::ListJobsResponse>(admin_.get(), &v1::Admin::Stub::ListJobs,
                                      v1::ListJobsRequest());
  }
  absl::Status DeleteJob(const std::string& id) override {
    v1::DeleteJobRequest request;
    request.set_job(id);
    return Call<v1::DeleteJobResponse>(admin_.get(), &v1::Admin::Stub::DeleteJob, request).status();
  }
  absl::Status Drain() override {
    return Call<v1::DrainResponse>(admin_.get(), &v1::Admin::Stub::Drain, v1::DrainRequest())
        .status();
  }

 private:
  template <typename Response, typename Stub, typename Request>
  absl::StatusOr<Response> Call(Stub* stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kCallMax);
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }

  std::unique_ptr<grpc::GenericStub> generic_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
  std::unique_ptr<v1::Admin::Stub> admin_;
};

}  // namespace

std::unique_ptr<Rpc> Rpc::Connect(const std::string& address) {
  return std::make_unique<RpcImpl>(address);
}

}  // namespace zerod::server::testing
