// SPDX-License-Identifier: Apache-2.0
//
// Accepts on the gRPC socket, because gRPC itself does not ask who connected: one thread that
// checks each connection against the access list, counts it, and hands it on.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "daemon/server/limits.h"
#include "daemon/server/unix_socket.h"
#include "proto/shm/fd_passing.h"

namespace zerod::server {

class Acceptor {
 public:
  // `handover` gets connections that may come in, non-blocking, and owns them; called from the
  // acceptor's thread. `access` outlives the acceptor.
  static absl::StatusOr<std::unique_ptr<Acceptor>> Start(ListeningSocket listener,
                                                         const AccessList* access,
                                                         const Limits& limits,
                                                         std::function<void(int fd)> handover);
  // Use Start.
  Acceptor(ListeningSocket listener, const AccessList* access, const Limits& limits,
           std::function<void(int fd)> handover);
  ~Acceptor();

  // Living connections.
  size_t connections() const { return count_.load(std::memory_order_relaxed); }

 private:
  void Run();
  void Accept();

  const ListeningSocket listener_;
  const AccessList* const access_;
  const Limits limits_;
  const std::function<void(int fd)> handover_;
  shm::UniqueFd epoll_;
  shm::UniqueFd stop_;
  std::map<int, shm::UniqueFd> watched_;  // the thread's own: a duplicate of each living connection
  bool accepting_ = true;                 // the thread's own
  std::atomic<size_t> count_{0};
  std::thread thread_;
};

}  // namespace zerod::server
