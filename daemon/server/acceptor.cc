// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/acceptor.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr int kAcceptPauseMilliseconds = 100;

bool Watch(int epoll, int fd, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

}  // namespace

Acceptor::Acceptor(ListeningSocket listener, const AccessList* access, const Limits& limits,
                   std::function<void(int fd)> handover)
    : listener_(std::move(listener)),
      access_(access),
      limits_(limits),
      handover_(std::move(handover)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

absl::StatusOr<std::unique_ptr<Acceptor>> Acceptor::Start(ListeningSocket listener,
                                                          const AccessList* access,
                                                          const Limits& limits,
                                                          std::function<void(int fd)> handover) {
  auto acceptor =
      std::make_unique<Acceptor>(std::move(listener), access, limits, std::move(handover));
  if (!acceptor->epoll_ || !acceptor->stop_ ||
      !Watch(acceptor->epoll_.get(), acceptor->stop_.get(), EPOLLIN) ||
      !Watch(acceptor->epoll_.get(), acceptor->listener_.fd(), EPOLLIN)) {
    return absl::UnavailableError(absl::StrCat("cannot serve the socket: ", strerror(errno)));
  }
  acceptor->thread_ = std::thread([raw = acceptor.get()] { raw->Run(); });
  return acceptor;
}

Acceptor::~Acceptor() {
  if (!thread_.joinable()) return;
  eventfd_write(stop_.get(), 1);
  thread_.join();
}

void Acceptor::Run() {
  for (;;) {
    epoll_event events[64];
    const int ready =
        epoll_wait(epoll_.get(), events, 64, accepting_ ? -1 : kAcceptPauseMilliseconds);
    if (!accepting_) accepting_ = Watch(epoll_.get(), listener_.fd(), EPOLLIN);
    for (int i = 0; i < ready; ++i) {
      const int fd = events[i].data.fd;
      if (fd == stop_.get()) return;
      if (fd == listener_.fd()) {
        Accept();
        continue;
      }
      // Either end shut the connection down: it no longer counts. Not by closing the duplicate
      // alone: gRPC may still have the same connection open, which would stay in the set.
      epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
      watched_.erase(fd);
      count_.store(watched_.size(), std::memory_order_relaxed);
    }
  }
}

void Acceptor::Accept() {
  for (int burst = 0; burst < 64; ++burst) {
    shm::UniqueFd socket(accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        // Out of descriptors, say: the listener stays readable, so look away for a moment.
        spdlog::warn("cannot accept a connection: {}", strerror(errno));
        epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, listener_.fd(), nullptr);
        accepting_ = false;
      }
      return;
    }
    absl::StatusOr<PeerProcess> peer = ReadPeer(socket.get());
    const absl::Status allowed = peer.ok() ? access_->Check(*peer) : peer.status();
    if (!allowed.ok()) {
      spdlog::warn("refused a connection: {}", std::string(allowed.message()));
      continue;
    }
    if (watched_.size() >= limits_.connections_max) {
      spdlog::warn("refused a connection of process {}: {} are open", peer->pid, watched_.size());
      continue;
    }
    // gRPC owns the connection; a duplicate tells when it has ended (both ends shut it down).
    shm::UniqueFd duplicate(fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
    if (!duplicate || !Watch(epoll_.get(), duplicate.get(), EPOLLRDHUP)) continue;
    const int key = duplicate.get();
    watched_.emplace(key, std::move(duplicate));
    count_.store(watched_.size(), std::memory_order_relaxed);
    handover_(socket.Release());
  }
}

}  // namespace zerod::server
