// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/systemd.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/shm/fd_passing.h"

namespace zerod::server {

absl::Status NotifySystemd(const std::string& state) {
  const char* const path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || path[0] == 0) return absl::OkStatus();
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  const size_t length = strlen(path);
  if ((path[0] != '/' && path[0] != '@') || length >= sizeof(to.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("NOTIFY_SOCKET is no socket: ", path));
  }
  memcpy(to.sun_path, path, length);
  if (path[0] == '@') to.sun_path[0] = 0;  // the abstract namespace
  shm::UniqueFd fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
  if (!fd || sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL | MSG_DONTWAIT,
                    reinterpret_cast<const sockaddr*>(&to), size) < 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot notify systemd at ", path, ": ", strerror(errno)));
  }
  return absl::OkStatus();
}

std::optional<absl::Duration> SystemdWatchdogInterval() {
  const char* const usec = std::getenv("WATCHDOG_USEC");
  const char* const pid = std::getenv("WATCHDOG_PID");
  int64_t value = 0;
  if (usec == nullptr || !absl::SimpleAtoi(usec, &value) || value <= 0) return std::nullopt;
  int64_t meant = 0;
  if (pid != nullptr && (!absl::SimpleAtoi(pid, &meant) || meant != getpid())) return std::nullopt;
  return absl::Microseconds(value) / 2;
}

}  // namespace zerod::server
