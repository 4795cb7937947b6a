// SPDX-License-Identifier: Apache-2.0
//
// The daemon's side of one client in this process, over real shared files: what it answers is the
// test's to say.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "client/cpp/attachment.h"
#include "proto/shm/fd_passing.h"
#include "proto/shm/ring.h"

namespace zerod::client {

// The units of FakeDaemon::MakePlan().
enum : uint32_t { kRoot, kA, kB, kFrozen };

class FakeDaemon {
 public:
  struct Reply {
    bool answer = true;  // false: no completion, now or later
    int32_t code = 0;
    std::string text;
    uint64_t result = 0;
  };
  using Handler = std::function<Reply(const shm::SubmitEntry&)>;

  // A layout of four units: "root" (resident), "layers.a", "layers.b", "frozen"; under node_sum
  // with staging for two slots of the largest.
  static AttachPlan MakePlan(bool node_sum);
  static AttachPlan MakePlan() { return MakePlan(false); }

  FakeDaemon() : FakeDaemon(MakePlan()) {}
  explicit FakeDaemon(AttachPlan plan);
  ~FakeDaemon();

  // The client of this daemon. Call once.
  // Waits are told of when they last as long as kWaitSlice.
  std::unique_ptr<Client> Attach(std::function<bool()> interrupt = nullptr,
                                 std::function<void(const std::string&)> on_wait = nullptr);

  // Called on the daemon's thread for each request. The default answers everything with OK, and a
  // GATHER after Publish()ing the unit at the version asked for.
  void SetHandler(Handler handler);
  Reply Default(const shm::SubmitEntry& entry);

  // Puts the unit at window chunks [chunk, ...), with a new epoch where they differ from the
  // present ones, filled with float `value`, valid at `version`.
  void Publish(uint32_t unit, uint32_t version, uint32_t chunk, float value);
  // The same in scattered chunks: one per chunk of the unit.
  void PublishAt(uint32_t unit, uint32_t version, const std::vector<uint32_t>& chunks,
                 float value);
  void SetState(uint32_t unit, shm::CopyState state);

  void Fail(absl::StatusCode code, const std::string& text);
  void HangUp();  // as the daemon's death would
  // Completes a request that was left unanswered.
  void Complete(uint64_t cookie, uint64_t result = 0);

  // What the handler did for requests that are answered has happened. (Answers come through shared
  // memory, which thread sanitizers cannot follow from one mapping to the other.)
  void Sync() { std::lock_guard<std::mutex> lock(mu_); }

  // All requests so far, oldest first. WaitForRequests returns once there are `count`.
  std::vector<shm::SubmitEntry> requests();
  void WaitForRequests(size_t count);

  uint32_t hold(uint32_t unit) const;
  std::vector<uint32_t> trace() const;
  uint8_t touched(uint32_t index) const;
  const float* gradient(uint64_t byte_offset) const;
  const uint8_t* gradient_bytes(uint64_t byte_offset) const;
  std::byte* transfer() const { return files_[3].data; }
  const shm::SubmitPage* submit() const;
  shm::CompletePage* complete() const;
  const AttachPlan& plan() const { return plan_; }

 private:
  struct File {
    shm::UniqueFd fd;
    std::byte* data = nullptr;
    uint64_t bytes = 0;
  };
  void Run();
  std::atomic<uint64_t>* word(uint32_t unit) const;
  uint32_t* chunk_table() const;

  const AttachPlan plan_;
  File files_[shm::kClientFiles];
  shm::UniqueFd doorbell_;
  shm::UniqueFd socket_;        // ours
  shm::UniqueFd client_socket_;
  shm::UniqueFd stop_;
  std::mutex mu_;
  std::condition_variable received_;
  std::unique_ptr<shm::ServeRing> ring_;  // mu_
  Handler handler_;                       // mu_
  std::vector<shm::SubmitEntry> requests_;  // mu_
  std::vector<uint32_t> next_chunk_;
  std::thread thread_;
};

// A gradient of equal elements.
absl::Status Land(Client& client, uint32_t parameter, float value);

}  // namespace zerod::client
