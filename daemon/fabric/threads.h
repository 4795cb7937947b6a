// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>
#include <signal.h>

namespace zerod::fabric {

// Blocks all signals in the calling thread while it lives. Threads inherit the mask of their
// creator: those of the fabric take no signals, and a write to a dead peer's socket is an error
// (EPIPE) instead of a SIGPIPE that ends the daemon, whatever the process does about SIGPIPE.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace zerod::fabric
