// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/world.h"

#include <algorithm>
#include <cstdio>

#include "tests/sim/member.h"
#include "tests/sim/process.h"

namespace zerod::sim {
namespace {

// More than any schedule needs: what goes on for longer goes on for ever.
constexpr uint64_t kEventsMax = 200000;
constexpr uint64_t kRestartsMax = 100;

uint64_t Fingerprint(const core::Entry& e) {
  uint64_t h = Hash(e.seq, e.generation, static_cast<uint64_t>(e.kind), e.unit, e.step, e.round,
                    e.wants, e.origin, e.slot, e.begin, e.count, e.ordinal, e.rank,
                    static_cast<uint64_t>(e.decision.kind), e.norm_needed);
  for (const bool t : e.decision.touched) h = Mix(h, t);
  h = Mix(h, e.restore.Hash().low);
  return h;
}

}  // namespace

World::World(const Scenario& scenario, bool trace)
    : s_(scenario), trace_(trace), random_(Hash(scenario.seed, 99)), truth_(&s_) {
  moments_.assign(static_cast<size_t>(Moment::kCount), 0);
  struck_.assign(s_.faults.size(), false);
  processes_.resize(s_.world());
}

World::~World() = default;

void World::Print(const std::string& line) const {
  std::fprintf(stdout, "%8llu %s\n", static_cast<unsigned long long>(now_), line.c_str());
}

void World::After(uint64_t delay, std::function<void()> what) {
  queue_.push({now_ + delay, order_++, std::move(what)});
}

void World::Run() {
  for (MemberIndex m = 0; m < s_.spec.members; ++m) {
    members_.push_back(std::make_unique<Member>(this, m));
  }
  for (MemberIndex m = 0; m < s_.spec.members; ++m) {
    // Links lead to member 0: it is there first.
    After(m == 0 ? 0 : random_.Below(30), [this, m] { members_[m]->Begin(); });
  }
  for (Rank r = 0; r < s_.world(); ++r) {
    After(random_.Below(60), [this, r] { StartProcess(r); });
  }
  do {
    while (!queue_.empty()) {
      Event event = std::move(const_cast<Event&>(queue_.top()));
      queue_.pop();
      now_ = event.time;
      if (++events_ > kEventsMax) Violate("liveness: it goes on for ever. " + Stuck());
      Happens(Moment::kEvent);
      event.what();
    }
  } while (WakeStalled());
  CheckEnd();
}

// --- Links -------------------------------------------------------------------------------------

void World::Send(MemberIndex from, MemberIndex to, core::Message message) {
  if (from == to || (from != 0 && to != 0)) {
    Violate(absl::StrCat("member ", from, " sends to member ", to));
  }
  if (const auto* append = std::get_if<core::Append>(&message)) {
    for (const core::Entry& e : append->entries) {
      const auto [it, fresh] = log_.emplace(e.seq, Fingerprint(e));
      if (!fresh && it->second != Fingerprint(e)) {
        Violate(absl::StrCat("invariant 1: entry ", e.seq, " of the log is told in two ways"));
      }
      Trace("log ", e.seq, " kind ", static_cast<int>(e.kind), " unit ", e.unit, " step ", e.step,
            " generation ", e.generation, " -> member ", to);
    }
  }
  uint64_t& free = link_free_[{from, to}];
  free = std::max(free, now_ + Delay(s_.link_delay_max));
  After(free - now_, [this, from, to, message = std::move(message)] {
    Member& m = *members_[to];
    if (!m.alive()) return;
    m.job().OnMessage(from, message);
    m.Drain();
  });
}

// --- Fabric ------------------------------------------------------------------------------------

void World::StartExchange(uint64_t seq, MemberIndex m, uint64_t fingerprint,
                          std::function<void(bool)> done) {
  Exchange& x = exchanges_[seq];
  if (x.started.empty()) x.fingerprint = fingerprint;
  if (x.fingerprint != fingerprint) {
    Violate(absl::StrCat("invariant 1: member ", m, " starts another entry ", seq, " than others"));
  }
  if (!x.started.emplace(m, std::move(done)).second) {
    Violate(absl::StrCat("member ", m, " starts entry ", seq, " twice"));
  }
  Complete(&x);
}

void World::StartConnect(MemberIndex m, std::function<void(bool)> done) {
  if (!connect_.started.emplace(m, std::move(done)).second) Violate("it connects twice");
  Complete(&connect_);
}

// Moves once every member has started it; with a dead one among them never, or it fails.
void World::Complete(Exchange* x) {
  bool dead = false;
  for (const auto& m : members_) dead |= !m->alive();
  if (dead) {
    for (auto& [m, done] : x->started) {
      if (done == nullptr || !random_.Percent(30)) continue;
      After(Delay(s_.lease), [done = std::exchange(done, nullptr)] { done(false); });
    }
    return;
  }
  if (x->started.size() != members_.size()) return;
  for (auto& [m, done] : x->started) {
    After(Delay(s_.work_delay_max),
          [this, done = std::exchange(done, nullptr)] {
            // It may have broken in the meantime.
            bool ok = true;
            for (const auto& other : members_) ok &= other->alive() || !random_.Percent(50);
            done(ok);
          });
  }
}

// --- Faults and the launcher -------------------------------------------------------------------

void World::Happens(Moment moment) {
  const uint64_t nth = moments_[static_cast<size_t>(moment)]++;
  for (size_t i = 0; i < s_.faults.size(); ++i) {
    const Fault& f = s_.faults[i];
    if (struck_[i] || f.moment != moment || f.nth != nth) continue;
    struck_[i] = true;
    After(f.delay, [this, &f] {
      if (f.member) return KillMember(f.who);
      if (processes_[f.who] != nullptr) processes_[f.who]->Die("killed");
    });
  }
}

void World::StartProcess(Rank rank) {
  const auto& before = processes_[rank];
  if (before != nullptr && (before->alive() || before->incarnation() > last_failed_)) return;
  processes_[rank] = std::make_shared<Process>(this, rank, ++restarts_);
  Trace("rank ", rank, " starts");
  processes_[rank]->Start();
}

void World::OnExit(Process* process, bool ok) {
  if (!ok && process->generation() != 0) {
    broken_.insert(process->generation());
    FailCollectives();
  }
  if (lost_) return;
  if (!ok) {
    if (restarts_ > kRestartsMax) Violate("liveness: the ranks are started again for ever");
    last_failed_ = std::max(last_failed_, restarts_);
  }
  bool some_run = false;
  for (const auto& p : processes_) {
    if (p == nullptr || !p->alive() || p->incarnation() > last_failed_) continue;
    some_run = true;
    if (ok || !s_.restart_together) continue;
    After(random_.Between(1, 200), [p] { p->Die("ended by its launcher"); });
  }
  if (some_run && s_.restart_together) return;
  for (Rank r = 0; r < s_.world(); ++r) {
    if (processes_[r] == nullptr || processes_[r]->alive()) continue;
    After(random_.Between(1, 60), [this, r] { StartProcess(r); });
  }
}

void World::KillMember(MemberIndex m) {
  if (!members_[m]->alive()) return;
  if (std::any_of(members_.begin(), members_.end(), [](const auto& x) { return !x->begun(); })) {
    return After(40, [this, m] { KillMember(m); });
  }
  if (std::all_of(members_.begin(), members_.end(), [](const auto& x) { return x->ended(); })) {
    return;
  }
  Trace("member ", m, " dies");
  lost_ = true;
  members_[m]->Die();
  for (const auto& p : processes_) {
    if (p == nullptr || p->member() != m) continue;
    After(Delay(5), [p] { p->LoseDaemon(); });
  }
  for (MemberIndex other = 0; other < members_.size(); ++other) {
    if (other == m || (other != 0 && m != 0)) continue;
    After(s_.lease, [this, other, m] {
      if (!members_[other]->alive()) return;
      members_[other]->job().OnMemberDown(m, absl::UnavailableError("its link is silent"));
      members_[other]->Drain();
    });
  }
  for (auto& [seq, x] : exchanges_) Complete(&x);
  Complete(&connect_);
  // Its link is down on member 0, which tells the others, whose clients then hear.
  const uint64_t bound = s_.lease + 3 * s_.link_delay_max + 2 * s_.ring_delay_max + 10;
  After(bound, [this] {
    for (const auto& p : processes_) {
      if (p == nullptr || !p->alive() || p->done() || !p->attached() || p->failed()) continue;
      Violate(absl::StrCat("invariant 6: rank ", p->rank(), " has not heard of the member's death "
                           "within the detection time"));
    }
  });
}

std::vector<std::shared_ptr<Process>> World::Attached() {
  std::vector<std::shared_ptr<Process>> processes;
  for (const auto& m : members_) {
    for (const auto& p : m->slots()) processes.push_back(p);
  }
  return processes;
}

void World::CheckGradient(UnitIndex unit, uint64_t generation,
                          const std::vector<uint64_t>& values) {
  const std::vector<std::shared_ptr<Process>> processes = Attached();
  for (const auto& p : processes) {
    // What the one before it handed over is not known any more.
    if (p == nullptr || p->generation() != generation) return;
  }
  const std::vector<Gradient> expected = truth_.Gradients(processes, unit, std::nullopt);
  for (size_t c = 0; c < values.size(); ++c) {
    const Cell& cell = s_.cells[unit][c];
    if (values[c] == Read(expected[cell.place])) continue;
    Violate(absl::StrCat("another gradient of unit ", unit, " is read than was handed over"));
  }
}

void World::Arrive(uint64_t generation, uint64_t ordinal,
                   const std::shared_ptr<Process>& process) {
  if (broken_.count(generation)) {
    After(Delay(50), [process] { process->CollectiveDone(false); });
    return;
  }
  Collective& c = collectives_[{generation, ordinal}];
  c.waiting.push_back(process);
  if (c.waiting.size() < s_.world()) return;
  for (const auto& p : std::exchange(c.waiting, {})) {
    After(Delay(s_.client_delay_max), [p] { p->CollectiveDone(true); });
  }
}

void World::FailCollectives() {
  for (auto& [key, c] : collectives_) {
    if (!broken_.count(key.first)) continue;
    for (const auto& p : std::exchange(c.waiting, {})) {
      After(Delay(50), [p] { p->CollectiveDone(false); });
    }
  }
}

// --- Liveness ----------------------------------------------------------------------------------

// Nothing moves but for ranks that stand still of their own will: nobody may be waiting for them
// with a request that is the daemon's alone to answer.
void World::CheckStalled() {
  for (const auto& p : processes_) {
    if (p == nullptr || !p->WaitsForDaemonAlone()) continue;
    Violate(absl::StrCat("invariant 6: a request waits for a client that stands still. ", Stuck()));
  }
}

bool World::WakeStalled() {
  if (stalled_.empty()) return false;
  CheckStalled();
  for (const auto& p : std::exchange(stalled_, {})) p->Resume();
  return !queue_.empty();
}

std::string World::Stuck() const {
  std::string text;
  for (const auto& p : processes_) {
    if (p != nullptr && !p->done()) absl::StrAppend(&text, p->Waiting(), "; ");
  }
  return text;
}

void World::CheckEnd() {
  for (Rank r = 0; r < s_.world(); ++r) {
    const auto& p = processes_[r];
    if (p->done() || (lost_ && !p->alive())) continue;
    Violate("liveness: nothing is left to happen, and yet: " + Stuck());
  }
  for (const auto& m : members_) {
    if (!m->alive() || m->ended()) continue;
    Violate(absl::StrCat("liveness: the job has not ended on member ", m->index()));
  }
  if (lost_) return;
  if (truth_.committed() != s_.steps) {
    Violate(absl::StrCat("the job ended at step ", truth_.committed(), " of ", s_.steps));
  }
  for (const auto& m : members_) {
    m->CheckWeights(s_.steps, false);
    m->CheckProgress(s_.steps);
    if (m->job().state() != core::JobState::kEnded) {
      Violate(absl::StrCat("member ", m->index(), " did not end well: ",
                           m->job().failure().ToString()));
    }
  }
}

}  // namespace zerod::sim
