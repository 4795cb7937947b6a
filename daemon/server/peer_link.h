// SPDX-License-Identifier: Apache-2.0
//
// The two ends of Peer.Link, over gRPC's callback API: no thread of its own waits anywhere. An end
// keeps itself alive until gRPC is done with it. Private to peer_network.cc and this.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "daemon/core/types.h"
#include "daemon/server/grpc_status.h"
#include "daemon/server/limits.h"
#include "daemon/server/wire.h"
#include "grpcpp/grpcpp.h"
#include "proto/zerod/v1/peer.grpc.pb.h"

namespace zerod::server {

// What happens on a Link, told in order from gRPC's threads. Thread-safe, must not block.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  virtual void OnMessage(uint32_t member, core::Message message) = 0;
  virtual void OnGoodbye(uint32_t member) = 0;
  // Once, and nothing after it. Not called where we closed the link ourselves.
  virtual void OnDown(uint32_t member, const absl::Status& why) = 0;
};

// Thread-safe.
class Link {
 public:
  virtual ~Link() = default;
  virtual void Send(std::string payload) = 0;  // an encoded core::Message
  virtual void Heartbeat() = 0;
  // Sends what is queued, then (`goodbye`) a goodbye, then ends the stream with `why`.
  virtual void Close(const absl::Status& why, bool goodbye) = 0;
  // Ends it at once and tells the events, on the caller's thread.
  virtual void Break(const absl::Status& why) = 0;
  virtual bool done() const = 0;  // gRPC is done with it
  virtual absl::Time last_heard() const = 0;
  virtual bool overflowed() const = 0;  // the queue's bound was hit: somebody must Break it
};

// What both ends have in common. `Reactor` is gRPC's, `In` and `Out` its messages.
template <typename Reactor, typename In, typename Out>
class LinkEnd : public Reactor, public Link {
 public:
  explicit LinkEnd(const Limits& limits) : limits_(limits), heard_(MonotonicNow()) {}

  void Send(std::string payload) override {
    const size_t bytes = payload.size();
    Out out;
    out.mutable_message()->set_payload(std::move(payload));
    Push(std::move(out), bytes);
  }
  void Heartbeat() override {
    {
      std::lock_guard lock(mu_);
      if (writing_) return;  // what is on its way says as much
    }
    Out out;
    out.mutable_heartbeat();
    Push(std::move(out), 0);
  }
  void Close(const absl::Status& why, bool goodbye) override {
    reported_ = true;
    if (goodbye) {
      Out out;
      out.mutable_goodbye();
      Push(std::move(out), 0);
    }
    End(why, /*drop_queue=*/false);
  }
  void Break(const absl::Status& why) override {
    End(why, /*drop_queue=*/true);
    ReportDown(why);
  }
  bool done() const override { return done_; }
  absl::Time last_heard() const override {
    std::lock_guard lock(mu_);
    return heard_;
  }
  bool overflowed() const override { return overflowed_; }

 protected:
  // No more writes follow: ends this direction. Called once.
  virtual void EndStream(const absl::Status& why) = 0;
  virtual void Cancel() = 0;
  // The first message of the other side, and every later one. False: the link is being ended.
  virtual bool Handle(In* in) = 0;
  virtual void OnReadsEnded() = 0;

  void StartReading() { this->StartRead(&in_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      OnReadsEnded();
      return;
    }
    {
      std::lock_guard lock(mu_);
      heard_ = MonotonicNow();
    }
    if (Handle(&in_)) this->StartRead(&in_);
  }

  void OnWriteDone(bool ok) override {
    bool next = false;
    bool end = false;
    {
      std::lock_guard lock(mu_);
      if (!ok) {
        queue_.clear();
        if (!ended_) {
          ended_ = true;
          end_status_ = absl::UnavailableError("the connection between the daemons was lost");
        }
      }
      next = !queue_.empty();
      if (next) {
        Pop();
      } else {
        writing_ = false;
        end = ended_ && !std::exchange(end_started_, true);
      }
    }
    if (next) this->StartWrite(&current_);
    if (end) EndStream(end_status_);
  }

  void Push(Out out, size_t bytes) {
    {
      std::lock_guard lock(mu_);
      if (ended_) return;
      if (queued_bytes_ + bytes > limits_.link_queue_bytes_max ||
          bytes > limits_.peer_message_bytes_max / 2) {
        overflowed_ = true;
        return;
      }
      queue_.emplace_back(std::move(out), bytes);
      queued_bytes_ += bytes;
      if (writing_) return;
      writing_ = true;
      Pop();
    }
    this->StartWrite(&current_);
  }

  // After it nothing more is queued. Where nothing is on its way the stream ends at once, else when
  // that is done; a queue that is dropped is not waited for.
  void End(const absl::Status& why, bool drop_queue) {
    bool end = false;
    {
      std::lock_guard lock(mu_);
      if (drop_queue) queue_.clear();
      if (!ended_) {
        ended_ = true;
        end_status_ = why;
      }
      end = !writing_ && !std::exchange(end_started_, true);
    }
    if (drop_queue) Cancel();
    if (end) EndStream(why);
  }

  void ReportDown(const absl::Status& why) {
    if (reported_.exchange(true)) return;
    if (std::shared_ptr<LinkEvents> events = events_.lock()) events->OnDown(member_, why);
  }

  // A message or goodbye; heartbeats have done their work by coming.
  bool HandleBody(const In& in) {
    std::shared_ptr<LinkEvents> events = events_.lock();
    if (in.has_goodbye()) {
      if (events != nullptr) events->OnGoodbye(member_);
      return true;
    }
    if (!in.has_message()) return true;
    absl::StatusOr<core::Message> message = DecodeMessage(in.message().payload());
    if (!message.ok()) {
      Break(message.status());
      return false;
    }
    if (events != nullptr) events->OnMessage(member_, *std::move(message));
    return true;
  }

  const Limits limits_;
  // Set before the first message is handled, constant then.
  std::weak_ptr<LinkEvents> events_;
  uint32_t member_ = 0;  // the other side
  std::atomic<bool> done_{false};

 private:
  void Pop() {
    current_ = std::move(queue_.front().first);
    queued_bytes_ -= queue_.front().second;
    queue_.pop_front();
  }

  In in_;
  Out current_;  // being written while writing_
  std::atomic<bool> overflowed_{false};
  std::atomic<bool> reported_{false};
  mutable std::mutex mu_;
  std::deque<std::pair<Out, size_t>> queue_;  // the rest: guarded by mu_
  size_t queued_bytes_ = 0;
  bool writing_ = false;
  bool ended_ = false;
  bool end_started_ = false;
  absl::Status end_status_;
  absl::Time heard_;
};

// Member 0's end.
class ServerLink final
    : public LinkEnd<grpc::ServerBidiReactor<v1::LinkRequest, v1::LinkResponse>, v1::LinkRequest,
                     v1::LinkResponse> {
 public:
  // Says whose link it is: the events of the job, or the refusal. The answer to the hello must be
  // the first thing sent, so `accept` calls Accepted before anything else can find the link.
  using Accept = std::function<absl::StatusOr<std::shared_ptr<LinkEvents>>(
      const v1::Credentials& hello, const std::shared_ptr<ServerLink>& link)>;
  static std::shared_ptr<ServerLink> Make(grpc::CallbackServerContext* context,
                                          const Limits& limits, Accept accept);
  // Use Make.
  ServerLink(grpc::CallbackServerContext* context, const Limits& limits, Accept accept);
  void Accepted(const std::string& boot_id);
  bool greeted() const { return greeted_; }  // its hello has come

 private:
  bool Handle(v1::LinkRequest* in) override;
  void EndStream(const absl::Status& why) override;
  void Cancel() override;
  void OnReadsEnded() override;
  void OnCancel() override;
  void OnDone() override;

  grpc::CallbackServerContext* const context_;  // valid until OnDone
  Accept accept_;
  std::atomic<bool> greeted_{false};
  std::mutex self_mu_;
  std::shared_ptr<ServerLink> self_;  // until OnDone; guarded by self_mu_
};

// The end of any other member.
class ClientLink final
    : public LinkEnd<grpc::ClientBidiReactor<v1::LinkRequest, v1::LinkResponse>, v1::LinkResponse,
                     v1::LinkRequest> {
 public:
  // `accepted` is called once, before any event, when member 0 took the hello.
  static std::shared_ptr<ClientLink> Open(v1::Peer::Stub* stub, const v1::Credentials& hello,
                                          const Limits& limits,
                                          std::shared_ptr<LinkEvents> events,
                                          std::function<void(ClientLink*)> accepted);

  // Use Open.
  explicit ClientLink(const Limits& limits) : LinkEnd(limits) {}

 private:
  bool Handle(v1::LinkResponse* in) override;
  void EndStream(const absl::Status& why) override;
  void Cancel() override { context_.TryCancel(); }
  void OnReadsEnded() override;
  void OnDone(const grpc::Status& status) override;

  grpc::ClientContext context_;
  std::function<void(ClientLink*)> accepted_;
  bool greeted_ = false;  // the reader's own
  std::shared_ptr<ClientLink> self_;  // until OnDone
};

}  // namespace zerod::server
