// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/cluster.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/check.h"

namespace zerod::engine::testing {

class FakeJobMetrics : public metrics::JobMetrics {
 public:
  explicit FakeJobMetrics(FakeMetrics* all) : all_(all) {}
  void Observe(metrics::Latency what, double) override {
    const std::lock_guard<std::mutex> lock(all_->mu_);
    ++all_->observed_[what];
  }
  void Add(metrics::Traffic what, uint64_t bytes) override {
    const std::lock_guard<std::mutex> lock(all_->mu_);
    all_->traffic_[what] += bytes;
  }
  void SetMemory(const std::string& kind, uint64_t bytes) override {
    const std::lock_guard<std::mutex> lock(all_->mu_);
    all_->memory_[kind] = bytes;
  }
  void SetClients(uint32_t) override {}
  void SetStep(uint64_t committed, uint64_t, uint64_t) override {
    const std::lock_guard<std::mutex> lock(all_->mu_);
    all_->committed_ = committed;
  }
  void SetWaiting(const std::string&, uint64_t) override {}
  void CountWindowGrowth(uint64_t) override {}
  void CountClientDeath() override {
    const std::lock_guard<std::mutex> lock(all_->mu_);
    ++all_->deaths_;
  }

 private:
  FakeMetrics* const all_;
};

std::unique_ptr<metrics::JobMetrics> FakeMetrics::ForJob(const std::string&) {
  return std::make_unique<FakeJobMetrics>(this);
}
uint64_t FakeMetrics::observed(metrics::Latency what) const {
  const std::lock_guard<std::mutex> lock(mu_);
  const auto it = observed_.find(what);
  return it == observed_.end() ? 0 : it->second;
}
uint64_t FakeMetrics::traffic(metrics::Traffic what) const {
  const std::lock_guard<std::mutex> lock(mu_);
  const auto it = traffic_.find(what);
  return it == traffic_.end() ? 0 : it->second;
}
uint64_t FakeMetrics::memory(const std::string& kind) const {
  const std::lock_guard<std::mutex> lock(mu_);
  const auto it = memory_.find(kind);
  return it == memory_.end() ? 0 : it->second;
}
uint64_t FakeMetrics::deaths() const {
  const std::lock_guard<std::mutex> lock(mu_);
  return deaths_;
}
uint64_t FakeMetrics::committed() const {
  const std::lock_guard<std::mutex> lock(mu_);
  return committed_;
}

Sleeper::Sleeper() {
  pid_ = fork();
  CHECK(pid_ >= 0);
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
  }
  pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  CHECK(pidfd_ >= 0);
}

void Sleeper::Kill() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  close(pidfd_);
  pid_ = pidfd_ = -1;
}

namespace {

class FixedMemory : public arena::MemorySource {
 public:
  explicit FixedMemory(uint64_t bytes) : bytes_(bytes) {}
  absl::StatusOr<arena::Available> Read() override {
    return arena::Available{bytes_, "the test's limit"};
  }

 private:
  const uint64_t bytes_;
};

}  // namespace

class Cluster::Sender : public PeerSender {
 public:
  Sender(Cluster* cluster, uint32_t self) : cluster_(cluster), self_(self) {}
  void Send(core::MemberIndex to, core::Message message) override {
    const std::lock_guard<std::mutex> lock(cluster_->mu_);
    if (cluster_->reachable_[to] != nullptr) {
      cluster_->reachable_[to]->PeerMessage(self_, std::move(message));
    }
  }
  fabric::Rendezvous* rendezvous() override { return &cluster_->rendezvous_; }

 private:
  Cluster* const cluster_;
  const uint32_t self_;
};

Cluster::Cluster(ClusterOptions options) : options_(std::move(options)) {
  absl::StatusOr<Config> config = Config::Parse(options_.config, world());
  CHECK(config.ok()) << config.status().ToString();
  absl::StatusOr<core::Layout> layout = core::Layout::Build(options_.model, config->zerod.units);
  CHECK(layout.ok()) << layout.status().ToString();
  layout_ = std::make_shared<const core::Layout>(*std::move(layout));
  {
    const std::lock_guard<std::mutex> lock(mu_);
    reachable_.resize(options_.members);
    ended_.resize(options_.members);
  }
  // Member 0 last: the others' first messages then wait in nobody's queue, so connect it first.
  for (uint32_t m = 0; m < options_.members; ++m) {
    arenas_.push_back(std::make_unique<arena::Arena>(
        std::make_unique<FixedMemory>(options_.available_bytes), 0));
    metrics_.push_back(std::make_unique<FakeMetrics>());
    senders_.push_back(std::make_unique<Sender>(this, m));
    JobRequest request;
    request.id = "job";
    request.config = *config;
    request.layout = layout_;
    request.world = world();
    request.members = options_.members;
    request.self = m;
    request.local_world = options_.local_world;
    request.worker_threads = options_.worker_threads;
    absl::StatusOr<std::unique_ptr<JobRunner>> runner =
        JobRunner::Create(request, arenas_[m].get(), senders_[m].get(), metrics_[m].get(),
                          [this, m](absl::Status status) {
                            const std::lock_guard<std::mutex> lock(mu_);
                            CHECK(!ended_[m].has_value()) << "ended twice";
                            ended_[m] = std::move(status);
                            changed_.notify_all();
                          });
    CHECK(runner.ok()) << runner.status().ToString();
    runners_.push_back(*std::move(runner));
    const std::lock_guard<std::mutex> lock(mu_);
    reachable_[m] = runners_[m].get();
  }
}

Cluster::~Cluster() {
  {
    const std::lock_guard<std::mutex> lock(mu_);
    for (JobRunner*& runner : reachable_) runner = nullptr;
  }
  rendezvous_.Close();
  runners_.clear();
  for (const auto& arena : arenas_) CHECK_EQ(arena->reserved_bytes(), 0u);
}

absl::StatusOr<Attachment> Cluster::Attach(uint32_t rank, const Sleeper* process) {
  ClientInfo info;
  info.rank = rank;
  info.local_rank = rank % options_.local_world;
  info.pid = process != nullptr ? process->pid() : getpid();
  const int own =
      process != nullptr ? -1 : static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0));
  info.pidfd = process != nullptr ? process->pidfd() : own;
  absl::StatusOr<Attachment> attachment = runners_[rank / options_.local_world]->Attach(info);
  if (own >= 0) close(own);
  return attachment;
}

std::unique_ptr<FakeClient> Cluster::Client(uint32_t rank, const Attachment& attachment) {
  return std::make_unique<FakeClient>(attachment, layout_.get(),
                                      &runners_[rank / options_.local_world]->plan());
}

void Cluster::RunClients(const std::function<void(uint32_t, FakeClient&)>& body) {
  std::vector<std::unique_ptr<FakeClient>> clients;
  for (uint32_t rank = 0; rank < world(); ++rank) {
    absl::StatusOr<Attachment> attachment = Attach(rank);
    CHECK(attachment.ok()) << attachment.status().ToString();
    clients.push_back(Client(rank, *attachment));
  }
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < world(); ++rank) {
    threads.emplace_back([&, rank] { body(rank, *clients[rank]); });
  }
  for (std::thread& thread : threads) thread.join();
}

absl::Status Cluster::WaitForEnd(uint32_t member) {
  std::unique_lock<std::mutex> lock(mu_);
  if (!changed_.wait_for(lock, std::chrono::minutes(1),
                         [&] { return ended_[member].has_value(); })) {
    return absl::UnknownError("the job has not ended");
  }
  return *ended_[member];
}

core::ModelDescription SmallModel(core::DType dtype, int blocks, int64_t width) {
  core::ModelDescription model;
  model.dtype = dtype;
  const auto parameter = [&](const std::string& module, const std::string& name,
                             std::vector<int64_t> shape, uint32_t group, bool trainable) {
    core::ParameterDescription p;
    p.name = absl::StrCat(module, ".", name);
    p.shape = std::move(shape);
    p.group = group;
    p.trainable = trainable;
    p.modules = {module};
    model.parameters.push_back(std::move(p));
  };
  model.modules.push_back({"", "Model", false});
  model.modules.push_back({"embed", "Embedding", false});
  parameter("embed", "weight", {width * 3, width}, 0, true);
  model.modules.push_back({"h", "ModuleList", true});
  for (int i = 0; i < blocks; ++i) {
    const std::string path = absl::StrCat("h.", i);
    model.modules.push_back({path, "Block", false});
    parameter(path, "weight", {width, width + 5}, 0, true);
    parameter(path, "table", {17}, 0, false);
    parameter(path, "bias", {width - 1}, 1, true);
  }
  model.modules.push_back({"head", "Linear", false});
  parameter("head", "weight", {7, width}, 0, true);
  return model;
}

std::string ConfigText(uint32_t stage, core::DType dtype, const std::string& zero_keys,
                       const std::string& zerod_keys) {
  return absl::StrCat(
      "{\"train_micro_batch_size_per_gpu\": 1, \"gradient_clipping\": 0.0, ",
      "\"bf16\": {\"enabled\": ", dtype == core::DType::kBFloat16 ? "true" : "false",
      "}, \"fp16\": {\"enabled\": ", dtype == core::DType::kFloat16 ? "true" : "false",
      ", \"initial_scale_power\": 0}, \"zero_optimization\": {\"stage\": ", stage,
      zero_keys.empty() ? "" : ", ", zero_keys, "}, \"zerod\": {", zerod_keys, "}}");
}

}  // namespace zerod::engine::testing
