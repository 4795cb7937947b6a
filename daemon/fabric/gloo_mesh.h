// SPDX-License-Identifier: Apache-2.0
//
// Gloo's TCP transport, made pollable. Gloo's own waits block a thread for each buffer, and end
// the whole context on a timeout; here one thread looks after everything instead. Three of
// Gloo's classes are derived from, along the seams that its TLS transport uses:
//   PolledBuffer  tells without waiting whether its transfer is complete;
//   MeshPair      reports completions, keeps the time of the last byte, and turns an exception
//                 in Gloo's loop thread (which nobody would catch) into an error of this mesh;
//   MeshContext   makes MeshPairs.
// Everything of Gloo is confined to this file and gloo_mesh.cc.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include <gloo/transport/tcp/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/tcp/pair.h>
#include <gloo/transport/tcp/unbound_buffer.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/fabric/fabric.h"

namespace zerod::fabric {

using SteadyTime = std::chrono::steady_clock::time_point;

// Called by Gloo's loop thread with a pair's lock held or not: must not block, nor call Gloo.
class MeshObserver {
 public:
  virtual ~MeshObserver() = default;
  virtual void OnProgress() = 0;
};

// One segment in flight, either a send or a receive. Once destroyed, its memory is not touched:
// the destructor waits for a loop thread that is just reading or writing it (which never blocks).
class PolledBuffer : public gloo::transport::tcp::UnboundBuffer {
 public:
  using UnboundBuffer::UnboundBuffer;
  bool complete();
};

class MeshPair : public gloo::transport::tcp::Pair {
 public:
  MeshPair(gloo::transport::tcp::Context* context, gloo::transport::tcp::Device* device, int peer,
           std::chrono::milliseconds timeout, MeshObserver* observer);
  ~MeshPair() override;

  bool connected();
  // True from the moment on that nothing more comes from this peer. Read it before the buffers:
  // what completed earlier is then seen complete.
  bool closed() const { return closed_.load(std::memory_order_acquire); }
  // Why it is closed, in words. REQUIRES: closed().
  std::string reason();
  // When a byte last came from the peer, or the kernel last took a byte of payload for it.
  SteadyTime last_byte() const {
    return SteadyTime(SteadyTime::duration(last_byte_.load(std::memory_order_relaxed)));
  }

  void handleEvents(int events) override;

 protected:
  bool read() override;
  bool write(gloo::transport::tcp::Op& op) override;
  void changeState(state next) noexcept override;

 private:
  void Touch();

  MeshObserver* const observer_;
  std::mutex in_handler_;  // held by the loop thread in handleEvents; taken before m_
  std::atomic<SteadyTime::rep> last_byte_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> dirty_{false};  // something completed that the observer was not told of
  std::string protocol_error_;      // guarded by the pair's m_
};

class MeshContext : public gloo::transport::tcp::Context {
 public:
  MeshContext(std::shared_ptr<gloo::transport::tcp::Device> device, const FabricOptions& options,
              MeshObserver* observer)
      : Context(std::move(device), static_cast<int>(options.rank),
                static_cast<int>(options.size)),
        observer_(observer) {}
  std::unique_ptr<gloo::transport::Pair>& createPair(int peer) override;

 private:
  MeshObserver* const observer_;
};

// The connected pairs of one member. Used by one thread.
class Mesh {
 public:
  // Blocks until all members have come, at most options.connect_timeout. `observer` outlives it.
  static absl::StatusOr<std::unique_ptr<Mesh>> Connect(const FabricOptions& options,
                                                       Rendezvous* rendezvous,
                                                       MeshObserver* observer);
  explicit Mesh(std::shared_ptr<MeshContext> context) : context_(std::move(context)) {}
  // Closes softly: what the kernel has taken for a peer still reaches it.
  // REQUIRES: no PolledBuffer of this mesh exists.
  ~Mesh();

  MeshPair& pair(uint32_t peer);
  // Starts a transfer. UNAVAILABLE where the peer is gone.
  absl::StatusOr<std::unique_ptr<PolledBuffer>> Post(uint32_t peer, bool send, uint64_t slot,
                                                     char* data, size_t bytes);
  // Resets all connections, waiting for no peer: each sees it at once.
  void CloseHard();

 private:
  absl::Status ConnectPairs(const FabricOptions& options, Rendezvous* rendezvous,
                            SteadyTime deadline);

  std::shared_ptr<MeshContext> context_;
};

}  // namespace zerod::fabric
