// SPDX-License-Identifier: Apache-2.0
//
// The threads that do a job's arithmetic and copying. Work is a number of independent parts, run
// first in, first out, each part by whichever thread is free; results go to the loop.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "daemon/engine/mailbox.h"

namespace zerod::engine {

class Workers {
 public:
  // At most `queue_max` pieces of work wait or run at a time. `mailbox` outlives the workers.
  Workers(uint32_t threads, size_t queue_max, Mailbox* mailbox);
  ~Workers() { Stop(); }

  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()); }

  // Runs part(0), ..., part(parts - 1) on the workers, in any order and at once, then `done` on
  // the loop. Thread-safe, never blocks. RESOURCE_EXHAUSTED where the queue is full: nothing runs.
  absl::Status Run(size_t parts, std::function<void(size_t)> part, std::function<void()> done);

  // Lets the parts that run end, drops the others and joins the threads. Idempotent.
  void Stop();

 private:
  struct Work {
    size_t parts = 0;
    size_t next = 0;  // first part that nobody has taken
    size_t left = 0;  // parts that have not ended
    std::function<void(size_t)> part;
    std::function<void()> done;
  };
  void Loop();

  const size_t queue_max_;
  Mailbox* const mailbox_;
  std::mutex mu_;  // guards the next four
  std::condition_variable changed_;
  bool stop_ = false;
  size_t unfinished_ = 0;
  std::deque<std::shared_ptr<Work>> queue_;  // with parts to be taken
  std::vector<std::thread> threads_;
};

}  // namespace zerod::engine
