// SPDX-License-Identifier: Apache-2.0
//
// Tells whether this process is the one that attached. getpid() is a system call; this is a load,
// so that it can be asked on the way to every gather.
#pragma once

#include <atomic>
#include <cstdint>

namespace zerod::client {

// Grows in the child of each fork (pthread_atfork).
class ForkGuard {
 public:
  ForkGuard();
  // False in a process that was forked since this guard was made.
  bool Here() const { return forks_.load(std::memory_order_relaxed) == made_at_; }

 private:
  static std::atomic<uint64_t> forks_;
  const uint64_t made_at_;
};

}  // namespace zerod::client
