// SPDX-License-Identifier: Apache-2.0
//
// Listening Unix sockets that survive a predecessor's crash, and who is at the other end.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/server/limits.h"
#include "proto/shm/fd_passing.h"

namespace zerod::server {

// The right to a socket path: flock(2) on `<path>.lock`, which a dead daemon cannot hold. Removed
// with the object.
class SocketLock {
 public:
  // Makes the directory where only its last part is missing. FAILED_PRECONDITION: a living daemon
  // has the path.
  static absl::StatusOr<SocketLock> Acquire(const std::string& socket_path);
  SocketLock(SocketLock&& other) noexcept = default;
  SocketLock& operator=(SocketLock&&) = delete;
  ~SocketLock();

 private:
  SocketLock(std::string path, shm::UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  std::string path_;
  shm::UniqueFd fd_;
};

// A listening socket at `path`, which is removed with the object.
class ListeningSocket {
 public:
  // A socket file that lies there is a dead daemon's and is replaced; any other file is an error.
  // REQUIRES: the caller holds the path's SocketLock.
  static absl::StatusOr<ListeningSocket> Create(const std::string& path, mode_t mode);
  ListeningSocket(ListeningSocket&& other) noexcept = default;
  ListeningSocket& operator=(ListeningSocket&&) = delete;
  ~ListeningSocket();

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  gid_t gid() const { return gid_; }  // the file's group

 private:
  ListeningSocket(std::string path, shm::UniqueFd fd, gid_t gid)
      : path_(std::move(path)), fd_(std::move(fd)), gid_(gid) {}
  std::string path_;
  shm::UniqueFd fd_;
  gid_t gid_;
};

// Who connected, as the kernel says (SO_PEERCRED): the process at the moment of connect().
struct PeerProcess {
  pid_t pid = 0;  // 0: in a PID namespace that we cannot see
  uid_t uid = 0;
  std::vector<gid_t> gids;  // all of its groups
};
absl::StatusOr<PeerProcess> ReadPeer(int socket);

// Who may connect. Immutable, thread-safe.
class AccessList {
 public:
  // Our own user and root are always in.
  AccessList(std::vector<uid_t> uids, std::vector<gid_t> gids);
  // OK, or PERMISSION_DENIED with what the operator would do to let `peer` in.
  absl::Status Check(const PeerProcess& peer) const;

 private:
  std::vector<uid_t> uids_;
  std::vector<gid_t> gids_;
};

// A pidfd of the process that connected: SO_PEERPIDFD, or on older kernels pidfd_open with a check
// that the process is older than the connection. PERMISSION_DENIED: it cannot be watched from here.
absl::StatusOr<shm::UniqueFd> OpenPeerPidfd(int socket, pid_t pid);

}  // namespace zerod::server
