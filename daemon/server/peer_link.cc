// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/peer_link.h"

namespace zerod::server {

ServerLink::ServerLink(grpc::CallbackServerContext* context, const Limits& limits, Accept accept)
    : LinkEnd(limits), context_(context), accept_(std::move(accept)) {}

std::shared_ptr<ServerLink> ServerLink::Make(grpc::CallbackServerContext* context,
                                             const Limits& limits, Accept accept) {
  auto link = std::make_shared<ServerLink>(context, limits, std::move(accept));
  link->self_ = link;
  link->StartReading();
  return link;
}

void ServerLink::Accepted(const std::string& boot_id) {
  v1::LinkResponse response;
  response.mutable_accepted()->set_boot_id(boot_id);
  response.mutable_accepted()->set_lease_seconds(absl::ToDoubleSeconds(limits_.lease));
  Push(std::move(response), 0);
}

bool ServerLink::Handle(v1::LinkRequest* in) {
  if (greeted_) return HandleBody(*in);
  greeted_ = true;
  absl::StatusOr<std::shared_ptr<LinkEvents>> events =
      absl::InvalidArgumentError("the first message of a Link must be its hello");
  if (in->has_hello()) {
    std::shared_ptr<ServerLink> self;
    {
      std::lock_guard lock(self_mu_);
      self = self_;
    }
    member_ = in->hello().member();
    if (self != nullptr) events = accept_(in->hello(), self);
  }
  if (!events.ok()) {
    Close(events.status(), /*goodbye=*/false);
    return false;
  }
  events_ = *events;
  return true;
}

void ServerLink::EndStream(const absl::Status& why) { Finish(ToGrpc(why)); }

void ServerLink::Cancel() {
  std::lock_guard lock(self_mu_);
  if (self_ != nullptr) context_->TryCancel();
}

void ServerLink::OnReadsEnded() {
  // A half-close after a goodbye, or a connection that broke (OnCancel then says so, too).
  End(absl::OkStatus(), /*drop_queue=*/false);
  ReportDown(absl::UnavailableError(
      "its link closed without a goodbye: its daemon has died, or given the job up"));
}

void ServerLink::OnCancel() {
  const absl::Status why = absl::UnavailableError(
      "the connection was lost: its daemon has died, or the network between the nodes has failed");
  End(why, /*drop_queue=*/false);  // what is being written fails by itself
  ReportDown(why);
}

void ServerLink::OnDone() {
  std::shared_ptr<ServerLink> last;
  {
    std::lock_guard lock(self_mu_);
    last = std::move(self_);
  }
  done_ = true;
}

std::shared_ptr<ClientLink> ClientLink::Open(v1::Peer::Stub* stub, const v1::Credentials& hello,
                                             const Limits& limits,
                                             std::shared_ptr<LinkEvents> events,
                                             std::function<void(ClientLink*)> accepted) {
  auto link = std::make_shared<ClientLink>(limits);
  link->self_ = link;
  link->events_ = events;
  link->accepted_ = std::move(accepted);
  stub->async()->Link(&link->context_, link.get());
  link->AddHold();  // writes come from outside of reactions; given back in EndStream
  link->StartReading();
  v1::LinkRequest request;
  *request.mutable_hello() = hello;
  link->Push(std::move(request), 0);
  link->StartCall();
  return link;
}

bool ClientLink::Handle(v1::LinkResponse* in) {
  if (greeted_) return HandleBody(*in);
  greeted_ = true;
  if (!in->has_accepted()) {
    Break(absl::InternalError("member 0 did not answer the hello of a Link"));
    return false;
  }
  accepted_(this);
  return true;
}

void ClientLink::EndStream(const absl::Status& /*why*/) {
  StartWritesDone();  // member 0 reads what was sent, then ends the call
  RemoveHold();
}

void ClientLink::OnReadsEnded() {
  // OnDone follows with the reason, once the hold is gone.
  End(absl::UnavailableError("its link closed without a goodbye"), /*drop_queue=*/false);
}

void ClientLink::OnDone(const grpc::Status& status) {
  absl::Status why = FromGrpc(status);
  if (why.ok()) why = absl::UnavailableError("its link closed without a goodbye");
  End(why, /*drop_queue=*/true);
  ReportDown(why);
  done_ = true;
  accepted_ = nullptr;
  std::shared_ptr<ClientLink> last = std::move(self_);
}

}  // namespace zerod::server
