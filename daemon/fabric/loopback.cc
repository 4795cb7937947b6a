// SPDX-License-Identifier: Apache-2.0
//
// The fabric of a job with one member: every transfer is a copy, made by one thread in order.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "daemon/fabric/fabric.h"
#include "daemon/fabric/limits.h"
#include "daemon/fabric/plan.h"
#include "daemon/fabric/threads.h"

namespace zerod::fabric {
namespace {

class LoopbackFabric : public Fabric {
 public:
  LoopbackFabric() {
    BlockSignals inherited;
    thread_ = std::thread([this] { Run(); });
  }

  ~LoopbackFabric() override {
    CHECK(std::this_thread::get_id() != thread_.get_id()) << "a fabric destroyed by its own `done`";
    Abort(absl::AbortedError("the fabric was destroyed while the exchange was in flight"));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  std::string name() const override { return "loopback"; }
  uint32_t rank() const override { return 0; }
  uint32_t size() const override { return 1; }

  void Exchange(uint64_t tag, std::vector<Transfer> sends, std::vector<Transfer> receives,
                Done done) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (queue_.size() >= kExchangesInFlightMax && failed_.ok()) failed_ = TooManyExchanges();
    queue_.push_back(Request{MakePlan(0, 1, tag, sends, receives), std::move(done)});
    wake_.notify_one();
  }

  void Abort(absl::Status reason) override {
    if (reason.ok()) reason = absl::AbortedError("the fabric was aborted");
    std::lock_guard<std::mutex> lock(mutex_);
    if (failed_.ok()) failed_ = std::move(reason);
  }

  Counters counters() const override {
    Counters out;  // no byte leaves the process
    out.exchanges = exchanges_;
    out.failures = failures_;
    return out;
  }

 private:
  struct Request {
    absl::StatusOr<Plan> plan;
    Done done;
  };

  absl::Status failed() {
    std::lock_guard<std::mutex> lock(mutex_);
    return failed_;
  }

  // In pieces, so that an Abort need not wait for a large copy.
  absl::Status CopyAll(const Plan& plan) {
    for (const Copy& copy : plan.copies) {
      for (size_t offset = 0; offset < copy.bytes; offset += kCopyBytes) {
        absl::Status status = failed();
        if (!status.ok()) return status;
        std::memmove(copy.to + offset, copy.from + offset,
                     std::min(kCopyBytes, copy.bytes - offset));
      }
    }
    return failed();
  }

  void Run() {
    for (;;) {
      std::vector<Request> requests;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        requests.swap(queue_);
      }
      for (Request& request : requests) {
        if (!request.plan.ok()) Abort(request.plan.status());  // sticky, like any failure
        const absl::Status status =
            request.plan.ok() ? CopyAll(*request.plan) : failed();
        ++(status.ok() ? exchanges_ : failures_);
        request.done(status);
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Request> queue_;  // guarded by mutex_
  absl::Status failed_;         // guarded by mutex_; the first failure
  bool stopping_ = false;       // guarded by mutex_
  std::atomic<uint64_t> exchanges_{0};
  std::atomic<uint64_t> failures_{0};
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Fabric> MakeLoopbackFabric() { return std::make_unique<LoopbackFabric>(); }

}  // namespace zerod::fabric
