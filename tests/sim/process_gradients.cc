// SPDX-License-Identifier: Apache-2.0
//
// How a training process hands its gradients over, as client/cpp/gradients.cc does.
#include <algorithm>
#include <utility>

#include "tests/sim/member.h"
#include "tests/sim/process.h"
#include "tests/sim/world.h"

namespace zerod::sim {

void Process::Land(const Op& op) {
  UnitGradients& g = gradients_[op.unit];
  if (op.places == 0 || g.last) return Continue();
  std::vector<Gradient> landing(g.file.size());
  for (size_t i = 0; i < landing.size(); ++i) {
    const Fragment& f = s_.fragments[op.unit][i];
    if (((op.places >> f.place) & 1) == 0) continue;
    const uint64_t value = Hash(s_.seed, rank_, incarnation_, step_, attempt_, op.unit, f.place,
                                f.part, op.micro_step);
    landing[i] = {true, s_.nonfinite && value % 61 == 0, value, Mix(value, 1)};
    g.file[i] = g.touched[i] ? Add(g.file[i], landing[i]) : landing[i];
    g.touched[i] = true;
  }
  g.landed = true;
  landings_[op.unit].push_back(std::move(landing));
  // Parts that have nothing else leave at once.
  WithRoom([this, u = op.unit] { return PostWholeParts(u); }, [this] { Continue(); });
}

void Process::Scatter(const Op& op) {
  const UnitGradients& g = gradients_[op.unit];
  if (op.mark ? g.last && g.posted : g.last) return Continue();
  WithRoom([this, op] { return HandOver(op.unit, op.last, op.mark); }, [this, op] {
    gradients_[op.unit].last = op.last;
    Continue();
  });
}

void Process::EndMicroStep() {
  const auto post = [this] {
    for (UnitIndex u = 0; u < gradients_.size(); ++u) {
      if (!PostOpen(u, /*last=*/false, /*mark=*/false)) return false;
    }
    return true;
  };
  WithRoom(post, [this] {
    ++micro_steps_;
    PassOn();
    Hint([slot = slot_, step = step_](core::Job& job) { job.OnMicroStep(slot, step); });
    Continue();
  });
}

void Process::PassOn() {
  for (auto& parts : indices_) std::fill(parts.begin(), parts.end(), 0);
}

// Then STEP, which is the mark of what left without one.
void Process::ScatterRest() {
  const auto post = [this] {
    for (UnitIndex u = 0; u < gradients_.size(); ++u) {
      UnitGradients& g = gradients_[u];
      const bool something =
          s_.spec.node_sum ? !OpenParts(u, /*whole_parts=*/false).empty() : g.landed;
      if (g.last || !something) continue;
      if (!HandOver(u, /*last=*/true, /*mark=*/false)) return false;
      g.last = true;
    }
    return true;
  };
  WithRoom(post, [this] { SendStep(); });
}

// --- Posting -------------------------------------------------------------------------------------

// `post` does what it can, false where there was no room in the staging memory.
void Process::WithRoom(std::function<bool()> post, std::function<void()> then) {
  if (post()) return then();
  waiting_ = true;
  blocked_ = [this, post = std::move(post), then = std::move(then)] { WithRoom(post, then); };
}

// `mark`: even of nothing.
bool Process::HandOver(UnitIndex u, bool last, bool mark) {
  if (s_.spec.node_sum) return PostOpen(u, last, mark);
  if (last && (gradients_[u].landed || mark)) PostFile(u);
  return true;
}

// per_rank: the last of a round.
void Process::PostFile(UnitIndex u) {
  UnitGradients& g = gradients_[u];
  for (std::vector<Gradient>& landing : std::exchange(landings_[u], {})) {
    handed_.push_back({u, 0, rounds_[u] + 1, 0, micro_steps_, indices_[u][0]++,
                       std::move(landing)});
  }
  ++rounds_[u];
  indices_[u][0] = 0;
  g.posted = true;
  Hint([world = world_, member = member_, slot = slot_, u, step = step_,
        touched = g.touched](core::Job& job) {
    world->member(member).Mark(slot, u, step, /*last=*/true, touched);
    job.OnScatter(slot, 0, u, step, /*last=*/true, 0, touched);
  });
}

// node_sum: the parts that something has landed in and that were not handed over.
std::vector<uint32_t> Process::OpenParts(UnitIndex u, bool whole_parts) const {
  std::vector<uint32_t> open;
  if (!s_.spec.node_sum) return open;
  for (size_t i = 0; i < s_.fragments[u].size(); ++i) {
    const Fragment& f = s_.fragments[u][i];
    if (!gradients_[u].touched[i] || (whole_parts && !f.whole_part)) continue;
    if (std::find(open.begin(), open.end(), f.part) == open.end()) open.push_back(f.part);
  }
  return open;
}

bool Process::PostOpen(UnitIndex u, bool last, bool mark) {
  const std::vector<uint32_t> open = OpenParts(u, /*whole_parts=*/false);
  for (size_t i = 0; i < open.size(); ++i) {
    if (!PostPart(u, open[i], last && i + 1 == open.size())) return false;
  }
  if (open.empty() && last && (gradients_[u].unmarked || mark)) return PostPart(u, 0, last);
  return true;
}

bool Process::PostWholeParts(UnitIndex u) {
  for (const uint32_t part : OpenParts(u, /*whole_parts=*/true)) {
    if (!PostPart(u, part, /*last=*/false)) return false;
  }
  return true;
}

bool Process::PostPart(UnitIndex u, uint32_t part, bool last) {
  if (scatters_ >= s_.staging_slots) {
    Hint([slot = slot_](core::Job& job) { job.OnMakeRoom(slot); });
    return false;
  }
  UnitGradients& g = gradients_[u];
  std::vector<Gradient> sum(s_.fragments[u].size());
  std::vector<bool> touched(s_.layout().units()[u].parameters.size(), false);
  for (size_t i = 0; i < sum.size(); ++i) {
    const Fragment& f = s_.fragments[u][i];
    if (f.part != part || !g.touched[i]) continue;
    for (std::vector<Gradient>& landing : landings_[u]) {
      sum[i] = Add(sum[i], std::exchange(landing[i], {}));
    }
    touched[f.place] = true;
    g.touched[i] = false;
  }
  handed_.push_back(
      {u, part, rounds_[u] + 1, scalars_, micro_steps_, indices_[u][part]++, sum});
  const uint64_t offset = next_offset_++;
  staging_[offset] = std::move(sum);
  ++scatters_;
  if (OpenParts(u, /*whole_parts=*/false).empty()) landings_[u].clear();
  g.unmarked = !last;
  if (last) {
    ++rounds_[u];
    std::fill(indices_[u].begin(), indices_[u].end(), 0);
    g.posted = true;
  }
  Post({OpKind::kScatter, u, offset},
       [slot = slot_, u, step = step_, last, offset, part,
        touched = std::move(touched)](core::Job& job, uint64_t cookie) {
         job.OnScatter(slot, cookie, u, step, last, offset, touched, part);
       });
  return true;
}

}  // namespace zerod::sim
