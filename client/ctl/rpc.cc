// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/rpc.h"

#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/grpcpp.h"
#include "proto/zerod/v1/admin.grpc.pb.h"

namespace zerod::ctl {
namespace {

constexpr std::chrono::seconds kCallMax{10};
constexpr std::chrono::seconds kDeleteMax{40};  // the daemon frees the memory first

class DaemonImpl final : public Daemon {
 public:
  explicit DaemonImpl(std::string address) : address_(std::move(address)) {
    auto channel = grpc::CreateChannel(address_, grpc::InsecureChannelCredentials());
    admin_ = v1::Admin::NewStub(channel);
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
    return Call<v1::DeleteJobResponse>(admin_.get(), &v1::Admin::Stub::DeleteJob, request,
                                       kDeleteMax)
        .status();
  }
  absl::Status Drain() override {
    return Call<v1::DrainResponse>(admin_.get(), &v1::Admin::Stub::Drain, v1::DrainRequest())
        .status();
  }
  absl::StatusOr<v1::PlanResponse> Plan(const v1::PlanRequest& request) override {
    return Call<v1::PlanResponse>(admin_.get(), &v1::Admin::Stub::Plan, request);
  }

 private:
  template <typename Response, typename Stub, typename Request>
  absl::StatusOr<Response> Call(Stub* stub,
                                grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                                const Request& request, std::chrono::seconds limit = kCallMax) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + limit);
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (status.ok()) return response;
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
      return absl::UnavailableError(
          absl::StrCat("no daemon answers at ", address_, " (", status.error_message(),
                       "): is it running, may this user connect, is it another --address?"));
    }
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                        status.error_message());
  }

  const std::string address_;
  std::unique_ptr<v1::Admin::Stub> admin_;
};

}  // namespace

std::unique_ptr<Daemon> Daemon::Connect(const std::string& address) {
  return std::make_unique<DaemonImpl>(absl::StartsWith(address, "/")
                                          ? absl::StrCat("unix:", address)
                                          : address);
}

}  // namespace zerod::ctl
