// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/fd_server.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "proto/shm/fd_socket.h"

namespace zerod::server {
namespace {

// Keys of the epoll set: kind in the low two bits, connection id above.
enum Kind : uint64_t { kListener = 0, kStop = 1, kSocket = 2, kPidfd = 3 };
constexpr uint64_t Key(Kind kind, uint64_t id) { return (id << 2) | kind; }

constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);

void CopyText(absl::string_view text, char (&to)[shm::kFdTextBytes]) {
  const size_t length = std::min<size_t>(text.size(), shm::kFdTextBytes - 1);
  std::copy_n(text.begin(), length, to);
  to[length] = 0;
}

shm::FdWelcome Welcome(const absl::Status& status) {
  shm::FdWelcome welcome{};
  welcome.magic = shm::kMagic;
  welcome.format_version = shm::kFormatVersion;
  welcome.code = static_cast<uint32_t>(status.code());
  CopyText(status.message(), welcome.text);
  return welcome;
}

// The answers fit an empty socket buffer many times: who leaves so much unread is cut off.
template <typename Message>
bool Send(int socket, const Message& message, absl::Span<const int> fds = {}) {
  return shm::SendFds(socket, &message, sizeof(message), fds, absl::ZeroDuration()).ok();
}

}  // namespace

FdServer::FdServer(ListeningSocket listener, const AccessList* access, SessionTable* sessions,
                   const Limits& limits)
    : listener_(std::move(listener)),
      access_(access),
      sessions_(sessions),
      limits_(limits),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

absl::StatusOr<std::unique_ptr<FdServer>> FdServer::Start(ListeningSocket listener,
                                                          const AccessList* access,
                                                          SessionTable* sessions,
                                                          const Limits& limits) {
  auto server = std::make_unique<FdServer>(std::move(listener), access, sessions, limits);
  if (!server->epoll_ || !server->stop_) {
    return absl::UnavailableError(absl::StrCat("cannot serve the fd socket: ", strerror(errno)));
  }
  RETURN_IF_ERROR(server->Watch(server->listener_.fd(), Key(kListener, 0), EPOLLIN));
  RETURN_IF_ERROR(server->Watch(server->stop_.get(), Key(kStop, 0), EPOLLIN));
  server->thread_ = std::thread([raw = server.get()] { raw->Run(); });
  return server;
}

FdServer::~FdServer() {
  if (thread_.joinable()) {
    eventfd_write(stop_.get(), 1);
    thread_.join();
  }
  while (!connections_.empty()) Close(connections_.begin()->first);
}

absl::Status FdServer::Watch(int fd, uint64_t key, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = key;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot watch a descriptor: ", strerror(errno)));
}

void FdServer::Run() {
  for (;;) {
    const absl::Duration left = Expire();
    const int64_t left_ms = std::clamp<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0, 60000);
    epoll_event events[64];
    const int ready = epoll_wait(epoll_.get(), events, 64, static_cast<int>(left_ms));
    for (int i = 0; i < ready; ++i) {
      const uint64_t key = events[i].data.u64;
      switch (static_cast<Kind>(key & 3)) {
        case kStop: return;
        case kListener: Accept(); break;
        case kPidfd: Close(key >> 2); break;  // the process is dead
        case kSocket: Read(key >> 2); break;
      }
    }
  }
}

void FdServer::Accept() {
  for (int burst = 0; burst < 64; ++burst) {
    shm::UniqueFd socket(
        accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        // The listener stays readable: look away for a moment instead of spinning.
        accepting_ = false;
        accept_after_ = MonotonicNow() + kAcceptPause;
        epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, listener_.fd(), nullptr);
      }
      return;
    }
    const int fd = socket.get();
    if (connections_.size() >= limits_.fd_connections_max) {
      Refuse(fd, absl::ResourceExhaustedError(
                     absl::StrCat("the daemon serves at most ", limits_.fd_connections_max,
                                  " processes; end one, or run another daemon")));
      continue;
    }
    absl::StatusOr<PeerProcess> peer = ReadPeer(fd);
    if (!peer.ok()) {
      Refuse(fd, peer.status());
      continue;
    }
    if (absl::Status allowed = access_->Check(*peer); !allowed.ok()) {
      Refuse(fd, allowed);
      continue;
    }
    absl::StatusOr<shm::UniqueFd> pidfd = OpenPeerPidfd(fd, peer->pid);
    if (!pidfd.ok()) {
      Refuse(fd, pidfd.status());
      continue;
    }
    const uint64_t id = next_id_++;
    Connection& connection = connections_[id];
    connection.socket = std::move(socket);
    connection.pidfd = *std::move(pidfd);
    connection.peer = *std::move(peer);
    connection.hello_deadline = MonotonicNow() + limits_.fd_hello;
    if (!Watch(fd, Key(kSocket, id), EPOLLIN | EPOLLRDHUP).ok() ||
        !Watch(connection.pidfd.get(), Key(kPidfd, id), EPOLLIN).ok()) {
      Close(id);
    }
  }
}

void FdServer::Refuse(int socket, const absl::Status& why) { Send(socket, Welcome(why)); }

void FdServer::Read(uint64_t id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  Connection& connection = it->second;
  const size_t want = connection.session == nullptr ? sizeof(shm::FdHello) : sizeof(shm::FdFetch);
  static_assert(sizeof(shm::FdHello) <= sizeof(connection.buffer) &&
                sizeof(shm::FdFetch) <= sizeof(connection.buffer));
  // Descriptors that come along are dropped by the kernel: nobody receives them.
  const ssize_t n = recv(connection.socket.get(), connection.buffer + connection.have,
                         want - connection.have, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
  if (n <= 0) {
    Close(id);
    return;
  }
  connection.have += static_cast<size_t>(n);
  if (connection.have < want) return;
  connection.have = 0;
  if (!Handle(&connection)) Close(id);
}

bool FdServer::Handle(Connection* connection) {
  return connection->session == nullptr ? HandleHello(connection) : HandleFetch(connection);
}

bool FdServer::HandleHello(Connection* connection) {
  shm::FdHello hello;
  memcpy(&hello, connection->buffer, sizeof(hello));
  const int socket = connection->socket.get();
  if (hello.magic != shm::kMagic) {
    Refuse(socket, absl::InvalidArgumentError("this is zerod's fd socket, and that was no zerod "
                                              "client"));
    return false;
  }
  if (hello.format_version != shm::kFormatVersion) {
    Refuse(socket, absl::FailedPreconditionError(absl::StrCat(
                       "the client has shared memory format ", hello.format_version,
                       ", the daemon ", shm::kFormatVersion,
                       ": install the same version of both")));
    return false;
  }
  absl::StatusOr<std::shared_ptr<Session>> session =
      Session::Create(connection->peer.pid, connection->peer.uid);
  if (!session.ok()) {
    Refuse(socket, session.status());
    return false;
  }
  connection->session = *std::move(session);
  connection->hello_deadline = absl::InfiniteFuture();
  sessions_->Add(connection->session);
  shm::FdWelcome welcome = Welcome(absl::OkStatus());
  memcpy(welcome.token, connection->session->token().data(), sizeof(welcome.token));
  return Send(socket, welcome);
}

bool FdServer::HandleFetch(Connection* connection) {
  shm::FdFetch fetch;
  memcpy(&fetch, connection->buffer, sizeof(fetch));
  if (fetch.magic != shm::kMagic ||
      memcmp(fetch.token, connection->session->token().data(), sizeof(fetch.token)) != 0) {
    return false;
  }
  shm::FdFiles answer{};
  answer.magic = shm::kMagic;
  absl::StatusOr<std::vector<shm::UniqueFd>> files = connection->session->TakeFiles();
  if (!files.ok()) {
    answer.code = static_cast<uint32_t>(files.status().code());
    CopyText(files.status().message(), answer.text);
    return Send(connection->socket.get(), answer);
  }
  std::vector<int> fds;
  for (const shm::UniqueFd& file : *files) fds.push_back(file.get());
  answer.files = static_cast<uint32_t>(fds.size());
  return Send(connection->socket.get(), answer, fds);
}

void FdServer::Close(uint64_t id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  if (it->second.session != nullptr) {
    sessions_->Remove(*it->second.session);
    it->second.session->MarkGone();
  }
  connections_.erase(it);  // closing takes the descriptors out of the epoll set
}

absl::Duration FdServer::Expire() {
  const absl::Time now = MonotonicNow();
  if (!accepting_ && now >= accept_after_) {
    accepting_ = Watch(listener_.fd(), Key(kListener, 0), EPOLLIN).ok();
    if (!accepting_) accept_after_ = now + kAcceptPause;
  }
  absl::Time next = accepting_ ? absl::InfiniteFuture() : accept_after_;
  std::vector<uint64_t> late;
  for (const auto& [id, connection] : connections_) {
    if (connection.hello_deadline <= now) {
      late.push_back(id);
    } else {
      next = std::min(next, connection.hello_deadline);
    }
  }
  for (uint64_t id : late) Close(id);
  return std::max(absl::ZeroDuration(), next - now);
}

}  // namespace zerod::server
