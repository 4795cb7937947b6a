// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/job_table.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status.h"
#include "nlohmann/json.hpp"
#include "proto/shm/fd_socket.h"
#include "spdlog/spdlog.h"

namespace zerod::server {
namespace {

constexpr size_t kDifferencesMax = 5;

void CompareConfigs(const Config& there, const Config& here, std::vector<std::string>* out) {
  if (there == here) return;
  const auto a = nlohmann::json::parse(there.ToJson()).flatten();
  const auto b = nlohmann::json::parse(here.ToJson()).flatten();
  const auto say = [](const nlohmann::json& values, const std::string& key) {
    return values.contains(key) ? values.at(key).dump() : std::string("absent");
  };
  auto all = a;
  all.update(b);
  for (const auto& [pointer, unused] : all.items()) {
    const std::string x = say(a, pointer);
    const std::string y = say(b, pointer);
    if (x == y) continue;
    std::string name = pointer.substr(1);
    std::replace(name.begin(), name.end(), '/', '.');
    out->push_back(absl::StrCat(name, " is ", x, " there, ", y, " here"));
  }
}

void CompareLayouts(const core::Layout& there, const core::Layout& here,
                    std::vector<std::string>* out) {
  if (there.hash() == here.hash()) return;
  if (there.dtype() != here.dtype()) {
    out->push_back("the dtype of the gathered parameters differs");
  }
  const auto& a = there.parameters();
  const auto& b = here.parameters();
  if (a.size() != b.size()) {
    out->push_back(absl::StrCat("the model has ", a.size(), " parameters there, ", b.size(),
                                " here"));
  }
  const auto say = [](const core::Parameter& p) {
    return absl::StrCat(p.name, " [", absl::StrJoin(p.shape, ", "), "]",
                        p.trainable ? "" : " frozen", " in group ", p.group);
  };
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const std::string x = say(a[i]);
    const std::string y = say(b[i]);
    if (x == y) continue;
    out->push_back(absl::StrCat("parameter ", i, " is ", x, " there, ", y, " here"));
    return;
  }
  out->push_back(absl::StrCat("the layout's hash is ", there.hash().Hex(), " there, ",
                              here.hash().Hex(), " here (modules are grouped into other units)"));
}

template <typename T>
void CompareNumbers(const char* name, T there, T here, std::vector<std::string>* out) {
  if (there != here) out->push_back(absl::StrCat(name, " is ", there, " there, ", here, " here"));
}

// Descriptors (of what `fd` is) that keep the place of others, so that none is missing when there
// is something to undo.
absl::StatusOr<std::vector<shm::UniqueFd>> ReservePlaces(int fd, size_t count) {
  std::vector<shm::UniqueFd> places;
  while (places.size() < count) {
    places.emplace_back(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!places.back()) {
      return absl::ResourceExhaustedError(
          "the daemon is out of file descriptors: raise its limit (ulimit -n, LimitNOFILE)");
    }
  }
  return places;
}

// Makes duplicates of `fds` out of the places.
void DuplicateInto(const std::vector<int>& fds, std::vector<shm::UniqueFd>* places) {
  CHECK_LE(fds.size(), places->size());
  places->resize(fds.size());
  for (size_t i = 0; i < fds.size(); ++i) {
    int result;
    do {
      result = dup3(fds[i], (*places)[i].get(), O_CLOEXEC);
    } while (result < 0 && (errno == EINTR || errno == EBUSY));
    CHECK_GE(result, 0) << "dup3: " << strerror(errno);
  }
}

absl::Status ShuttingDown() {
  return absl::UnavailableError("the daemon is shutting down: attach to its successor");
}

}  // namespace

std::string DescribeDifference(const engine::JobRequest& there, const AttachArguments& here) {
  std::vector<std::string> differences;
  CompareNumbers("world", there.world, here.world, &differences);
  CompareNumbers("the number of ranks on this node", there.local_world, here.local_world,
                 &differences);
  CompareNumbers("the number of nodes", there.members,
                 std::max<uint32_t>(1, static_cast<uint32_t>(here.peers.size())), &differences);
  CompareNumbers("the node's rank", there.self, here.node_rank, &differences);
  CompareConfigs(there.config, here.config, &differences);
  CompareLayouts(*there.layout, *here.layout, &differences);
  const size_t count = differences.size();
  if (count > kDifferencesMax) {
    differences.resize(kDifferencesMax);
    differences.push_back(absl::StrCat("and ", count - kDifferencesMax, " more"));
  }
  return absl::StrJoin(differences, "; ");
}

class JobTable::Use {
 public:
  // mu_ is held.
  Use(JobTable* table, std::shared_ptr<Entry> entry) : table_(table), entry_(std::move(entry)) {
    ++entry_->users;
  }
  ~Use() {
    if (entry_ == nullptr) return;
    std::lock_guard lock(table_->mu_);
    --entry_->users;
    table_->changed_.notify_all();
  }
  Use(Use&&) noexcept = default;
  Use& operator=(Use&&) = delete;
  Entry* operator->() const { return entry_.get(); }

 private:
  JobTable* const table_;
  std::shared_ptr<Entry> entry_;
};

JobTable::JobTable(MakeRunner make_runner, PeerNetwork* network, SessionTable* sessions,
                   std::string fabric_bind_host, uint32_t worker_threads, const Limits& limits)
    : make_runner_(std::move(make_runner)),
      network_(network),
      sessions_(sessions),
      fabric_bind_host_(std::move(fabric_bind_host)),
      worker_threads_(worker_threads),
      limits_(limits),
      reaper_([this] { Reap(); }) {}

JobTable::~JobTable() {
  {
    std::lock_guard lock(mu_);
    CHECK(jobs_.empty());
    stopping_ = true;
    changed_.notify_all();
  }
  reaper_.join();
}

absl::Status JobTable::WaitForJob(std::unique_lock<std::mutex>* lock,
                                  const AttachArguments& arguments,
                                  std::shared_ptr<Entry>* entry) {
  const auto deadline =
      std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(limits_.create_wait);
  for (;;) {
    if (admission_ == Admission::kClosed) {
      return ShuttingDown();
    }
    const auto it = jobs_.find(arguments.job);
    if (it == jobs_.end()) {
      if (const auto lost = FindLost(arguments.job); lost != lost_.end()) {
        return absl::FailedPreconditionError(lost->snapshot.reason);
      }
      return Create(lock, arguments, entry);
    }
    *entry = it->second;
    switch ((*entry)->state) {
      case State::kRunning: return absl::OkStatus();
      case State::kEnding:
        return absl::UnavailableError(
            absl::StrCat("job ", arguments.job, " is just ending here: ask again"));
      case State::kCreating: break;
    }
    if (changed_.wait_until(*lock, deadline) == std::cv_status::timeout) {
      return absl::UnavailableError(
          absl::StrCat("the memory of job ", arguments.job, " is still being reserved: ask again"));
    }
  }
}

absl::Status JobTable::Create(std::unique_lock<std::mutex>* lock, const AttachArguments& arguments,
                              std::shared_ptr<Entry>* entry) {
  if (admission_ != Admission::kOpen) {
    return absl::UnavailableError("the daemon drains and takes no new jobs");
  }
  if (jobs_.size() >= limits_.jobs_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the daemon has ", limits_.jobs_max,
                     " jobs, more it does not take: see zerodctl jobs. A script that makes many "
                     "engines gives one's place back with engine.destroy()"));
  }
  auto made = std::make_shared<Entry>();
  made->incarnation = next_incarnation_++;
  made->token = arguments.job_token;
  made->coordinator = arguments.peers.empty() ? "" : arguments.peers[0];
  engine::JobRequest& request = made->request;
  request.id = arguments.job;
  request.config = arguments.config;
  request.layout = arguments.layout;
  request.world = arguments.world;
  request.members = std::max<uint32_t>(1, static_cast<uint32_t>(arguments.peers.size()));
  request.self = arguments.node_rank;
  request.local_world = arguments.local_world;
  request.fabric_bind_host = fabric_bind_host_;
  request.fabric_stall_timeout = limits_.fabric_stall;
  request.worker_threads = worker_threads_;
  jobs_[arguments.job] = made;

  lock->unlock();
  PeerJob peer_job{arguments.job,     arguments.job_token,
                   request.members,   request.self,
                   made->coordinator, absl::Seconds(arguments.config.zerod.attach_timeout_seconds)};
  std::shared_ptr<JobPeers> peers = network_->Join(std::move(peer_job));
  std::weak_ptr<Entry> weak = made;
  auto runner = make_runner_(request, peers.get(), [this, weak](absl::Status status) {
    OnEnded(weak, status);
  });
  if (runner.ok()) peers->Start(runner->get());
  lock->lock();

  if (!runner.ok()) {
    jobs_.erase(arguments.job);
    changed_.notify_all();
    lock->unlock();
    peers->Close(runner.status());
    lock->lock();
    return runner.status();
  }
  made->runner = *std::move(runner);
  made->peers = std::move(peers);
  made->state = made->ended ? State::kEnding : State::kRunning;
  changed_.notify_all();
  spdlog::info("job {}: created, {}", arguments.job, made->runner->plan().text);
  if (made->ended) {
    return made->status.ok() ? absl::UnavailableError("the job ended") : made->status;
  }
  if (admission_ == Admission::kClosed) {
    // FailAll may have come and gone while there was nothing to fail.
    const absl::Status closed = ShuttingDown();
    {
      Use use(this, made);
      lock->unlock();
      use->runner->Fail(closed, /*discard=*/false);
    }
    lock->lock();
    return closed;
  }
  *entry = made;
  return absl::OkStatus();
}

absl::StatusOr<AttachResult> JobTable::Attach(const std::shared_ptr<Session>& session,
                                              const AttachArguments& arguments) {
  std::unique_lock lock(mu_);
  std::shared_ptr<Entry> entry;
  RETURN_IF_ERROR(WaitForJob(&lock, arguments, &entry));
  Use use(this, entry);
  lock.unlock();

  if (entry->token != arguments.job_token) {
    return absl::FailedPreconditionError(absl::StrCat(
        "job ", arguments.job, " exists with another job token: it is another run of the same "
        "name; give this one its own (ZEROD_JOB), or end that one (zerodctl jobs delete ",
        arguments.job, ")"));
  }
  const std::string difference = DescribeDifference(entry->request, arguments);
  if (!difference.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("job ", arguments.job, " exists and is different: ", difference));
  }
  engine::ClientInfo client;
  client.rank = arguments.rank;
  client.local_rank = arguments.local_rank;
  client.pid = session->pid();
  client.pidfd = session->gone_fd();
  ASSIGN_OR_RETURN(std::vector<shm::UniqueFd> files,
                   ReservePlaces(session->gone_fd(), shm::kClientFiles + 1));
  ASSIGN_OR_RETURN(engine::Attachment attachment, entry->runner->Attach(client));
  DuplicateInto(attachment.fds, &files);
  attachment.fds.clear();
  session->SetPlace({arguments.job, entry->incarnation, attachment.slot});
  session->SetFiles(std::move(files));
  spdlog::info("job {}: rank {} attached (process {}, attempt {}, generation {}, step {})",
               arguments.job, arguments.rank, session->pid(), arguments.attempt,
               attachment.generation, attachment.committed_step);
  return AttachResult{std::move(attachment), entry->runner->plan(), entry->request.members};
}

absl::StatusOr<std::pair<core::Step, std::string>> JobTable::ClientState(const Session& session) {
  ASSIGN_OR_RETURN(const Session::Place place, session.place());
  std::unique_lock lock(mu_);
  const auto it = jobs_.find(place.job);
  if (it == jobs_.end() || it->second->incarnation != place.incarnation ||
      it->second->state != State::kRunning) {
    return absl::FailedPreconditionError(
        absl::StrCat("job ", place.job, ", to which this process was attached, is over"));
  }
  Use use(this, it->second);
  lock.unlock();
  return use->runner->CommittedBlob(place.slot);
}

std::vector<JobInfo> JobTable::List() {
  std::vector<Use> running;
  std::vector<JobInfo> infos;
  {
    std::lock_guard lock(mu_);
    for (const auto& [id, entry] : jobs_) {
      if (entry->state == State::kRunning) running.emplace_back(this, entry);
    }
    infos.assign(lost_.begin(), lost_.end());
  }
  for (const Use& use : running) {
    infos.push_back({use->request, use->runner->plan(), use->runner->Snapshot()});
  }
  return infos;
}

size_t JobTable::size() {
  std::lock_guard lock(mu_);
  return jobs_.size();
}

absl::Status JobTable::Delete(const std::string& id, absl::Duration timeout) {
  std::unique_lock lock(mu_);
  const auto it = jobs_.find(id);
  if (it == jobs_.end()) {
    if (Forget(id)) return absl::OkStatus();
    return absl::NotFoundError(absl::StrCat("there is no job \"", id, "\" on this node"));
  }
  const std::shared_ptr<Entry> entry = it->second;
  if (entry->state == State::kRunning) {
    Use use(this, entry);
    lock.unlock();
    use->runner->Fail(absl::AbortedError(absl::StrCat("job ", id, " was deleted by an operator")),
                      /*discard=*/true);
  } else {
    lock.unlock();
  }
  lock.lock();
  const bool gone = changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] {
    const auto now = jobs_.find(id);
    return now == jobs_.end() || now->second != entry;
  });
  if (gone) {
    Forget(id);  // it had failed already when it was deleted
    return absl::OkStatus();
  }
  return absl::DeadlineExceededError(absl::StrCat("job ", id, " is still ending: ask again"));
}

void JobTable::SetAdmission(Admission admission) {
  std::lock_guard lock(mu_);
  admission_ = std::max(admission_, admission);
  changed_.notify_all();
}

Admission JobTable::admission() {
  std::lock_guard lock(mu_);
  return admission_;
}

void JobTable::FailAll(const absl::Status& why) {
  std::vector<Use> running;
  {
    std::lock_guard lock(mu_);
    for (const auto& [id, entry] : jobs_) {
      if (entry->state == State::kRunning) running.emplace_back(this, entry);
    }
  }
  for (const Use& use : running) use->runner->Fail(why, /*discard=*/false);
}

bool JobTable::WaitEmpty(absl::Duration timeout) {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] { return jobs_.empty(); });
}

void JobTable::OnEnded(const std::weak_ptr<Entry>& weak, const absl::Status& status) {
  // On the job's own thread: the reaper does the rest.
  const std::shared_ptr<Entry> entry = weak.lock();
  if (entry == nullptr) return;
  std::lock_guard lock(mu_);
  entry->ended = true;
  entry->status = status;
  if (entry->state == State::kRunning) entry->state = State::kEnding;
  changed_.notify_all();
}

void JobTable::Reap() {
  std::unique_lock lock(mu_);
  for (;;) {
    std::string id;
    std::shared_ptr<Entry> entry;
    changed_.wait(lock, [&] {
      for (const auto& [name, e] : jobs_) {
        if (e->state != State::kEnding || e->users != 0) continue;
        id = name;
        entry = e;
        return true;
      }
      return stopping_;
    });
    if (entry == nullptr) return;
    // Still in the table, as ending: a successor of the same name waits until the memory is free.
    lock.unlock();
    entry->peers->Close(entry->status);
    JobInfo last{entry->request, entry->runner->plan(), entry->runner->Snapshot()};
    entry->runner.reset();
    sessions_->ForgetJob(entry->incarnation);
    if (entry->status.ok()) {
      spdlog::info("job {}: ended, its memory is free", id);
    } else {
      spdlog::warn("job {}: failed, its memory is free: {}", id, entry->status.ToString());
    }
    lock.lock();
    jobs_.erase(id);
    if (last.snapshot.lost) RememberLost(std::move(last));
    changed_.notify_all();
  }
}

void JobTable::RememberLost(JobInfo info) {
  info.snapshot.memory.clear();  // is free
  info.snapshot.clients.clear();
  network_->SetLost(info.request.id, absl::FailedPreconditionError(info.snapshot.reason));
  lost_.push_back(std::move(info));
  if (lost_.size() <= limits_.lost_jobs_max) return;
  network_->SetLost(lost_.front().request.id, absl::OkStatus());
  lost_.pop_front();
}

bool JobTable::Forget(const std::string& id) {
  const auto lost = FindLost(id);
  if (lost == lost_.end()) return false;
  lost_.erase(lost);
  network_->SetLost(id, absl::OkStatus());
  return true;
}

std::deque<JobInfo>::iterator JobTable::FindLost(const std::string& id) {
  return std::find_if(lost_.begin(), lost_.end(),
                      [&](const JobInfo& info) { return info.request.id == id; });
}

}  // namespace zerod::server
