// SPDX-License-Identifier: Apache-2.0
//
// What the fabric's tests share: members as threads of one process, and awaitable exchanges.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "daemon/fabric/fabric.h"
#include "tests/fabric/map_rendezvous.h"

namespace zerod::fabric {

// The results of several exchanges. A second `done` of one exchange is a failure.
class Results {
 public:
  explicit Results(size_t count) : called_(count, false), statuses_(count) {}

  Fabric::Done At(size_t index) {
    return [this, index](absl::Status status) {
      std::lock_guard<std::mutex> lock(mutex_);
      EXPECT_FALSE(called_[index]) << "done of exchange " << index << " was called twice";
      called_[index] = true;
      statuses_[index] = std::move(status);
      ++finished_;
      changed_.notify_all();
    };
  }

  // False where not all came in time.
  bool Await(std::chrono::seconds timeout = std::chrono::seconds(30)) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, timeout, [&] { return finished_ == called_.size(); });
  }
  size_t finished() {
    std::lock_guard<std::mutex> lock(mutex_);
    return finished_;
  }
  absl::Status status(size_t index = 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    return statuses_[index];
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> called_;
  std::vector<absl::Status> statuses_;
  size_t finished_ = 0;
};

inline absl::Status ExchangeAndWait(Fabric* fabric, uint64_t tag, std::vector<Transfer> sends,
                                    std::vector<Transfer> receives) {
  Results results(1);
  fabric->Exchange(tag, std::move(sends), std::move(receives), results.At(0));
  if (!results.Await()) {
    fabric->Abort(absl::InternalError("the test gave up waiting"));
    results.Await();
  }
  return results.status();
}

inline std::vector<std::unique_ptr<Fabric>> ConnectMembers(FabricOptions options) {
  MapRendezvous rendezvous;
  std::vector<std::unique_ptr<Fabric>> members(options.size);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < options.size; ++rank) {
    threads.emplace_back([&, rank] {
      FabricOptions own = options;
      own.rank = rank;
      auto made = ConnectGlooFabric(own, &rendezvous);
      EXPECT_TRUE(made.ok()) << made.status();
      if (made.ok()) members[rank] = *std::move(made);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& member : members) {
    if (member == nullptr) members.clear();
    if (members.empty()) break;
  }
  return members;
}

// Runs `body(rank)` on a thread for each member.
template <typename Body>
void OnAll(size_t members, Body body) {
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < members; ++rank) threads.emplace_back([=] { body(rank); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace zerod::fabric
