// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/fork_guard.h"

#include <pthread.h>

namespace zerod::client {

std::atomic<uint64_t> ForkGuard::forks_{0};

ForkGuard::ForkGuard()
    : made_at_([] {
        static const bool registered = [] {
          pthread_atfork(nullptr, nullptr,
                         [] { forks_.fetch_add(1, std::memory_order_relaxed); });
          return true;
        }();
        (void)registered;
        return forks_.load(std::memory_order_relaxed);
      }()) {}

}  // namespace zerod::client
