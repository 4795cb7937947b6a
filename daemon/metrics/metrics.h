// SPDX-License-Identifier: Apache-2.0
//
// What Prometheus reads. One object for the process; each job takes a JobMetrics and gives it
// back when it ends, which removes its series. Names, units and meanings: docs/metrics.md.
// Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace prometheus {
class Registry;
}

namespace zerod::metrics {

// Closed sets, so that the number of series is bounded.
enum class Latency { kGather, kScatter, kStep, kApply, kReduce, kPut, kRead };
enum class Traffic {
  kGatheredToWindow,     // bytes of copies that arrived in the window (any way)
  kScatteredFromClient,  // bytes of gradients that clients handed over
  kSentToMembers,
  kReceivedFromMembers,
  kCopiedToTransfer,     // READ
  kCopiedFromTransfer,   // PUT
  kSetAside,             // of gradients that left their clients' staging before their turn
};

// The series of one job.
class JobMetrics {
 public:
  virtual ~JobMetrics() = default;  // removes the job's series
  virtual void Observe(Latency what, double seconds) = 0;
  virtual void Add(Traffic what, uint64_t bytes) = 0;
  virtual void SetMemory(const std::string& kind, uint64_t bytes) = 0;  // kinds of core::MemoryPlan
  virtual void SetClients(uint32_t attached) = 0;
  virtual void SetStep(uint64_t committed, uint64_t applied, uint64_t generation) = 0;
  // `what`: "gather", "step", "scalar".
  virtual void SetWaiting(const std::string& what, uint64_t requests) = 0;
  virtual void CountWindowGrowth(uint64_t bytes) = 0;
  virtual void CountClientDeath() = 0;
};

class Metrics {
 public:
  // `listen`: "host:port" of the HTTP endpoint, port 0 = any free one, empty = none.
  static absl::StatusOr<std::unique_ptr<Metrics>> Create(const std::string& listen);
  virtual ~Metrics() = default;
  // The bound address, empty where there is no endpoint.
  virtual std::string address() const = 0;
  virtual std::unique_ptr<JobMetrics> ForJob(const std::string& job) = 0;
  // Text in the exposition format, as the endpoint serves it.
  virtual std::string Text() const = 0;
};

}  // namespace zerod::metrics
