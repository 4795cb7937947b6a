// SPDX-License-Identifier: Apache-2.0
//
// The data plane between the members of one job. Whatever moves parameters and gradients is an
// Exchange: point-to-point transfers that belong together under one tag. An all-gather is "my
// shard to those who want it, theirs into my window"; a reduce-scatter is "each owner gets its
// slice", summed by the owner. The daemon's log gives every Exchange its tag, the same on all
// members, so transfers meet by tag and no order of arrival matters.
//
// Failures. After any failure the fabric is dead: every Exchange, in flight or later, ends with
// an error (sticky), and no buffer handed in is touched after its `done` was called. A dead
// fabric is destroyed, never repaired; the job decides what comes next.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace zerod::fabric {

// One piece of memory to send to, or receive from, `peer`. The caller owns the memory and leaves
// it alone until `done`. bytes == 0 is allowed and moves nothing.
struct Transfer {
  uint32_t peer = 0;
  void* data = nullptr;  // a send only reads it
  size_t bytes = 0;
};

struct Counters {
  uint64_t bytes_sent = 0;      // payload to other members; copies to oneself are not counted
  uint64_t bytes_received = 0;
  uint64_t exchanges = 0;       // completed
  uint64_t failures = 0;        // ended with an error
};

class Fabric {
 public:
  using Done = std::function<void(absl::Status)>;

  // Waits for nothing but its own threads: no peer can delay it. Every `done` has been called
  // when it returns.
  virtual ~Fabric() = default;

  virtual std::string name() const = 0;
  virtual uint32_t rank() const = 0;
  virtual uint32_t size() const = 0;

  // Starts the transfers of `tag` and returns at once. Several transfers between one pair of
  // members in one Exchange meet in the order given. A transfer to oneself is a copy: a send and a
  // receive with peer == rank(), of equal size. `done` is called exactly once, from a fabric
  // thread, when all have completed or one failed; it must not block.
  // Thread-safe. Tags are unique for the life of the fabric and equal on all members;
  // tags < 2^63 belong to the callers.
  // Errors (through `done`): UNAVAILABLE a peer is gone; DEADLINE_EXCEEDED a peer that is waited
  // for moved no byte at all for `stall_timeout`, or none of this Exchange for ten of them; the
  // reason given to Abort(); INVALID_ARGUMENT a peer >= size(), a tag in flight already;
  // RESOURCE_EXHAUSTED more than 16384 in flight.
  virtual void Exchange(uint64_t tag, std::vector<Transfer> sends, std::vector<Transfer> receives,
                        Done done) = 0;

  // Ends everything in flight with `reason`, from any thread, without waiting for a peer.
  virtual void Abort(absl::Status reason) = 0;

  // Thread-safe.
  virtual Counters counters() const = 0;
};

// How members find each other's transport addresses: a map that every member can write and read,
// empty for each new fabric. Thread-safe.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual absl::Status Set(const std::string& key, const std::string& value) = 0;
  // Waits until `key` is set, at most `timeout`: DEADLINE_EXCEEDED then, UNAVAILABLE where the
  // holder of the map is gone.
  virtual absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) = 0;
};

// Ends a ConnectGlooFabric that waits for a peer. Thread-safe.
class ConnectCancel {
 public:
  void Cancel() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
    }
    changed_.notify_all();
  }
  bool cancelled() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return cancelled_;
  }

 private:
  friend class ConnectDeadline;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool cancelled_ = false;  // guarded by mutex_
};

struct FabricOptions {
  uint32_t rank = 0;
  uint32_t size = 1;
  std::string bind_host = "127.0.0.1";  // the local address that the transport listens on
  absl::Duration connect_timeout = absl::Seconds(30);
  std::shared_ptr<ConnectCancel> connect_cancel;  // or null; the rendezvous has its own end
  // The silence of a peer in the middle of a transfer that ends the fabric.
  absl::Duration stall_timeout = absl::Seconds(30);
  size_t segment_bytes = 4 << 20;       // transfers are cut into pieces of this size
};

// One member: size must be 1.
std::unique_ptr<Fabric> MakeLoopbackFabric();

// Connects the members over TCP through Gloo; blocks until all have come or connect_timeout.
// One member alone gets the loopback fabric. Nothing is encrypted or authenticated: the network
// that bind_host belongs to must be a trusted one.
// Errors: DEADLINE_EXCEEDED names the members that did not come; CANCELLED by connect_cancel;
// FAILED_PRECONDITION members
// differ in size or segment_bytes; INVALID_ARGUMENT options; UNAVAILABLE a member or the
// rendezvous is gone.
absl::StatusOr<std::unique_ptr<Fabric>> ConnectGlooFabric(const FabricOptions& options,
                                                          Rendezvous* rendezvous);

}  // namespace zerod::fabric
