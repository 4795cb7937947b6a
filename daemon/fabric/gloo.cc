// SPDX-License-Identifier: Apache-2.0
//
// The fabric over Gloo's TCP transport. Two threads: Gloo's loop moves bytes; ours (Run) posts
// segments, retires them, watches the silence of peers and calls `done`. Only ours touches the
// mesh and the exchanges in flight, so neither needs a lock, and all lanes of all exchanges
// advance independently: members may start exchanges in any order.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "daemon/fabric/fabric.h"
#include "daemon/fabric/gloo_mesh.h"
#include "daemon/fabric/limits.h"
#include "daemon/fabric/plan.h"
#include "daemon/fabric/threads.h"

namespace zerod::fabric {
namespace {

SteadyTime Now() { return std::chrono::steady_clock::now(); }

class GlooFabric : public Fabric, private MeshObserver {
 public:
  explicit GlooFabric(const FabricOptions& options) : options_(options) {}
  ~GlooFabric() override;

  // Called once, before anything else; nothing was started where it fails.
  absl::Status Start(Rendezvous* rendezvous);

  std::string name() const override { return "gloo"; }
  uint32_t rank() const override { return options_.rank; }
  uint32_t size() const override { return options_.size; }
  void Exchange(uint64_t tag, std::vector<Transfer> sends, std::vector<Transfer> receives,
                Done done) override;
  void Abort(absl::Status reason) override;
  Counters counters() const override;

 private:
  struct Request {
    uint64_t tag;
    absl::StatusOr<Plan> plan;
    Done done;
  };
  struct ActiveLane {
    Lane lane;
    std::deque<std::unique_ptr<PolledBuffer>> segments;  // in flight, oldest first
    SteadyTime last_completion;
  };
  struct ActiveExchange {
    uint64_t tag;
    std::list<ActiveLane> lanes;  // those not yet complete
    std::deque<Copy> copies;
    Done done;
  };
  enum class Ending { kNot, kAborted, kStopping };

  void OnProgress() override;

  // The rest belongs to the thread of Run.
  void Run();
  Ending WaitForWork(std::vector<Request>* fresh);
  absl::Status Admit(Request request);
  absl::Status Advance();
  absl::Status AdvanceLane(uint64_t tag, ActiveLane* active);
  absl::Status PostSegments(uint64_t tag, ActiveLane* active);
  absl::Status CheckSilence(uint64_t tag, const ActiveLane& active, SteadyTime now);
  absl::Status PeerGone(uint64_t tag, const ActiveLane& active, const std::string& why) const;
  void AdvanceCopies(ActiveExchange* exchange);
  void Fail(absl::Status reason);
  void Finish(Done done, const absl::Status& status);

  const FabricOptions options_;

  std::mutex mutex_;
  std::condition_variable wake_;
  bool work_ = false;           // guarded by mutex_
  bool stopping_ = false;       // guarded by mutex_
  absl::Status abort_reason_;   // guarded by mutex_; the first one
  std::vector<Request> inbox_;  // guarded by mutex_

  std::atomic<size_t> in_flight_{0};  // exchanges whose `done` was not called
  std::atomic<uint64_t> bytes_sent_{0};
  std::atomic<uint64_t> bytes_received_{0};
  std::atomic<uint64_t> exchanges_{0};
  std::atomic<uint64_t> failures_{0};

  // Of the thread of Run.
  std::unique_ptr<Mesh> mesh_;  // null when the fabric is dead
  absl::Status failed_;         // why
  std::list<ActiveExchange> active_;
  absl::flat_hash_set<uint64_t> active_tags_;
  SteadyTime next_look_ = SteadyTime::max();  // when Advance has to look again by itself

  std::thread thread_;
};

GlooFabric::~GlooFabric() {
  if (!thread_.joinable()) return;
  CHECK(std::this_thread::get_id() != thread_.get_id()) << "a fabric destroyed by its own `done`";
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    work_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

absl::Status GlooFabric::Start(Rendezvous* rendezvous) {
  ASSIGN_OR_RETURN(mesh_, Mesh::Connect(options_, rendezvous, this));
  BlockSignals inherited;
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

void GlooFabric::Exchange(uint64_t tag, std::vector<Transfer> sends,
                          std::vector<Transfer> receives, Done done) {
  Request request{tag, MakePlan(options_.rank, options_.size, tag, sends, receives),
                  std::move(done)};
  if (in_flight_.fetch_add(1) >= kExchangesInFlightMax) Abort(TooManyExchanges());
  std::lock_guard<std::mutex> lock(mutex_);
  inbox_.push_back(std::move(request));
  work_ = true;
  wake_.notify_one();
}

void GlooFabric::Abort(absl::Status reason) {
  if (reason.ok()) reason = absl::AbortedError("the fabric was aborted");
  std::lock_guard<std::mutex> lock(mutex_);
  if (abort_reason_.ok()) abort_reason_ = std::move(reason);
  work_ = true;
  wake_.notify_one();
}

Counters GlooFabric::counters() const {
  Counters out;
  out.bytes_sent = bytes_sent_;
  out.bytes_received = bytes_received_;
  out.exchanges = exchanges_;
  out.failures = failures_;
  return out;
}

void GlooFabric::OnProgress() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (work_) return;
  work_ = true;
  wake_.notify_one();
}

GlooFabric::Ending GlooFabric::WaitForWork(std::vector<Request>* fresh) {
  std::unique_lock<std::mutex> lock(mutex_);
  // wait_until(max) overflows in some standard libraries.
  if (next_look_ == SteadyTime::max()) {
    wake_.wait(lock, [&] { return work_; });
  } else {
    wake_.wait_until(lock, next_look_, [&] { return work_; });
  }
  work_ = false;
  fresh->swap(inbox_);
  if (stopping_) return Ending::kStopping;
  return abort_reason_.ok() ? Ending::kNot : Ending::kAborted;
}

void GlooFabric::Run() {
  pthread_setname_np(pthread_self(), "zerod-fabric");
  for (;;) {
    std::vector<Request> fresh;
    const Ending ending = WaitForWork(&fresh);
    if (ending == Ending::kAborted) {
      std::unique_lock<std::mutex> lock(mutex_);
      absl::Status reason = abort_reason_;
      lock.unlock();
      Fail(std::move(reason));
    } else if (ending == Ending::kStopping && !(active_.empty() && fresh.empty())) {
      Fail(absl::AbortedError("the fabric was destroyed while the exchange was in flight"));
    }
    for (Request& request : fresh) {
      if (!failed_.ok()) {
        Finish(std::move(request.done), failed_);
        continue;
      }
      const absl::Status status = Admit(std::move(request));
      if (!status.ok()) Fail(status);
    }
    if (ending == Ending::kStopping) {
      mesh_.reset();
      // A `done` may have asked for more; in_flight_ counts what the inbox holds.
      if (in_flight_ == 0) return;
      failed_ = absl::AbortedError("the fabric is being destroyed");
      continue;
    }
    if (!failed_.ok()) continue;
    const absl::Status status = Advance();
    if (!status.ok()) Fail(status);
  }
}

absl::Status GlooFabric::Admit(Request request) {
  ActiveExchange& exchange =
      active_.emplace_back(ActiveExchange{request.tag, {}, {}, std::move(request.done)});
  RETURN_IF_ERROR(request.plan.status());
  if (!active_tags_.insert(request.tag).second) {
    return absl::InvalidArgumentError(
        absl::StrCat("two exchanges with the tag ", request.tag, " are in flight"));
  }
  const SteadyTime now = Now();
  for (Lane& lane : request.plan->lanes) {
    exchange.lanes.push_back(ActiveLane{std::move(lane), {}, now});
    RETURN_IF_ERROR(PostSegments(request.tag, &exchange.lanes.back()));
  }
  exchange.copies.assign(request.plan->copies.begin(), request.plan->copies.end());
  return absl::OkStatus();
}

absl::Status GlooFabric::PostSegments(uint64_t tag, ActiveLane* active) {
  Lane& lane = active->lane;
  while (!lane.exhausted() && active->segments.size() < kLaneSegmentsMax) {
    const Segment segment = lane.Next(options_.segment_bytes);
    absl::StatusOr<std::unique_ptr<PolledBuffer>> posted =
        mesh_->Post(lane.peer(), lane.sends(), segment.slot, segment.data, segment.bytes);
    if (!posted.ok()) return PeerGone(tag, *active, std::string(posted.status().message()));
    active->segments.push_back(*std::move(posted));
  }
  return absl::OkStatus();
}

// One look at everything in flight; sets next_look_.
absl::Status GlooFabric::Advance() {
  next_look_ = SteadyTime::max();
  for (auto each = active_.begin(); each != active_.end();) {
    ActiveExchange& exchange = *each;
    for (ActiveLane& active : exchange.lanes) {
      RETURN_IF_ERROR(AdvanceLane(exchange.tag, &active));
    }
    exchange.lanes.remove_if([](const ActiveLane& active) { return active.segments.empty(); });
    AdvanceCopies(&exchange);
    if (!exchange.lanes.empty() || !exchange.copies.empty()) {
      ++each;
      continue;
    }
    Done done = std::move(exchange.done);
    active_tags_.erase(exchange.tag);
    each = active_.erase(each);
    Finish(std::move(done), absl::OkStatus());
  }
  return absl::OkStatus();
}

absl::Status GlooFabric::AdvanceLane(uint64_t tag, ActiveLane* active) {
  MeshPair& pair = mesh_->pair(active->lane.peer());
  const bool closed = pair.closed();  // before the segments, see closed()
  bool moved = false;
  while (!active->segments.empty() && active->segments.front()->complete()) {
    (active->lane.sends() ? bytes_sent_ : bytes_received_) += active->segments.front()->size;
    active->segments.pop_front();
    moved = true;
  }
  const SteadyTime now = Now();
  if (moved) {
    active->last_completion = now;
    RETURN_IF_ERROR(PostSegments(tag, active));
    // A send may have completed while it was posted; nobody would tell.
    if (!active->segments.empty() && active->segments.front()->complete()) next_look_ = now;
  }
  if (active->segments.empty()) return absl::OkStatus();
  if (closed) return PeerGone(tag, *active, pair.reason());
  return CheckSilence(tag, *active, now);
}

// A peer that sends anything is alive, however slow; one that sends nothing is not waited for.
absl::Status GlooFabric::CheckSilence(uint64_t tag, const ActiveLane& active, SteadyTime now) {
  const auto stall = absl::ToChronoNanoseconds(options_.stall_timeout);
  const uint32_t peer = active.lane.peer();
  const SteadyTime last_sign = std::max(active.last_completion, mesh_->pair(peer).last_byte());
  const SteadyTime deadline = std::min(last_sign + stall,
                                       active.last_completion + kQueueingStallTimeouts * stall);
  if (now >= deadline) {
    return absl::DeadlineExceededError(absl::StrCat(
        "exchange ", tag, ": member ", peer, now >= last_sign + stall
            ? " has been silent for " : " has not taken part for ",
        absl::FormatDuration(absl::FromChrono(now - (now >= last_sign + stall
                                                         ? last_sign : active.last_completion))),
        active.lane.sends() ? " while it was sent to" : " while its data was awaited",
        ": its host is stopped, overloaded or cut off; see its daemon's log"));
  }
  next_look_ = std::min(next_look_, deadline);
  return absl::OkStatus();
}

absl::Status GlooFabric::PeerGone(uint64_t tag, const ActiveLane& active,
                                  const std::string& why) const {
  return absl::UnavailableError(absl::StrCat("exchange ", tag, ": member ", active.lane.peer(),
                                             " is gone (", why, "); see its daemon's log"));
}

void GlooFabric::AdvanceCopies(ActiveExchange* exchange) {
  if (exchange->copies.empty()) return;
  Copy& copy = exchange->copies.front();
  const size_t bytes = std::min(kCopyBytes, copy.bytes);
  std::memmove(copy.to, copy.from, bytes);
  copy.from += bytes;
  copy.to += bytes;
  copy.bytes -= bytes;
  if (copy.bytes == 0) exchange->copies.pop_front();
  if (!exchange->copies.empty()) next_look_ = Now();
}

// The order matters: no `done` before Gloo can touch no buffer any more.
void GlooFabric::Fail(absl::Status reason) {
  if (!failed_.ok()) return;
  failed_ = std::move(reason);
  next_look_ = SteadyTime::max();
  mesh_->CloseHard();
  std::vector<Done> dones;
  for (ActiveExchange& exchange : active_) {
    exchange.lanes.clear();
    dones.push_back(std::move(exchange.done));
  }
  active_.clear();
  active_tags_.clear();
  mesh_.reset();
  for (Done& done : dones) Finish(std::move(done), failed_);
}

void GlooFabric::Finish(Done done, const absl::Status& status) {
  ++(status.ok() ? exchanges_ : failures_);
  done(status);
  in_flight_.fetch_sub(1);
}

absl::Status CheckOptions(const FabricOptions& options, Rendezvous* rendezvous) {
  if (options.size == 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of ", options.size,
                                                   " members: it must be below their number"));
  }
  if (options.segment_bytes == 0) {
    return absl::InvalidArgumentError("segment_bytes must be above 0");
  }
  // Ten stall timeouts must fit into a clock of nanoseconds.
  for (absl::Duration timeout : {options.connect_timeout, options.stall_timeout}) {
    if (timeout < absl::Milliseconds(1) || timeout > absl::Hours(24 * 365)) {
      return absl::InvalidArgumentError(
          absl::StrCat("a fabric timeout of ", absl::FormatDuration(timeout),
                       ": it must lie between one millisecond and one year"));
    }
  }
  if (options.size > 1 && rendezvous == nullptr) {
    return absl::InvalidArgumentError("several members need a rendezvous to find each other");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Fabric>> ConnectGlooFabric(const FabricOptions& options,
                                                          Rendezvous* rendezvous) {
  RETURN_IF_ERROR(CheckOptions(options, rendezvous));
  if (options.size == 1) return MakeLoopbackFabric();
  auto fabric = std::make_unique<GlooFabric>(options);
  RETURN_IF_ERROR(fabric->Start(rendezvous));
  return fabric;
}

}  // namespace zerod::fabric
