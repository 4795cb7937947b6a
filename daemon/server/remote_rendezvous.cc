// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/remote_rendezvous.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "daemon/server/grpc_status.h"

namespace zerod::server {
namespace {

absl::Status Closed() {
  return absl::UnavailableError("the job is over, and its rendezvous with it");
}

absl::Status AtMemberZero(const grpc::Status& status) {
  const absl::Status said = FromGrpc(status);
  // The job was there when our Link was accepted: that it is not now means that it is over.
  return absl::Status(said.code() == absl::StatusCode::kNotFound ? absl::StatusCode::kUnavailable
                                                                 : said.code(),
                      absl::StrCat("the rendezvous at member 0 failed: ", said.message()));
}

}  // namespace

absl::Status RemoteRendezvous::Set(const std::string& key, const std::string& value) {
  if (closed_) return Closed();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoSeconds(limits_.lease) +
                       std::chrono::seconds(1));
  v1::SetKeyRequest request;
  *request.mutable_credentials() = credentials_;
  request.set_key(key);
  request.set_value(value);
  v1::SetKeyResponse response;
  const grpc::Status status = stub_->SetKey(&context, request, &response);
  return status.ok() ? absl::OkStatus() : AtMemberZero(status);
}

absl::StatusOr<std::string> RemoteRendezvous::Get(const std::string& key, absl::Duration timeout) {
  const absl::Time deadline = MonotonicNow() + timeout;
  v1::GetKeyRequest request;
  *request.mutable_credentials() = credentials_;
  request.set_key(key);
  for (;;) {
    if (closed_) return Closed();
    const absl::Time now = MonotonicNow();
    if (now >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("no member has set the rendezvous key \"",
                                                      key, "\" in ",
                                                      absl::FormatDuration(timeout)));
    }
    grpc::ClientContext context;
    context.set_deadline(
        absl::ToChronoTime(absl::Now() + std::min(deadline - now, limits_.rendezvous_slice)));
    v1::GetKeyResponse response;
    const grpc::Status status = stub_->GetKey(&context, request, &response);
    if (status.ok()) return response.value();
    if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) return AtMemberZero(status);
  }
}

}  // namespace zerod::server
