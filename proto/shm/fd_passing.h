// SPDX-License-Identifier: Apache-2.0
//
// Messages of a fixed size with file descriptors beside them (SCM_RIGHTS), over the fd socket of
// proto/shm/fd_socket.h. Stateless: any thread, one sender and one receiver per socket at a time.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace zerod::shm {

// Owns one file descriptor; -1 is none.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(other.Release());
    return *this;
  }
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  [[nodiscard]] int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

// Bound on the descriptors of one message.
inline constexpr size_t kFdsMax = 16;

// Sends exactly `bytes` bytes of `message`, the fds with the first of them; the fds stay the
// caller's. UNAVAILABLE: the other side is gone. DEADLINE_EXCEEDED: it does not read; as part of
// the message may be on its way, close the socket after any error.
absl::Status SendFds(int socket, const void* message, size_t bytes, absl::Span<const int> fds,
                     absl::Duration timeout);

// Receives exactly `bytes` bytes and the descriptors that came with them: at most `fds_max`
// (INVALID_ARGUMENT and nothing kept where there were more), all with FD_CLOEXEC. How many a
// message must have is the caller's to check. UNAVAILABLE: the other side is gone.
// DEADLINE_EXCEEDED: not all of it came. Close the socket after any error.
absl::StatusOr<std::vector<UniqueFd>> ReceiveFds(int socket, void* message, size_t bytes,
                                                 size_t fds_max, absl::Duration timeout);

}  // namespace zerod::shm
