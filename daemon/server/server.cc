// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/server.h"

#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status.h"
#include "daemon/engine/job_runner.h"  // and the arena that it is given
#include "daemon/metrics/metrics.h"
#include "daemon/server/acceptor.h"
#include "daemon/server/fd_server.h"
#include "daemon/server/job_table.h"
#include "daemon/server/peers.h"
#include "daemon/server/services.h"
#include "daemon/server/session.h"
#include "daemon/server/unix_socket.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr const char* kServices[] = {"zerod.v1.Jobs", "zerod.v1.Admin"};

absl::StatusOr<std::string> MakeBootId() {
  char bytes[16];
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) {
    return absl::UnavailableError("the system gives no random bytes");
  }
  return absl::BytesToHexString(absl::string_view(bytes, sizeof(bytes)));
}

class ServerImpl final : public Server {
 public:
  explicit ServerImpl(const Options& options)
      : options_(options),
        arena_(arena::MakeSystemMemorySource(), options.memory_reserve_bytes) {}
  ~ServerImpl() override;

  absl::Status Start();
  void Drain(bool closed) override;
  bool draining() const override { return draining_; }
  bool EndJobs(absl::Duration timeout) override;
  void RemoveSockets() override;
  size_t jobs() const override { return jobs_->size(); }
  size_t clients() const override { return sessions_.size() + acceptor_->connections(); }

 private:
  absl::Status StartGrpc(ListeningSocket listener);

  const Options options_;
  Identity identity_;
  arena::Arena arena_;
  SessionTable sessions_;
  std::unique_ptr<SocketLock> lock_;
  std::unique_ptr<AccessList> access_;
  std::unique_ptr<metrics::Metrics> metrics_;
  std::unique_ptr<PeerNetwork> network_;
  std::unique_ptr<JobTable> jobs_;
  std::unique_ptr<JobsService> jobs_service_;
  std::unique_ptr<AdminService> admin_service_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> handover_;
  std::unique_ptr<grpc::Server> grpc_;
  std::unique_ptr<Acceptor> acceptor_;
  std::unique_ptr<FdServer> fd_server_;
  std::atomic<bool> draining_{false};
};

absl::Status ServerImpl::Start() {
  identity_.started = MonotonicNow();
  ASSIGN_OR_RETURN(identity_.boot_id, MakeBootId());
  ASSIGN_OR_RETURN(SocketLock lock, SocketLock::Acquire(options_.socket));
  lock_ = std::make_unique<SocketLock>(std::move(lock));
  ASSIGN_OR_RETURN(metrics_, metrics::Metrics::Create(options_.metrics_listen));
  identity_.metrics_address = metrics_->address();

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  ASSIGN_OR_RETURN(network_, PeerNetwork::Start(options_.peer_listen, options_.peer_advertise,
                                                identity_.boot_id, options_.limits));
  identity_.peer_address = network_->address();
  ASSIGN_OR_RETURN(const HostPort peer, ParseHostPort(identity_.peer_address));
  jobs_ = std::make_unique<JobTable>(
      [this](engine::JobRequest request, engine::PeerSender* peers,
             std::function<void(absl::Status)> ended) {
        return engine::JobRunner::Create(std::move(request), &arena_, peers, metrics_.get(),
                                         std::move(ended));
      },
      network_.get(), &sessions_, peer.host, options_.worker_threads, options_.limits);

  ASSIGN_OR_RETURN(ListeningSocket socket,
                   ListeningSocket::Create(options_.socket, options_.socket_mode));
  std::vector<gid_t> gids = options_.allow_gids;
  if ((options_.socket_mode & 0020) != 0) gids.push_back(socket.gid());
  access_ = std::make_unique<AccessList>(options_.allow_uids, std::move(gids));
  ASSIGN_OR_RETURN(ListeningSocket fd_socket,
                   ListeningSocket::Create(options_.socket + ".fd", options_.socket_mode));
  ASSIGN_OR_RETURN(fd_server_, FdServer::Start(std::move(fd_socket), access_.get(), &sessions_,
                                               options_.limits));
  RETURN_IF_ERROR(StartGrpc(std::move(socket)));
  spdlog::info("zerod {} serves unix:{}, peers at {}, metrics at {} (boot {}, process {})",
               ZEROD_VERSION, options_.socket, identity_.peer_address,
               identity_.metrics_address.empty() ? "none" : identity_.metrics_address,
               identity_.boot_id, getpid());
  return absl::OkStatus();
}

absl::Status ServerImpl::StartGrpc(ListeningSocket listener) {
  jobs_service_ =
      std::make_unique<JobsService>(&identity_, jobs_.get(), &sessions_, options_.limits);
  admin_service_ = std::make_unique<AdminService>(
      &identity_, jobs_.get(), &sessions_, &arena_, [this] { Drain(/*closed=*/false); },
      options_.limits);
  grpc::ServerBuilder builder;
  handover_ = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
      grpc::InsecureServerCredentials());
  builder.SetMaxReceiveMessageSize(static_cast<int>(options_.limits.local_message_bytes_max));
  builder.SetResourceQuota(grpc::ResourceQuota("clients").SetMaxThreads(256));
  builder.RegisterService(jobs_service_.get());
  builder.RegisterService(admin_service_.get());
  grpc_ = builder.BuildAndStart();
  if (grpc_ == nullptr) return absl::UnavailableError("gRPC did not start");
  for (const char* service : kServices) {
    grpc_->GetHealthCheckService()->SetServingStatus(service, true);
  }
  ASSIGN_OR_RETURN(acceptor_, Acceptor::Start(std::move(listener), access_.get(), options_.limits,
                                              [this](int fd) {
                                                grpc::experimental::ExternalConnectionAcceptor::
                                                    NewConnectionParameters connection;
                                                connection.fd = fd;
                                                handover_->HandleNewConnection(&connection);
                                              }));
  return absl::OkStatus();
}

ServerImpl::~ServerImpl() {
  acceptor_.reset();
  if (grpc_ != nullptr) {
    grpc_->Shutdown(absl::ToChronoTime(absl::Now() + options_.limits.shutdown_grace));
    grpc_->Wait();
  }
  fd_server_.reset();
  jobs_.reset();
  network_.reset();
}

void ServerImpl::Drain(bool closed) {
  if (!draining_.exchange(true)) spdlog::info("draining: no new jobs");
  jobs_->SetAdmission(closed ? Admission::kClosed : Admission::kNoNewJobs);
  grpc_->GetHealthCheckService()->SetServingStatus(false);
  network_->SetServing(false);
}

bool ServerImpl::EndJobs(absl::Duration timeout) {
  jobs_->FailAll(absl::UnavailableError(
      "the daemon is shutting down, and the job's state goes with it: start the job anew"));
  return jobs_->WaitEmpty(timeout);
}

void ServerImpl::RemoveSockets() {
  for (const char* suffix : {"", ".fd", ".lock"}) {
    unlink(absl::StrCat(options_.socket, suffix).c_str());
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Options& options) {
  auto server = std::make_unique<ServerImpl>(options);
  RETURN_IF_ERROR(server->Start());
  return std::unique_ptr<Server>(std::move(server));
}

}  // namespace zerod::server
