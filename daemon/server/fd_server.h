// SPDX-License-Identifier: Apache-2.0
//
// The daemon's end of the fd socket (proto/shm/fd_socket.h): one thread that accepts, checks who
// it is, watches lives by pidfd, and hands out memory files. Whatever a client sends or leaves
// unread ends its own connection only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/server/limits.h"
#include "daemon/server/session.h"
#include "daemon/server/unix_socket.h"
#include "proto/shm/fd_passing.h"

namespace zerod::server {

class FdServer {
 public:
  // `access` and `sessions` outlive the server.
  static absl::StatusOr<std::unique_ptr<FdServer>> Start(ListeningSocket listener,
                                                         const AccessList* access,
                                                         SessionTable* sessions,
                                                         const Limits& limits);
  // Use Start.
  FdServer(ListeningSocket listener, const AccessList* access, SessionTable* sessions,
           const Limits& limits);
  // Ends the thread and all connections.
  ~FdServer();

 private:
  struct Connection {
    shm::UniqueFd socket;
    shm::UniqueFd pidfd;
    std::shared_ptr<Session> session;  // null until FdHello
    PeerProcess peer;
    absl::Time hello_deadline;
    size_t have = 0;  // bytes of the message under way
    alignas(8) unsigned char buffer[64];
  };

  absl::Status Watch(int fd, uint64_t key, uint32_t events);
  void Run();
  void Accept();
  void Refuse(int socket, const absl::Status& why);
  void Read(uint64_t id);
  // False: the connection has ended.
  bool Handle(Connection* connection);
  bool HandleHello(Connection* connection);
  bool HandleFetch(Connection* connection);
  void Close(uint64_t id);
  // Ends connections that said nothing; the time until the next could be.
  absl::Duration Expire();

  const ListeningSocket listener_;
  const AccessList* const access_;
  SessionTable* const sessions_;
  const Limits limits_;
  shm::UniqueFd epoll_;
  shm::UniqueFd stop_;
  // The thread's own:
  std::map<uint64_t, Connection> connections_;  // by an id that is never used again
  uint64_t next_id_ = 1;
  absl::Time accept_after_ = absl::InfinitePast();  // out of descriptors: a pause
  bool accepting_ = true;

  std::thread thread_;
};

}  // namespace zerod::server
