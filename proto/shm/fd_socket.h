// SPDX-License-Identifier: Apache-2.0
//
// The fd socket: a Unix stream socket beside the gRPC one (`<gRPC socket path>.fd`). gRPC cannot
// carry file descriptors, and a process's life must be watched by a pidfd taken at accept, so a
// client connects here first and keeps the connection for as long as it lives.
//
//   client -> daemon  FdHello
//   daemon -> client  FdWelcome (code != 0: refused, `text` says why; the daemon then closes)
//   ... the client calls Jobs.Attach over gRPC, naming the token ...
//   client -> daemon  FdFetch
//   daemon -> client  FdFiles, with kClientFiles + 1 fds in SCM_RIGHTS: the files in the order of
//                     ClientFile, then the doorbell eventfd. code != 0: no fds, `text` says why.
//   end of file in either direction: the other side is gone.
#pragma once

#include <cstdint>

#include "proto/shm/format.h"

namespace zerod::shm {

inline constexpr uint32_t kFdTokenBytes = 16;
inline constexpr uint32_t kFdTextBytes = 480;
inline constexpr uint32_t kDoorbellIndex = kClientFiles;  // its place among the passed fds

struct FdHello {
  uint64_t magic;  // kMagic
  uint32_t format_version;
  uint32_t reserved;
};

struct FdWelcome {
  uint64_t magic;
  uint32_t format_version;
  uint32_t code;  // absl::StatusCode
  uint8_t token[kFdTokenBytes];
  char text[kFdTextBytes];  // NUL-terminated
};

struct FdFetch {
  uint64_t magic;
  uint8_t token[kFdTokenBytes];
};

struct FdFiles {
  uint64_t magic;
  uint32_t code;
  uint32_t files;
  char text[kFdTextBytes];
};

}  // namespace zerod::shm
