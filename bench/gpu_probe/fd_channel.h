// SPDX-License-Identifier: Apache-2.0
//
// Two processes' messages over a socket pair: a byte, with or without a file descriptor.
#pragma once

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "bench/gpu_probe/probe.h"

namespace probe {

// A socket pair whose reads end after the timeout.
inline bool MakeChannel(int ends[2], int timeout_seconds) {
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return false;
  const timeval timeout = {timeout_seconds, 0};
  for (int k = 0; k < 2; ++k) {
    if (setsockopt(ends[k], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) != 0) return false;
  }
  return true;
}

inline bool Send(int socket, const void* data, size_t bytes, int fd = -1) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec piece = {const_cast<void*>(data), bytes};
  msghdr message = {};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

// False where the peer is gone, silent past the timeout, or sends another size.
inline bool Receive(int socket, void* data, size_t bytes, int* fd = nullptr) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec piece = {data, bytes};
  msghdr message = {};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(bytes)) return false;
  if (fd == nullptr) return true;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return false;
  memcpy(fd, CMSG_DATA(header), sizeof(int));
  return true;
}

}  // namespace probe
