// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/workers.h"

#include <algorithm>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "absl/strings/str_cat.h"

namespace zerod::engine {
namespace {

// Non-temporal stores of kernels must be visible before anybody is told that they were made.
void FlushStores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

Workers::Workers(uint32_t threads, size_t queue_max, Mailbox* mailbox)
    : queue_max_(queue_max), mailbox_(mailbox) {
  for (uint32_t i = 0; i < std::max(threads, 1u); ++i) {
    threads_.emplace_back([this] { Loop(); });
  }
}

absl::Status Workers::Run(size_t parts, std::function<void(size_t)> part,
                          std::function<void()> done) {
  if (parts == 0) {
    mailbox_->Post(std::move(done));
    return absl::OkStatus();
  }
  auto work = std::make_shared<Work>();
  work->parts = work->left = parts;
  work->part = std::move(part);
  work->done = std::move(done);
  const std::lock_guard<std::mutex> lock(mu_);
  if (unfinished_ >= queue_max_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the job's worker queue is full (", queue_max_, " pieces of work under way)"));
  }
  ++unfinished_;
  queue_.push_back(std::move(work));
  changed_.notify_all();
  return absl::OkStatus();
}

void Workers::Loop() {
  std::unique_lock<std::mutex> lock(mu_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    const std::shared_ptr<Work> work = queue_.front();
    const size_t part = work->next++;
    if (work->next == work->parts) queue_.pop_front();
    lock.unlock();
    work->part(part);
    FlushStores();
    lock.lock();
    if (--work->left > 0) continue;
    --unfinished_;
    lock.unlock();
    work->part = nullptr;  // what it keeps alive ends before the loop hears of it
    mailbox_->Post(std::move(work->done));
    lock.lock();
  }
}

void Workers::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mu_);
    stop_ = true;
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace zerod::engine
