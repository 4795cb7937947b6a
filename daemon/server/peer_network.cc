// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status.h"
#include "daemon/server/peer_link.h"
#include "daemon/server/peers.h"
#include "daemon/server/remote_rendezvous.h"
#include "daemon/server/rendezvous_map.h"
#include "grpcpp/health_check_service_interface.h"
#include "proto/version.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(100);

// Not by its first difference: the time says nothing of the token.
bool SameToken(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  unsigned char differences = 0;
  for (size_t i = 0; i < a.size(); ++i) differences |= static_cast<unsigned char>(a[i] ^ b[i]);
  return differences == 0;
}

class JobPeersImpl final : public JobPeers,
                           public LinkEvents,
                           public std::enable_shared_from_this<JobPeersImpl> {
 public:
  JobPeersImpl(PeerJob job, std::string boot_id, const Limits& limits)
      : job_(std::move(job)),
        boot_id_(std::move(boot_id)),
        limits_(limits),
        map_(limits),
        members_(job_.members),
        join_deadline_(MonotonicNow() + job_.join_timeout),
        retry_delay_(limits.link_retry_min) {
    if (job_.self == 0) return;
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(static_cast<int>(limits_.peer_message_bytes_max));
    arguments.SetMaxSendMessageSize(static_cast<int>(limits_.peer_message_bytes_max));
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    stub_ = v1::Peer::NewStub(grpc::CreateCustomChannel(
        job_.coordinator, grpc::InsecureChannelCredentials(), arguments));
    credentials_.set_job(job_.id);
    credentials_.set_job_token(job_.token);
    credentials_.set_protocol(kProtocolVersion);
    credentials_.set_member(job_.self);
    credentials_.set_boot_id(boot_id_);
    remote_ = std::make_unique<RemoteRendezvous>(stub_.get(), credentials_, limits_);
  }

  // --- JobPeers
  void Start(engine::JobRunner* runner) override {
    std::lock_guard lock(deliver_mu_);
    runner_ = runner;
  }
  void Send(core::MemberIndex to, core::Message message) override;
  fabric::Rendezvous* rendezvous() override {
    return job_.self == 0 ? static_cast<fabric::Rendezvous*>(&map_) : remote_.get();
  }
  void Close(const absl::Status& why) override;

  // --- LinkEvents
  void OnMessage(uint32_t member, core::Message message) override {
    std::lock_guard lock(deliver_mu_);
    if (runner_ != nullptr) runner_->PeerMessage(member, std::move(message));
  }
  void OnGoodbye(uint32_t member) override {
    std::lock_guard lock(mu_);
    members_[member].goodbye_deadline = MonotonicNow() + limits_.goodbye;
  }
  void OnDown(uint32_t member, const absl::Status& why) override;

  // --- For the service and the ticker
  const PeerJob& job() const { return job_; }
  absl::Status Check(const v1::Credentials& credentials) const;
  absl::Status Accept(uint32_t member, const std::shared_ptr<ServerLink>& link);
  RendezvousMap* map() { return &map_; }
  void Tick(absl::Time now, bool heartbeat);
  bool closed() {
    std::lock_guard lock(mu_);
    return closed_;
  }
  // Links that still flush after Close.
  std::vector<std::shared_ptr<Link>> TakeClosing() {
    std::lock_guard lock(mu_);
    return std::exchange(closing_, {});
  }

 private:
  struct Member {
    std::shared_ptr<Link> link;
    bool gone = false;
    std::deque<std::string> waiting;  // before the link is there
    size_t waiting_bytes = 0;
    absl::Time goodbye_deadline = absl::InfiniteFuture();
  };

  void OpenLink();
  void OnAccepted(ClientLink* link);
  void Flush(Member* member);  // mu_ is held
  void Lose(uint32_t member, const absl::Status& why);
  bool ForeignMember(uint32_t m) const { return m != job_.self && (job_.self == 0 || m == 0); }

  const PeerJob job_;
  const std::string boot_id_;
  const Limits limits_;
  RendezvousMap map_;                         // member 0
  std::unique_ptr<v1::Peer::Stub> stub_;      // the others, as the next two
  v1::Credentials credentials_;
  std::unique_ptr<RemoteRendezvous> remote_;

  // Lock order: mu_ before a link's. deliver_mu_ is never taken with mu_ held.
  std::mutex deliver_mu_;
  engine::JobRunner* runner_ = nullptr;  // guarded by deliver_mu_
  std::mutex mu_;
  bool closed_ = false;                  // from here on guarded by mu_
  std::vector<Member> members_;          // self 0: all; else only [0] is in use
  std::vector<std::shared_ptr<Link>> closing_;
  const absl::Time join_deadline_;
  std::shared_ptr<ClientLink> opening_;  // not yet accepted
  absl::Time opening_deadline_;
  absl::Time next_try_ = absl::InfinitePast();
  absl::Duration retry_delay_;
  absl::Status last_error_ = absl::UnavailableError("no answer yet");
};

void JobPeersImpl::Send(core::MemberIndex to, core::Message message) {
  std::string payload = EncodeMessage(message);
  std::lock_guard lock(mu_);
  if (closed_ || to >= members_.size() || !ForeignMember(to) || members_[to].gone) return;
  Member& member = members_[to];
  if (member.link != nullptr) {
    member.link->Send(std::move(payload));
    return;
  }
  // Beyond the bound nothing is kept: Tick sees the count and gives the member up.
  member.waiting_bytes += payload.size();
  if (member.waiting_bytes <= limits_.link_queue_bytes_max) {
    member.waiting.push_back(std::move(payload));
  }
}

void JobPeersImpl::Flush(Member* member) {
  for (std::string& payload : member->waiting) member->link->Send(std::move(payload));
  member->waiting.clear();
}

void JobPeersImpl::Close(const absl::Status& why) {
  {
    std::lock_guard lock(deliver_mu_);
    runner_ = nullptr;
  }
  map_.Close();
  if (remote_ != nullptr) remote_->Close();
  std::vector<std::shared_ptr<Link>> links;
  std::shared_ptr<ClientLink> opening;
  {
    std::lock_guard lock(mu_);
    if (std::exchange(closed_, true)) return;
    for (Member& member : members_) {
      if (member.link != nullptr) links.push_back(std::move(member.link));
      member.waiting.clear();
    }
    opening = std::move(opening_);
    closing_ = links;
  }
  for (const std::shared_ptr<Link>& link : links) link->Close(why, /*goodbye=*/why.ok());
  if (opening != nullptr) opening->Break(absl::CancelledError("the job is over"));
}

void JobPeersImpl::OnDown(uint32_t member, const absl::Status& why) {
  {
    std::lock_guard lock(mu_);
    if (closed_) return;
    if (opening_ != nullptr) {
      opening_ = nullptr;
      last_error_ = why;
      switch (why.code()) {
        case absl::StatusCode::kNotFound:          // its clients have not come yet
        case absl::StatusCode::kUnavailable:       // it has not started yet
        case absl::StatusCode::kDeadlineExceeded:
        case absl::StatusCode::kCancelled:
          next_try_ = MonotonicNow() + retry_delay_;
          retry_delay_ = std::min(retry_delay_ * 2, limits_.link_retry_max);
          return;
        default: break;
      }
    } else if (members_[member].goodbye_deadline != absl::InfiniteFuture()) {
      members_[member].link = nullptr;  // in order; our part ends too, or Tick says that it hangs
      return;
    }
  }
  Lose(member, why);
}

void JobPeersImpl::Lose(uint32_t member, const absl::Status& why) {
  {
    std::lock_guard lock(mu_);
    Member& m = members_[member];
    if (closed_ || m.gone) return;
    m.gone = true;
    m.link = nullptr;
    m.waiting.clear();
  }
  const absl::Status told(
      why.code(),
      absl::StrCat("member ", member, " of job ", job_.id, " is lost: ", why.message()));
  spdlog::warn("{}", std::string(told.message()));
  std::lock_guard lock(deliver_mu_);
  if (runner_ != nullptr) runner_->PeerDown(member, told);
}

absl::Status JobPeersImpl::Check(const v1::Credentials& credentials) const {
  if (!SameToken(credentials.job_token(), job_.token)) {
    return absl::PermissionDeniedError(
        absl::StrCat("the token for job ", job_.id, " is not the one that its clients here use"));
  }
  if (job_.self != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("this daemon is member ", job_.self, " of job ", job_.id,
                     "; the list of peers must begin with member 0 on all nodes"));
  }
  if (credentials.member() == 0 || credentials.member() >= job_.members) {
    return absl::InvalidArgumentError(absl::StrCat("job ", job_.id, " has ", job_.members,
                                                   " members, so there is no member ",
                                                   credentials.member(), " beside member 0"));
  }
  return absl::OkStatus();
}

absl::Status JobPeersImpl::Accept(uint32_t member, const std::shared_ptr<ServerLink>& link) {
  {
    std::lock_guard lock(deliver_mu_);
    if (runner_ == nullptr) {
      return absl::NotFoundError(absl::StrCat("job ", job_.id, " is not ready here: ask again"));
    }
  }
  std::lock_guard lock(mu_);
  if (closed_) return absl::NotFoundError(absl::StrCat("job ", job_.id, " is over here"));
  Member& m = members_[member];
  if (m.gone || m.link != nullptr || m.goodbye_deadline != absl::InfiniteFuture()) {
    return absl::FailedPreconditionError(
        absl::StrCat("member ", member, " of job ", job_.id,
                     " already had its link: what its daemon kept is lost, end the job on all "
                     "nodes and start it anew"));
  }
  link->Accepted(boot_id_);
  m.link = link;
  Flush(&m);
  spdlog::info("job {}: member {} has joined", job_.id, member);
  return absl::OkStatus();
}

void JobPeersImpl::OpenLink() {
  // mu_ is held. Events come from gRPC's threads, so none comes before opening_ is set.
  std::weak_ptr<JobPeersImpl> weak = weak_from_this();
  opening_ = ClientLink::Open(stub_.get(), credentials_, limits_, shared_from_this(),
                              [weak](ClientLink* link) {
                                if (auto self = weak.lock()) self->OnAccepted(link);
                              });
  opening_deadline_ = MonotonicNow() + std::max(limits_.lease, limits_.link_connect);
}

void JobPeersImpl::OnAccepted(ClientLink* link) {
  std::lock_guard lock(mu_);
  if (closed_ || opening_.get() != link) return;
  members_[0].link = std::move(opening_);
  opening_ = nullptr;
  Flush(&members_[0]);
  spdlog::info("job {}: joined member 0 at {}", job_.id, job_.coordinator);
}

void JobPeersImpl::Tick(absl::Time now, bool heartbeat) {
  struct Loss {
    uint32_t member;
    std::shared_ptr<Link> link;  // to be broken, or null: there is none
    absl::Status why;
  };
  std::vector<Loss> losses;
  std::shared_ptr<ClientLink> late;
  {
    std::lock_guard deliver(deliver_mu_);
    if (runner_ == nullptr) return;
  }
  {
    std::lock_guard lock(mu_);
    if (closed_) return;
    for (uint32_t i = 0; i < members_.size(); ++i) {
      Member& m = members_[i];
      if (!ForeignMember(i) || m.gone) continue;
      const bool full = m.link != nullptr ? m.link->overflowed()
                                          : m.waiting_bytes > limits_.link_queue_bytes_max;
      if (full) {
        losses.push_back({i, m.link, absl::ResourceExhaustedError(absl::StrCat(
                                         "more than ", limits_.link_queue_bytes_max,
                                         " bytes of messages wait for it"))});
      } else if (now > m.goodbye_deadline) {
        losses.push_back({i, m.link, absl::UnavailableError("it ended its part, ours did not")});
      } else if (m.link != nullptr && now - m.link->last_heard() > limits_.lease) {
        losses.push_back({i, m.link, absl::UnavailableError(absl::StrCat(
                                         "its daemon was silent for ",
                                         absl::FormatDuration(limits_.lease)))});
      } else if (m.link == nullptr && m.goodbye_deadline == absl::InfiniteFuture() &&
                 now > join_deadline_) {
        losses.push_back({i, nullptr, absl::UnavailableError(absl::StrCat(
                                          "it did not come within ",
                                          absl::FormatDuration(job_.join_timeout),
                                          job_.self == 0 ? "" : ": ",
                                          job_.self == 0 ? "" : last_error_.message()))});
      } else if (m.link != nullptr && heartbeat) {
        m.link->Heartbeat();
      }
    }
    if (job_.self != 0 && !members_[0].gone && members_[0].link == nullptr &&
        members_[0].goodbye_deadline == absl::InfiniteFuture()) {
      if (opening_ == nullptr && now >= next_try_) OpenLink();
      if (opening_ != nullptr && now > opening_deadline_) late = opening_;
    }
  }
  if (late != nullptr) late->Break(absl::DeadlineExceededError("member 0 does not answer"));
  for (const Loss& loss : losses) {
    Lose(loss.member, loss.why);
    if (loss.link != nullptr) loss.link->Break(loss.why);
  }
}

class PeerNetworkImpl final : public PeerNetwork,
                              public v1::Peer::WithCallbackMethod_Link<v1::Peer::Service> {
 public:
  PeerNetworkImpl(std::string boot_id, const Limits& limits)
      : boot_id_(std::move(boot_id)), limits_(limits) {}
  ~PeerNetworkImpl() override {
    if (ticker_.joinable()) {
      {
        std::lock_guard lock(mu_);
        stopping_ = true;
      }
      wake_.notify_all();
      ticker_.join();
    }
    if (server_ != nullptr) {
      server_->Shutdown(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
      server_->Wait();
    }
  }

  absl::Status Listen(const std::string& listen, const std::string& advertise);
  std::shared_ptr<JobPeers> Join(PeerJob job) override;
  void SetLost(const std::string& job, const absl::Status& why) override {
    std::lock_guard lock(mu_);
    lost_.erase(job);
    if (!why.ok()) lost_.emplace(job, why);
  }
  std::string address() const override { return address_; }
  void SetServing(bool serving) override {
    server_->GetHealthCheckService()->SetServingStatus(serving);
  }

  // --- v1::Peer
  grpc::ServerBidiReactor<v1::LinkRequest, v1::LinkResponse>* Link(
      grpc::CallbackServerContext* context) override;
  grpc::Status SetKey(grpc::ServerContext* context, const v1::SetKeyRequest* request,
                      v1::SetKeyResponse* response) override;
  grpc::Status GetKey(grpc::ServerContext* context, const v1::GetKeyRequest* request,
                      v1::GetKeyResponse* response) override;

 private:
  struct Closing {
    std::shared_ptr<server::Link> link;
    absl::Time deadline;
  };

  absl::StatusOr<std::shared_ptr<JobPeersImpl>> Find(const v1::Credentials& credentials);
  void RunTicker();

  const std::string boot_id_;
  const Limits limits_;
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mu_;
  std::condition_variable wake_;
  bool stopping_ = false;                            // guarded by mu_
  std::vector<std::shared_ptr<JobPeersImpl>> jobs_;  // guarded by mu_
  std::map<std::string, absl::Status> lost_;         // guarded by mu_
  std::vector<std::weak_ptr<ServerLink>> fresh_;     // hello has not come; guarded by mu_
  std::vector<Closing> closing_;                     // the ticker's own
  std::thread ticker_;
};

absl::Status PeerNetworkImpl::Listen(const std::string& listen, const std::string& advertise) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.SetMaxReceiveMessageSize(static_cast<int>(limits_.peer_message_bytes_max));
  builder.SetMaxSendMessageSize(static_cast<int>(limits_.peer_message_bytes_max));
  // Whoever reaches the port may send: before the hello nothing is known of it.
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, limits_.peer_streams_max);
  builder.SetResourceQuota(
      grpc::ResourceQuota("peers").SetMaxThreads(256).Resize(limits_.peer_network_bytes_max));
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen for other daemons at ", listen,
                                               ": is the port taken, the address this node's?"));
  }
  address_ = !advertise.empty() ? advertise
                                : absl::StrCat(listen.substr(0, listen.rfind(':')), ":", port);
  ticker_ = std::thread([this] { RunTicker(); });
  return absl::OkStatus();
}

std::shared_ptr<JobPeers> PeerNetworkImpl::Join(PeerJob job) {
  auto peers = std::make_shared<JobPeersImpl>(std::move(job), boot_id_, limits_);
  std::lock_guard lock(mu_);
  jobs_.push_back(peers);
  return peers;
}

absl::StatusOr<std::shared_ptr<JobPeersImpl>> PeerNetworkImpl::Find(
    const v1::Credentials& credentials) {
  if (credentials.protocol() != kProtocolVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the other daemon speaks protocol ", credentials.protocol(), ", this one ",
                     kProtocolVersion, ": run the same version on all nodes"));
  }
  std::shared_ptr<JobPeersImpl> peers;
  {
    std::lock_guard lock(mu_);
    for (const std::shared_ptr<JobPeersImpl>& p : jobs_) {
      if (p->job().id == credentials.job() && !p->closed()) peers = p;
    }
    if (const auto lost = lost_.find(credentials.job()); peers == nullptr && lost != lost_.end()) {
      return lost->second;
    }
  }
  if (peers == nullptr) {
    return absl::NotFoundError("there is no such job here (yet): its clients create it");
  }
  RETURN_IF_ERROR(peers->Check(credentials));
  return peers;
}

grpc::ServerBidiReactor<v1::LinkRequest, v1::LinkResponse>* PeerNetworkImpl::Link(
    grpc::CallbackServerContext* context) {
  using Answer = absl::StatusOr<std::shared_ptr<LinkEvents>>;
  std::unique_lock lock(mu_);
  if (fresh_.size() >= limits_.fresh_links_max) {
    std::erase_if(fresh_, [](const std::weak_ptr<ServerLink>& weak) {
      const std::shared_ptr<ServerLink> link = weak.lock();
      return link == nullptr || link->done() || link->greeted();
    });
  }
  if (fresh_.size() >= limits_.fresh_links_max) {
    lock.unlock();
    const absl::Status full = absl::UnavailableError(
        absl::StrCat(limits_.fresh_links_max, " links to this daemon have not said whose they "
                     "are, more it does not take: ask again"));
    std::shared_ptr<ServerLink> refused = ServerLink::Make(
        context, limits_,
        [full](const v1::Credentials&, const std::shared_ptr<ServerLink>&) -> Answer {
          return full;
        });
    refused->Close(full, /*goodbye=*/false);
    return refused.get();  // its own until gRPC is done with it
  }
  std::shared_ptr<ServerLink> link = ServerLink::Make(
      context, limits_,
      [this](const v1::Credentials& hello, const std::shared_ptr<ServerLink>& accepted) -> Answer {
        ASSIGN_OR_RETURN(std::shared_ptr<JobPeersImpl> peers, Find(hello));
        RETURN_IF_ERROR(peers->Accept(hello.member(), accepted));
        return std::shared_ptr<LinkEvents>(peers);
      });
  fresh_.push_back(link);
  return link.get();
}

grpc::Status PeerNetworkImpl::SetKey(grpc::ServerContext* /*context*/,
                                     const v1::SetKeyRequest* request,
                                     v1::SetKeyResponse* /*response*/) {
  auto peers = Find(request->credentials());
  if (!peers.ok()) return ToGrpc(peers.status());
  return ToGrpc((*peers)->map()->Set(request->key(), request->value()));
}

grpc::Status PeerNetworkImpl::GetKey(grpc::ServerContext* context,
                                     const v1::GetKeyRequest* request,
                                     v1::GetKeyResponse* response) {
  auto peers = Find(request->credentials());
  if (!peers.ok()) return ToGrpc(peers.status());
  const absl::Duration left = absl::FromChrono(context->deadline()) - absl::Now();
  auto value = (*peers)->map()->Get(request->key(), std::min(left, limits_.rendezvous_wait),
                                    [context] { return context->IsCancelled(); });
  if (!value.ok()) return ToGrpc(value.status());
  response->set_value(*std::move(value));
  return grpc::Status::OK;
}

void PeerNetworkImpl::RunTicker() {
  absl::Time next_heartbeat = MonotonicNow();
  for (;;) {
    std::vector<std::shared_ptr<JobPeersImpl>> jobs;
    std::vector<std::shared_ptr<ServerLink>> silent;
    const absl::Time now = MonotonicNow();
    {
      std::unique_lock lock(mu_);
      wake_.wait_for(lock, absl::ToChronoMilliseconds(kTick), [this] { return stopping_; });
      if (stopping_) return;
      jobs = jobs_;
      std::erase_if(fresh_, [&](const std::weak_ptr<ServerLink>& weak) {
        const std::shared_ptr<ServerLink> link = weak.lock();
        if (link == nullptr || link->done() || link->greeted()) return true;
        if (now - link->last_heard() <= limits_.lease) return false;
        silent.push_back(link);
        return true;
      });
    }
    for (const std::shared_ptr<ServerLink>& link : silent) {
      link->Break(absl::DeadlineExceededError("no hello came"));
    }
    const bool heartbeat = now >= next_heartbeat;
    if (heartbeat) next_heartbeat = now + limits_.heartbeat_interval;
    for (const std::shared_ptr<JobPeersImpl>& peers : jobs) {
      peers->Tick(now, heartbeat);
      const bool closed = peers->closed();
      for (std::shared_ptr<server::Link>& link : peers->TakeClosing()) {
        closing_.push_back({std::move(link), now + limits_.lease});
      }
      if (!closed) continue;
      std::lock_guard lock(mu_);
      std::erase(jobs_, peers);
    }
    std::erase_if(closing_, [&](const Closing& c) {
      if (c.link->done()) return true;
      if (now <= c.deadline) return false;
      c.link->Break(absl::DeadlineExceededError("the other daemon does not end its link"));
      return true;
    });
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<PeerNetwork>> PeerNetwork::Start(const std::string& listen,
                                                                const std::string& advertise,
                                                                const std::string& boot_id,
                                                                const Limits& limits) {
  auto network = std::make_unique<PeerNetworkImpl>(boot_id, limits);
  RETURN_IF_ERROR(network->Listen(listen, advertise));
  return std::unique_ptr<PeerNetwork>(std::move(network));
}

}  // namespace zerod::server
