// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/unix_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "base/status.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace zerod::server {
namespace {

using shm::UniqueFd;

absl::Status Errno(const std::string& what) {
  return absl::FailedPreconditionError(absl::StrCat(what, ": ", strerror(errno)));
}

absl::Status MakeDirectoryOf(const std::string& path) {
  const std::string directory = path.substr(0, path.rfind('/'));
  if (directory.empty() || mkdir(directory.c_str(), 0755) == 0 || errno == EEXIST) {
    return absl::OkStatus();
  }
  return Errno(absl::StrCat("cannot make the directory ", directory, " of the socket"));
}

// True where `path` is still the file behind `fd`: another daemon may have removed it meanwhile.
bool SameFile(int fd, const std::string& path) {
  struct stat by_fd;
  struct stat by_path;
  return fstat(fd, &by_fd) == 0 && stat(path.c_str(), &by_path) == 0 &&
         by_fd.st_ino == by_path.st_ino && by_fd.st_dev == by_path.st_dev;
}

}  // namespace

absl::StatusOr<SocketLock> SocketLock::Acquire(const std::string& socket_path) {
  RETURN_IF_ERROR(MakeDirectoryOf(socket_path));
  const std::string path = socket_path + ".lock";
  for (int attempt = 0; attempt < 16; ++attempt) {
    UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return Errno(absl::StrCat("cannot open ", path));
    if (flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK) return Errno(absl::StrCat("cannot lock ", path));
      return absl::FailedPreconditionError(
          absl::StrCat("a living daemon already serves ", socket_path,
                       ": stop it, or choose another --socket"));
    }
    if (SameFile(fd.get(), path)) return SocketLock(path, std::move(fd));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("daemons come and go at ", socket_path, ": try again"));
}

SocketLock::~SocketLock() {
  // While the lock is held nobody else has the path, so the file that goes is our own.
  if (fd_) unlink(path_.c_str());
}

absl::StatusOr<ListeningSocket> ListeningSocket::Create(const std::string& path, mode_t mode) {
  struct stat there;
  if (lstat(path.c_str(), &there) == 0) {
    if (!S_ISSOCK(there.st_mode)) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, " is there and is no socket: move it away, or choose another path"));
    }
    if (unlink(path.c_str()) != 0) return Errno(absl::StrCat("cannot remove the stale ", path));
  }
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("the path of the socket is too long: ", path));
  }
  memcpy(address.sun_path, path.data(), path.size());
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return Errno("cannot make a socket");
  // bind(2) makes the file with what fchmod set on the socket, so nobody gets in before chmod.
  if (fchmod(fd.get(), mode) != 0 ||
      bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    return Errno(absl::StrCat("cannot bind ", path));
  }
  if (chmod(path.c_str(), mode) != 0 || stat(path.c_str(), &there) != 0 ||
      listen(fd.get(), 128) != 0) {
    const absl::Status failed = Errno(absl::StrCat("cannot listen at ", path));
    unlink(path.c_str());
    return failed;
  }
  return ListeningSocket(path, std::move(fd), there.st_gid);
}

ListeningSocket::~ListeningSocket() {
  if (fd_) unlink(path_.c_str());
}

absl::StatusOr<PeerProcess> ReadPeer(int socket) {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return Errno("cannot tell who connected");
  }
  PeerProcess peer{credentials.pid, credentials.uid, {credentials.gid}};
  gid_t groups[1024];
  size = sizeof(groups);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups, &size) == 0) {
    peer.gids.insert(peer.gids.end(), groups, groups + size / sizeof(gid_t));
  }
  return peer;
}

AccessList::AccessList(std::vector<uid_t> uids, std::vector<gid_t> gids)
    : uids_(std::move(uids)), gids_(std::move(gids)) {
  uids_.push_back(geteuid());
  uids_.push_back(0);
}

absl::Status AccessList::Check(const PeerProcess& peer) const {
  if (std::find(uids_.begin(), uids_.end(), peer.uid) != uids_.end()) return absl::OkStatus();
  for (gid_t gid : peer.gids) {
    if (std::find(gids_.begin(), gids_.end(), gid) != gids_.end()) return absl::OkStatus();
  }
  return absl::PermissionDeniedError(
      absl::StrCat("user ", peer.uid, " (process ", peer.pid,
                   ") may not use this daemon: start it with --allow-uid ", peer.uid,
                   " or --allow-gid, or run the trainer as user ", geteuid()));
}

absl::StatusOr<UniqueFd> OpenPeerPidfd(int socket, pid_t pid) {
  if (pid == 0) {
    return absl::PermissionDeniedError(
        "the process that connected is in another PID namespace, so its life cannot be watched: "
        "run the trainer in the daemon's PID namespace (hostPID, --pid=host)");
  }
  int pidfd = -1;
  socklen_t size = sizeof(pidfd);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0) {
    UniqueFd fd(pidfd);
    fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
    return fd;
  }
  const absl::Status gone = absl::UnavailableError(
      absl::StrCat("process ", pid, " was gone before its connection was accepted"));
  if (errno == ESRCH || errno == EINVAL) return gone;
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  UniqueFd fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!fd) return errno == ESRCH ? gone : Errno(absl::StrCat("cannot watch process ", pid));
  // The number may have been given to a newer process between connect() and here: such a one
  // started after we looked at the clock, or holds no connection to us.
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string stat((std::istreambuf_iterator<char>(file)), {});
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return gone;
  std::istringstream fields(stat.substr(name_end + 2));
  std::string field;
  for (int i = 3; i <= 22 && (fields >> field); ++i) {
  }  // the 22nd field of stat is the start time, in ticks since boot
  const double started =
      std::strtod(field.c_str(), nullptr) / static_cast<double>(sysconf(_SC_CLK_TCK));
  pollfd alive{fd.get(), POLLIN, 0};
  if (poll(&alive, 1, 0) != 0 || started > static_cast<double>(now.tv_sec) + 1) return gone;
  return fd;
}

}  // namespace zerod::server
