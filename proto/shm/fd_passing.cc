// SPDX-License-Identifier: Apache-2.0
#include "proto/shm/fd_passing.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace zerod::shm {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

SteadyTime After(absl::Duration timeout) {
  return std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
}

// OK when `socket` is ready for `events` (or has an error, which the next call will tell).
absl::Status WaitReady(int socket, short events, SteadyTime deadline, const char* doing) {
  for (;;) {
    const absl::Duration left = absl::FromChrono(deadline - std::chrono::steady_clock::now());
    // Rounded up, so that the last fraction of a millisecond does not become a busy loop.
    const int64_t left_ms = std::clamp<int64_t>(
        absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0, 1 << 30);
    pollfd waiting{socket, events, 0};
    const int ready = poll(&waiting, 1, static_cast<int>(left_ms));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) {
      return absl::InternalError(absl::StrCat("cannot wait on the fd socket: ", strerror(errno)));
    }
    if (ready == 0 && std::chrono::steady_clock::now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("the other end of the fd socket did not answer in time while ", doing));
    }
  }
}

absl::Status Gone(int error) {
  return absl::UnavailableError(
      error == 0 ? "the other end closed the fd socket"
                 : absl::StrCat("the other end of the fd socket is gone: ", strerror(error)));
}

// Takes the descriptors of one recvmsg into `fds`, whatever their number, so that none leaks.
void TakeFds(msghdr* header, std::vector<UniqueFd>* fds) {
  for (cmsghdr* c = CMSG_FIRSTHDR(header); c != nullptr; c = CMSG_NXTHDR(header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds->emplace_back(fd);
    }
  }
}

}  // namespace

void UniqueFd::Reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

absl::Status SendFds(int socket, const void* message, size_t bytes, absl::Span<const int> fds,
                     absl::Duration timeout) {
  if (bytes == 0 || fds.size() > kFdsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("a message has at least one byte and at most ", kFdsMax,
                     " descriptors; asked for ", bytes, " bytes with ", fds.size()));
  }
  const SteadyTime deadline = After(timeout);
  alignas(cmsghdr) char control[CMSG_SPACE(kFdsMax * sizeof(int))] = {};
  size_t sent = 0;
  while (sent < bytes) {
    iovec part{const_cast<char*>(static_cast<const char*>(message)) + sent, bytes - sent};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    if (sent == 0 && !fds.empty()) {
      header.msg_control = control;
      header.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
      cmsghdr* c = CMSG_FIRSTHDR(&header);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
    }
    const ssize_t n = sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      sent += static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      absl::Status ready = WaitReady(socket, POLLOUT, deadline, "being sent a message");
      if (!ready.ok()) return ready;
    } else if (errno == EPIPE || errno == ECONNRESET) {
      return Gone(errno);
    } else if (errno != EINTR) {
      return absl::InternalError(absl::StrCat("cannot send on the fd socket: ", strerror(errno)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<UniqueFd>> ReceiveFds(int socket, void* message, size_t bytes,
                                                 size_t fds_max, absl::Duration timeout) {
  const SteadyTime deadline = After(timeout);
  std::vector<UniqueFd> fds;
  size_t received = 0;
  while (received < bytes) {
    alignas(cmsghdr) char control[CMSG_SPACE(kFdsMax * sizeof(int))];
    iovec part{static_cast<char*>(message) + received, bytes - received};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    const ssize_t n = recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == ECONNRESET) return Gone(errno);
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        return absl::InternalError(
            absl::StrCat("cannot receive on the fd socket: ", strerror(errno)));
      }
      absl::Status ready = WaitReady(socket, POLLIN, deadline, "waiting for a message");
      if (!ready.ok()) return ready;
      continue;
    }
    TakeFds(&header, &fds);
    if (fds.size() > fds_max || (header.msg_flags & MSG_CTRUNC) != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a message came with more than ", fds_max,
          " descriptors, or the limit of open files (ulimit -n) is reached"));
    }
    if (n == 0) return Gone(0);
    received += static_cast<size_t>(n);
  }
  return fds;
}

}  // namespace zerod::shm
