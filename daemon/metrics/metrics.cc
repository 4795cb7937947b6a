// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/metrics.h"

#include <array>
#include <exception>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "daemon/metrics/process.h"
#include "prometheus/counter.h"
#include "prometheus/exposer.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace zerod::metrics {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Registry;

struct Described {
  const char* name;
  const char* help;
};

constexpr size_t kLatencies = 7;
constexpr Described kLatency[kLatencies] = {
    {"zerod_gather_seconds", "From a client's GATHER request to its completion."},
    {"zerod_scatter_seconds", "From a client's SCATTER request to its completion (node_sum)."},
    {"zerod_step_seconds", "From the last local client's STEP to the step's completion."},
    {"zerod_apply_seconds", "One unit's optimizer pass."},
    {"zerod_reduce_seconds", "One unit's reduction between the members."},
    {"zerod_put_seconds", "From a client's PUT request to its completion."},
    {"zerod_read_seconds", "From a client's READ request to its completion."},
};

constexpr size_t kTraffics = 7;
constexpr Described kTraffic[kTraffics] = {
    {"zerod_gathered_bytes_total", "Bytes of parameter copies that arrived in the window."},
    {"zerod_scattered_bytes_total", "Bytes of gradients that clients handed over."},
    {"zerod_sent_bytes_total", "Payload bytes sent to other members."},
    {"zerod_received_bytes_total", "Payload bytes received from other members."},
    {"zerod_read_bytes_total", "Bytes copied to clients' transfer areas by READ."},
    {"zerod_put_bytes_total", "Bytes copied from clients' transfer areas by PUT."},
    {"zerod_set_aside_bytes_total",
     "Bytes of gradients that left their client's staging before their turn."},
};

// The kinds of core::MemoryPlan, and a last one for what is not among them: a closed set.
constexpr std::array<const char*, 12> kMemoryKinds = {
    "parameters",  "copies",           "gradients", "moments",   "window", "accumulator",
    "client_gradients", "staging", "scratch", "set_aside", "control", "other"};
constexpr std::array<const char*, 4> kWaitKinds = {"gather", "step", "scalar", "other"};

template <size_t kSize>
size_t IndexOf(const std::array<const char*, kSize>& kinds, const std::string& kind) {
  for (size_t i = 0; i + 1 < kSize; ++i) {
    if (kind == kinds[i]) return i;
  }
  return kSize - 1;
}

// 10 us to 60 s, three to a decade.
const Histogram::BucketBoundaries& LatencyBuckets() {
  static const Histogram::BucketBoundaries buckets = {
      1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2,
      5e-2, 0.1,    0.25, 0.5,  1,      2.5,  5,    10,     25,   60};
  return buckets;
}

// The families, each registered once for the life of the process.
struct Families {
  explicit Families(Registry* registry)
      : memory(MakeGauge(registry, "zerod_memory_bytes", "Memory reserved for the job, by kind.")),
        waiting(MakeGauge(registry, "zerod_waiting_requests",
                          "Requests of clients that are not yet answered, by what they ask.")),
        clients(MakeGauge(registry, "zerod_clients", "Clients attached on this node.")),
        committed(MakeGauge(registry, "zerod_committed_step", "The last committed step.")),
        applied(MakeGauge(registry, "zerod_applied_steps",
                          "Committed steps that changed the weights.")),
        generation(MakeGauge(registry, "zerod_generation", "The job's generation.")),
        growths(MakeCounter(registry, "zerod_window_growths_total",
                            "Times that held units left no room and the window grew.")),
        growth_bytes(MakeCounter(registry, "zerod_window_growth_bytes_total",
                                 "Bytes by which the window grew.")),
        deaths(MakeCounter(registry, "zerod_client_deaths_total",
                           "Clients that died, or broke the rules of their ring.")),
        jobs(&MakeGauge(registry, "zerod_jobs", "Jobs on this node.")->Add({})) {
    for (size_t i = 0; i < kLatencies; ++i) {
      latency[i] = &prometheus::BuildHistogram()
                        .Name(kLatency[i].name)
                        .Help(kLatency[i].help)
                        .Register(*registry);
    }
    for (size_t i = 0; i < kTraffics; ++i) {
      traffic[i] = MakeCounter(registry, kTraffic[i].name, kTraffic[i].help);
    }
    prometheus::BuildGauge()
        .Name("zerod_build_info")
        .Help("Always 1; the label says which version runs.")
        .Register(*registry)
        .Add({{"version", ZEROD_VERSION}})
        .Set(1);
  }

  static Family<Gauge>* MakeGauge(Registry* registry, const char* name, const char* help) {
    return &prometheus::BuildGauge().Name(name).Help(help).Register(*registry);
  }
  static Family<Counter>* MakeCounter(Registry* registry, const char* name, const char* help) {
    return &prometheus::BuildCounter().Name(name).Help(help).Register(*registry);
  }

  std::array<Family<Histogram>*, kLatencies> latency;
  std::array<Family<Counter>*, kTraffics> traffic;
  Family<Gauge>* memory;
  Family<Gauge>* waiting;
  Family<Gauge>* clients;
  Family<Gauge>* committed;
  Family<Gauge>* applied;
  Family<Gauge>* generation;
  Family<Counter>* growths;
  Family<Counter>* growth_bytes;
  Family<Counter>* deaths;
  Gauge* jobs;
};

// One job's series: there from the job's first moment, so that a rate() sees the first event.
class JobSeries {
 public:
  JobSeries(Families* families, const std::string& job) : families_(families) {
    const prometheus::Labels labels = {{"job", job}};
    for (size_t i = 0; i < kLatencies; ++i) {
      latency[i] = &families->latency[i]->Add(labels, LatencyBuckets());
    }
    for (size_t i = 0; i < kTraffics; ++i) traffic[i] = &families->traffic[i]->Add(labels);
    for (size_t i = 0; i < kMemoryKinds.size(); ++i) {
      memory[i] = &families->memory->Add({{"job", job}, {"kind", kMemoryKinds[i]}});
    }
    for (size_t i = 0; i < kWaitKinds.size(); ++i) {
      waiting[i] = &families->waiting->Add({{"job", job}, {"what", kWaitKinds[i]}});
    }
    clients = &families->clients->Add(labels);
    committed = &families->committed->Add(labels);
    applied = &families->applied->Add(labels);
    generation = &families->generation->Add(labels);
    growths = &families->growths->Add(labels);
    growth_bytes = &families->growth_bytes->Add(labels);
    deaths = &families->deaths->Add(labels);
    families->jobs->Increment();
  }
  ~JobSeries() {
    for (size_t i = 0; i < kLatencies; ++i) families_->latency[i]->Remove(latency[i]);
    for (size_t i = 0; i < kTraffics; ++i) families_->traffic[i]->Remove(traffic[i]);
    for (Gauge* g : memory) families_->memory->Remove(g);
    for (Gauge* g : waiting) families_->waiting->Remove(g);
    families_->clients->Remove(clients);
    families_->committed->Remove(committed);
    families_->applied->Remove(applied);
    families_->generation->Remove(generation);
    families_->growths->Remove(growths);
    families_->growth_bytes->Remove(growth_bytes);
    families_->deaths->Remove(deaths);
    families_->jobs->Decrement();
  }
  JobSeries(const JobSeries&) = delete;
  JobSeries& operator=(const JobSeries&) = delete;

  std::array<Histogram*, kLatencies> latency;
  std::array<Counter*, kTraffics> traffic;
  std::array<Gauge*, kMemoryKinds.size()> memory;
  std::array<Gauge*, kWaitKinds.size()> waiting;
  Gauge* clients;
  Gauge* committed;
  Gauge* applied;
  Gauge* generation;
  Counter* growths;
  Counter* growth_bytes;
  Counter* deaths;

 private:
  Families* const families_;
};

// All series, kept alive by whoever still counts into them.
class Series {
 public:
  Series()
      : registry_(std::make_shared<Registry>()),
        process_(std::make_shared<ProcessCollectable>()),
        families_(registry_.get()) {}

  // A job of the same id may start before its predecessor is quite gone: they share the series,
  // which go with the last of them.
  JobSeries* Acquire(const std::string& job) {
    std::lock_guard lock(mu_);
    Shared& shared = jobs_[job];
    if (shared.users++ == 0) shared.series = std::make_unique<JobSeries>(&families_, job);
    return shared.series.get();
  }
  void Release(const std::string& job) {
    std::lock_guard lock(mu_);
    const auto it = jobs_.find(job);
    if (--it->second.users == 0) jobs_.erase(it);
  }

  const std::shared_ptr<Registry>& registry() const { return registry_; }
  const std::shared_ptr<ProcessCollectable>& process() const { return process_; }

 private:
  struct Shared {
    std::unique_ptr<JobSeries> series;
    uint32_t users = 0;
  };
  const std::shared_ptr<Registry> registry_;  // owns the families
  const std::shared_ptr<ProcessCollectable> process_;
  Families families_;
  std::mutex mu_;
  std::map<std::string, Shared> jobs_;  // guarded by mu_
};

class JobMetricsImpl : public JobMetrics {
 public:
  JobMetricsImpl(std::shared_ptr<Series> all, const std::string& job)
      : all_(std::move(all)), job_(job), series_(all_->Acquire(job)) {}
  ~JobMetricsImpl() override { all_->Release(job_); }

  void Observe(Latency what, double seconds) override {
    series_->latency[static_cast<size_t>(what)]->Observe(seconds);
  }
  void Add(Traffic what, uint64_t bytes) override {
    series_->traffic[static_cast<size_t>(what)]->Increment(static_cast<double>(bytes));
  }
  void SetMemory(const std::string& kind, uint64_t bytes) override {
    series_->memory[IndexOf(kMemoryKinds, kind)]->Set(static_cast<double>(bytes));
  }
  void SetClients(uint32_t attached) override { series_->clients->Set(attached); }
  void SetStep(uint64_t committed, uint64_t applied, uint64_t generation) override {
    series_->committed->Set(static_cast<double>(committed));
    series_->applied->Set(static_cast<double>(applied));
    series_->generation->Set(static_cast<double>(generation));
  }
  void SetWaiting(const std::string& what, uint64_t requests) override {
    series_->waiting[IndexOf(kWaitKinds, what)]->Set(static_cast<double>(requests));
  }
  void CountWindowGrowth(uint64_t bytes) override {
    series_->growths->Increment();
    series_->growth_bytes->Increment(static_cast<double>(bytes));
  }
  void CountClientDeath() override { series_->deaths->Increment(); }

 private:
  const std::shared_ptr<Series> all_;
  const std::string job_;
  JobSeries* const series_;
};

class MetricsImpl : public Metrics {
 public:
  absl::Status Listen(const std::string& listen) {
    const size_t colon = listen.rfind(':');
    uint32_t port = 0;
    if (colon == std::string::npos || colon == 0 ||
        !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port > 65535) {
      return absl::InvalidArgumentError(
          absl::StrCat("the address of the metrics endpoint is \"", listen,
                       "\"; it must be HOST:PORT, such as 127.0.0.1:9470 (port 0: any free one)"));
    }
    try {
      exposer_ = std::make_unique<prometheus::Exposer>(listen, /*num_threads=*/2);
    } catch (const std::exception& error) {
      return absl::UnavailableError(
          absl::StrCat("cannot serve metrics at ", listen, " (", error.what(),
                       "): is the port taken? Choose another, or none with an empty address"));
    }
    exposer_->RegisterCollectable(series_->registry());
    exposer_->RegisterCollectable(series_->process());
    const std::vector<int> ports = exposer_->GetListeningPorts();
    const int bound = ports.empty() ? static_cast<int>(port) : ports[0];
    address_ = absl::StrCat(listen.substr(0, colon), ":", bound);
    return absl::OkStatus();
  }

  std::string address() const override { return address_; }

  std::unique_ptr<JobMetrics> ForJob(const std::string& job) override {
    return std::make_unique<JobMetricsImpl>(series_, job);
  }

  std::string Text() const override {
    std::vector<prometheus::MetricFamily> families = series_->registry()->Collect();
    for (prometheus::MetricFamily& family : series_->process()->Collect()) {
      families.push_back(std::move(family));
    }
    return prometheus::TextSerializer().Serialize(families);
  }

 private:
  const std::shared_ptr<Series> series_ = std::make_shared<Series>();
  std::unique_ptr<prometheus::Exposer> exposer_;
  std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Metrics>> Metrics::Create(const std::string& listen) {
  auto metrics = std::make_unique<MetricsImpl>();
  if (!listen.empty()) {
    absl::Status status = metrics->Listen(listen);
    if (!status.ok()) return status;
  }
  return std::unique_ptr<Metrics>(std::move(metrics));
}

}  // namespace zerod::metrics
