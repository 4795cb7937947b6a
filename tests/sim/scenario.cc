// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/scenario.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "proto/shm/format.h"

namespace zerod::sim {
namespace {

enum Purpose : uint64_t {
  kShape = 1, kScript, kScriptOfRank, kPuts, kDisagree, kRestores, kGradients
};

std::shared_ptr<const core::Layout> RandomLayout(Random* random) {
  core::ModelDescription model;
  model.modules.push_back({"", "Model", false});
  // Half of the jobs have an optimizer by tensor, of some parameters or of all.
  const core::OptimizerKind kinds[] = {core::OptimizerKind::kAdam, core::OptimizerKind::kLamb};
  model.groups = {kinds[random->Percent(25)], kinds[random->Percent(40)]};
  const uint64_t units = random->Between(2, 5);
  for (uint64_t u = 0; u < units; ++u) {
    const std::string path = absl::StrCat("u", u);
    model.modules.push_back({path, absl::StrCat("T", u), false});
    const uint64_t parameters = random->Between(1, 3);
    for (uint64_t p = 0; p < parameters; ++p) {
      core::ParameterDescription d;
      d.name = absl::StrCat(path, ".p", p);
      // One block to some chunks.
      d.shape = {static_cast<int64_t>(random->Percent(60) ? random->Between(1, 2000)
                                                           : random->Between(9000, 40000))};
      d.trainable = p == 0 || random->Percent(85);
      d.modules = {path};
      d.group = random->Percent(30) ? 1 : 0;
      model.parameters.push_back(std::move(d));
    }
  }
  auto layout = core::Layout::Build(model, {});
  CHECK(layout.ok()) << layout.status().ToString();
  return std::make_shared<const core::Layout>(*std::move(layout));
}

core::WindowSpec RandomWindow(const core::JobSpec& spec, Random* random) {
  const core::Layout& layout = *spec.layout;
  core::WindowSpec window;
  window.pinned.assign(layout.units().size(), true);
  window.resident.assign(layout.units().size(), true);
  window.base_chunks = window.max_chunks = layout.chunks();
  if (spec.stage < 3) return window;
  uint64_t pinned = 0;
  uint64_t largest = 0;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    window.resident[u] = random->Percent(20);
    if (window.resident[u]) pinned += layout.units()[u].chunks;
    else largest = std::max(largest, layout.units()[u].chunks);
  }
  if (random->Percent(25)) {
    if (spec.members == 1) window.resident.assign(layout.units().size(), true);
    return window;  // everything fits
  }
  window.pinned = window.resident;
  window.base_chunks = std::min(layout.chunks(), pinned + largest + random->Below(3));
  // Mostly the window may grow to hold everything; else gathers may be refused.
  window.max_chunks = random->Percent(75)
                          ? layout.chunks()
                          : std::min(layout.chunks(), window.base_chunks + random->Below(4));
  return window;
}

std::vector<Cell> CellsOf(const core::JobSpec& spec, UnitIndex u) {
  std::vector<Cell> cells;
  const core::Partition partition(*spec.layout, spec.members);
  const core::Unit& unit = spec.layout->units()[u];
  for (uint32_t place = 0; place < unit.parameters.size(); ++place) {
    const core::Parameter& p = spec.layout->parameters()[unit.parameters[place]];
    for (MemberIndex m = 0; m < spec.members; ++m) {
      core::Range r = core::Intersect({p.offset, p.offset + p.elements}, partition.Shard(u, m));
      if (!r.empty()) cells.push_back({unit.parameters[place], place, m, r, p.trainable});
    }
  }
  return cells;
}

std::vector<Fragment> FragmentsOf(const core::JobSpec& spec, UnitIndex u) {
  std::vector<Fragment> fragments;
  const core::Unit& unit = spec.layout->units()[u];
  const uint32_t parts = core::StagedParts(unit, spec.staged_part_elements);
  for (uint32_t place = 0; place < unit.parameters.size(); ++place) {
    const core::Parameter& p = spec.layout->parameters()[unit.parameters[place]];
    if (!p.trainable) {
      fragments.push_back({place, 0, p.elements});
      continue;
    }
    for (uint32_t part = 0; part < parts; ++part) {
      const core::Range range = core::StagedPart(unit, spec.staged_part_elements, part);
      const core::Range r = core::Intersect({p.offset, p.offset + p.elements}, range);
      if (r.empty()) continue;
      const bool whole = r.size() == range.size() && r.size() < p.elements;
      fragments.push_back({place, part, r.size(), whole});
    }
  }
  return fragments;
}

void RandomFaults(Scenario* s, Random* random) {
  const uint64_t kind = random->Below(100);
  if (kind < 40) return;
  const bool member = kind >= 85 && s->spec.members > 1;
  const uint64_t count = member ? 1 : random->Between(1, 3);
  for (uint64_t i = 0; i < count; ++i) {
    Fault f;
    f.member = member;
    f.moment = random->Percent(40)
                   ? Moment::kEvent
                   : static_cast<Moment>(random->Below(static_cast<uint64_t>(Moment::kCount)));
    f.nth = random->Below(f.moment == Moment::kEvent ? 600 * s->steps : 4 * s->world());
    f.who = static_cast<uint32_t>(random->Below(member ? s->spec.members : s->world()));
    f.delay = random->Percent(50) ? 0 : random->Below(40);
    s->faults.push_back(f);
  }
}

void RandomDelays(Scenario* s, Random* random) {
  const uint64_t scales[] = {1, 3, 20, 150};
  s->ring_delay_max = scales[random->Below(3)];
  s->link_delay_max = scales[random->Below(4)];
  s->work_delay_max = scales[random->Below(4)];
  s->client_delay_max = scales[random->Below(4)];
}

}  // namespace

Scenario Scenario::FromSeed(uint64_t seed) {
  Random random(Hash(seed, kShape));
  Scenario s;
  s.seed = seed;
  core::JobSpec& spec = s.spec;
  spec.id = "sim";
  spec.layout = RandomLayout(&random);
  spec.members = static_cast<uint32_t>(random.Percent(30) ? 1 : random.Between(2, 4));
  spec.local_world = static_cast<uint32_t>(
      random.Between(spec.members == 1 ? 1 : 1, spec.members > 2 ? 2 : 3));
  spec.world = spec.members * spec.local_world;
  spec.stage = static_cast<uint32_t>(random.Percent(50) ? 3 : random.Below(3));
  spec.node_sum = random.Percent(50);
  spec.skip_nonfinite = random.Percent(30);
  spec.untouched_as_zero = random.Percent(15);
  spec.prefetch_elements = random.Percent(30) ? 0 : random.Between(1, spec.layout->elements());
  spec.in_flight_elements = random.Between(1, 2 * spec.layout->elements());
  spec.window = RandomWindow(spec, &random);
  s.steps = random.Between(1, 3);
  for (UnitIndex u = 0; u < spec.layout->units().size(); ++u) s.cells.push_back(CellsOf(spec, u));
  RandomDelays(&s, &random);
  s.divergent = random.Percent(40);
  s.unequal = random.Percent(25);
  s.late = random.Percent(30);
  s.pieces = random.Percent(40);
  s.collectives = random.Percent(30);
  s.barriers = random.Percent(30);
  s.evaluation = random.Percent(25);
  s.puts = random.Percent(25);
  s.nonfinite = random.Percent(spec.skip_nonfinite ? 60 : 10);
  s.refuse = random.Percent(15);
  s.stall = random.Percent(20);
  s.overrun = random.Percent(10) && spec.world > 1;
  s.max_norm = random.Percent(50) ? 1.0 : 0.0;
  s.restart_together = random.Percent(60);
  if (spec.node_sum && random.Percent(40)) {
    // Bounded staging: a scatter may wait for another rank's micro-step, unless there is memory to
    // set it aside: enough for any path, of one gradient per parameter and micro-step. Else ranks
    // must not wait for each other within a micro-step in other ways.
    s.staging_slots = random.Between(1, 2);
    s.aside_refused_percent = random.Percent(30) ? 100 : random.Percent(30) ? 30 : 0;
    if (s.aside_refused_percent != 0) s.collectives = s.pieces = false;
  }
  RandomFaults(&s, &random);
  if (spec.skip_nonfinite && random.Percent(60)) {
    core::LossScaleSpec& scale = spec.loss_scale.emplace();
    scale.initial_scale = 4;
    scale.window = random.Between(1, 2);
    scale.hysteresis = random.Between(1, 2);
    scale.fails_at_min = false;
  }
  spec.refuse_untouched = random.Percent(10);
  s.restores = random.Percent(35);
  s.hesitates = random.Percent(15);
  if (spec.node_sum && random.Percent(60)) {
    spec.staged_part_elements = shm::kParamAlignElements * random.Between(100, 800);
  }
  s.grads = random.Percent(30) && !s.late;
  for (UnitIndex u = 0; u < spec.layout->units().size(); ++u) {
    s.fragments.push_back(FragmentsOf(spec, u));
  }
  return s;
}

core::JobSpec Scenario::Spec(MemberIndex m) const {
  core::JobSpec other = spec;
  other.self = m;
  return other;
}

std::vector<Gradient> Scenario::JoinFragments(UnitIndex u,
                                              const std::vector<Gradient>& gradients) const {
  std::vector<Gradient> joined(layout().units()[u].parameters.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Fragment& f = fragments[u][i];
    const bool first = i == 0 || fragments[u][i - 1].place != f.place;
    joined[f.place] = first ? gradients[i] : Join(joined[f.place], gradients[i]);
  }
  return joined;
}

std::string Scenario::Text() const {
  std::string text = absl::StrCat(
      spec.members, " members x ", spec.local_world, " clients, stage ", spec.stage,
      spec.node_sum ? ", node_sum" : ", per_rank", ", ", layout().units().size(), " units, window ",
      spec.window.base_chunks, "..", spec.window.max_chunks, " of ", layout().chunks(),
      " chunks, prefetch ", spec.prefetch_elements, ", ", steps, " steps");
  bool parts = false;
  for (UnitIndex u = 0; u < cells.size(); ++u) parts |= Parts(u) > 1;
  const std::pair<bool, const char*> flags[] = {
      {parts, "parts"},
      {spec.skip_nonfinite, "skip_nonfinite"},
      {spec.loss_scale.has_value(), "loss scale"}, {spec.untouched_as_zero, "untouched_as_zero"},
      {spec.refuse_untouched, "refuse_untouched"},
      {divergent, "divergent"}, {unequal, "unequal"}, {late, "late"}, {pieces, "pieces"},
      {collectives, "collectives"}, {barriers, "barriers"}, {evaluation, "evaluation"},
      {puts, "puts"}, {grads, "gradients"}, {restores, "restores"},
      {nonfinite, "nonfinite"}, {refuse, "refuse"}, {stall, "stall"},
      {overrun, "overrun"}, {hesitates, "hesitates"}, {restart_together, "restart_together"},
      {staging_slots < 1000, "bounded staging"}, {aside_refused_percent == 100, "none aside"}};
  for (const auto& [on, name] : flags) {
    if (on) absl::StrAppend(&text, ", ", name);
  }
  for (const Fault& f : faults) {
    absl::StrAppend(&text, "; ", f.member ? "member " : "rank ", f.who, " dies at moment ",
                    static_cast<int>(f.moment), " #", f.nth, " + ", f.delay);
  }
  return text;
}

// --- Training scripts --------------------------------------------------------------------------

namespace {

class Script {
 public:
  // `shared` draws alike on all ranks, `own` does not.
  Script(const Scenario& s, Rank rank, Step step, uint32_t attempt)
      : s_(s), rank_(rank), step_(step), attempt_(attempt),
        shared_(Hash(s.seed, kScript, step, attempt)),
        own_(Hash(s.seed, kScriptOfRank, step, attempt, rank)) {}

  std::vector<Op> Build();
  std::vector<Op> Final();

 private:
  void Push(Op op) { ops_.push_back(op); }
  void Meet();
  void Puts();
  void Restore();
  void Evaluate();
  void MicroStep(uint32_t micro_step, bool last, bool common);
  void Late(uint32_t micro_step);
  void Gradients();
  bool Uses(UnitIndex u) const { return (used_ >> u) & 1; }
  // A step that was refused for want of a gradient is done again with all of them.
  bool Complete() const { return s_.spec.refuse_untouched && attempt_ > 0; }
  uint64_t RandomPlaces(UnitIndex u);

  const Scenario& s_;
  const Rank rank_;
  const Step step_;
  const uint32_t attempt_;
  Random shared_;
  Random own_;
  uint64_t used_ = 0;
  std::vector<UnitIndex> landed_;
  std::vector<Op> ops_;
};

uint64_t Script::RandomPlaces(UnitIndex u) {
  const core::Unit& unit = s_.layout().units()[u];
  uint64_t places = 0;
  for (size_t i = 0; i < unit.parameters.size(); ++i) {
    if (!s_.layout().parameters()[unit.parameters[i]].trainable) continue;
    if (Complete() || own_.Percent(85)) {
      places |= uint64_t{1} << i;
    }
  }
  return places;
}

// Where all ranks come together, or nowhere.
void Script::Meet() {
  const bool collective = shared_.Percent(30) && s_.collectives;
  const bool barrier = shared_.Percent(20) && s_.barriers;
  if (collective) Push({OpKind::kCollective});
  if (barrier) Push({OpKind::kScalar});
}

void Script::Puts() {
  const std::optional<PutOfStep> puts = PutsOf(s_, step_);
  if (!puts.has_value() || attempt_ > 0) return;
  Push({OpKind::kQuiet});
  Push({OpKind::kScalar});
  if (puts->rank == rank_) {
    for (UnitIndex u : puts->units) Push({OpKind::kPut, u, 0, 0, false, puts->state});
  }
  Push({OpKind::kScalar});
  Push({OpKind::kReading});
}

void Script::Restore() {
  if (attempt_ > 0 || !RestoreOf(s_, step_).has_value()) return;
  if (s_.world() > 1 && shared_.Percent(30)) Push({OpKind::kRestoreOther});
  Push({OpKind::kRestore});
  if (own_.Percent(50)) Push({OpKind::kReadProgress});
}

void Script::Evaluate() {
  const Rank who = static_cast<Rank>(shared_.Below(s_.world()));
  if (!s_.evaluation || who != rank_) return;
  for (UnitIndex u = 0; u < s_.cells.size(); ++u) {
    Push({OpKind::kGather, u});
    Push({OpKind::kCompute});
    Push({OpKind::kRelease, u});
    if (own_.Percent(20)) Push({OpKind::kRead, u});
    if (own_.Percent(20)) Push({OpKind::kRead, u, 0, 0, false, core::StateKind::kExpAvg});
  }
  if (own_.Percent(50)) Push({OpKind::kReadProgress});
}

// Forward and backward pass. `common`: every rank does this one.
void Script::MicroStep(uint32_t micro_step, bool last, bool common) {
  const UnitIndex units = static_cast<UnitIndex>(s_.cells.size());
  Random* path = s_.divergent ? &own_ : &shared_;
  used_ = 0;
  for (UnitIndex u = 0; u < units; ++u) {
    if (Complete() || path->Percent(85)) used_ |= uint64_t{1} << u;
  }
  UnitIndex held = units;  // none; some modules stay gathered while the next runs
  for (UnitIndex u = 0; u < units; ++u) {
    if (Uses(u)) Push({OpKind::kGather, u});
    if (common) Meet();
    if (!Uses(u)) continue;
    Push({OpKind::kCompute});
    if (held != units) Push({OpKind::kRelease, held});
    held = units;
    if (own_.Percent(30)) held = u;
    else Push({OpKind::kRelease, u});
  }
  if (held != units) Push({OpKind::kRelease, held});
  for (UnitIndex u = units; u-- > 0;) {
    if (Uses(u)) {
      Push({OpKind::kGather, u});
      Push({OpKind::kCompute});
      const uint64_t places = RandomPlaces(u);
      const uint64_t first = s_.pieces && own_.Percent(30) ? places & own_.Next() : places;
      Push({OpKind::kLand, u, micro_step, first});
      if (first != places) {
        // In two pieces: the first is handed over to make room, or the unit is used twice.
        Push({OpKind::kScatter, u});
        Push({OpKind::kLand, u, micro_step, places & ~first});
      }
    }
    if (common) Meet();
    if (!Uses(u)) continue;
    landed_.push_back(u);
    Push({OpKind::kRelease, u});
    // Some scripts do not know which pass is the last: then STEP says it.
    Push({OpKind::kScatter, u, 0, 0, last && own_.Percent(80)});
  }
  Push({OpKind::kMicroStep});
}

// Another backward pass after the one that was taken for the last.
void Script::Late(uint32_t micro_step) {
  Random* path = s_.divergent ? &own_ : &shared_;
  std::vector<UnitIndex> again;
  for (UnitIndex u = 0; u < s_.cells.size(); ++u) {
    if (!path->Percent(40)) continue;
    if (std::find(landed_.begin(), landed_.end(), u) != landed_.end()) again.push_back(u);
  }
  for (UnitIndex u : landed_) Push({OpKind::kScatter, u, 0, 0, true});
  for (UnitIndex u : again) {
    Push({OpKind::kReclaim, u});
    Push({OpKind::kLand, u, micro_step, RandomPlaces(u)});
    Push({OpKind::kScatter, u, 0, 0, true});
  }
}

// Collective, once all is handed over.
void Script::Gradients() {
  const std::optional<GradientOfStep> gradient = GradientOf(s_, step_);
  if (!gradient.has_value()) return;
  const UnitIndex u = gradient->unit;
  Push({OpKind::kScatter, u, 0, 0, /*last=*/true, core::StateKind::kMaster, /*mark=*/true});
  Push({OpKind::kScalar});
  if (own_.Percent(60)) Push({OpKind::kRead, u, 0, 0, false, core::StateKind::kGradient});
  Push({OpKind::kScalar});
  if (gradient->set && gradient->rank == rank_) {
    Push({OpKind::kPut, u, 0, 0, false, core::StateKind::kGradient});
  }
  Push({OpKind::kScalar});
}

std::vector<Op> Script::Build() {
  Puts();
  Restore();
  Evaluate();
  const uint32_t common = static_cast<uint32_t>(shared_.Between(1, 2));
  const uint32_t micro_steps =
      common + (s_.unequal ? static_cast<uint32_t>(own_.Below(3)) : 0);
  const Rank stalled = static_cast<Rank>(shared_.Below(s_.world()));
  for (uint32_t i = 0; i < micro_steps; ++i) {
    MicroStep(i, i + 1 == micro_steps, i < common);
    if (i == 0 && s_.stall && stalled == rank_) Push({OpKind::kStall});
  }
  if (s_.late) Late(micro_steps);
  Gradients();
  Push({OpKind::kStep});
  return std::move(ops_);
}

std::vector<Op> Script::Final() {
  Push({OpKind::kScalar});
  if (own_.Percent(50)) Push({OpKind::kRead, static_cast<UnitIndex>(own_.Below(s_.cells.size()))});
  if (own_.Percent(50)) Push({OpKind::kReadProgress});
  const Rank who = static_cast<Rank>(shared_.Below(s_.world()));
  if (s_.overrun && who == rank_) {
    Push({OpKind::kScalar});
    MicroStep(0, true, false);
    Late(1);
    Push({OpKind::kStep});
  }
  Push({OpKind::kDetach});
  return std::move(ops_);
}

}  // namespace

std::vector<Op> StepProgram(const Scenario& s, Rank rank, Step step, uint32_t attempt) {
  return Script(s, rank, step, attempt).Build();
}

std::vector<Op> FinalProgram(const Scenario& s, Rank rank) {
  return Script(s, rank, s.steps + 1, 0).Final();
}

bool Disagrees(const Scenario& s, Rank rank, Step step, uint32_t attempt) {
  Random random(Hash(s.seed, kDisagree, step));
  if (!s.refuse || attempt > 0 || s.world() == 1 || !random.Percent(50)) return false;
  return random.Below(s.world()) == rank;
}

bool LacksGradients(const Scenario& s, Step step, uint32_t attempt) {
  std::vector<uint64_t> touched(s.cells.size(), 0);
  for (Rank r = 0; r < s.world(); ++r) {
    for (const Op& op : StepProgram(s, r, step, attempt)) {
      if (op.kind == OpKind::kLand) touched[op.unit] |= op.places;
    }
  }
  for (UnitIndex u = 0; u < s.cells.size(); ++u) {
    const auto& parameters = s.layout().units()[u].parameters;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const bool lacks = (touched[u] >> i & 1) == 0;
      if (lacks && s.layout().parameters()[parameters[i]].trainable) return true;
    }
  }
  return false;
}

core::HyperParameters Hyper(const Scenario& s, Rank rank, Step step, uint32_t attempt) {
  core::HyperParameters h;
  h.max_norm = s.max_norm;
  h.want_norm = rank == 0 && step % 2 == 0;
  h.groups.resize(2);
  h.groups[0].lr = static_cast<double>(step) + (Disagrees(s, rank, step, attempt) ? 0.5 : 0.0);
  return h;
}

std::optional<PutOfStep> PutsOf(const Scenario& s, Step step) {
  PutOfStep puts;
  const UnitIndex units = static_cast<UnitIndex>(s.cells.size());
  if (step == 1) {
    for (UnitIndex u = 0; u < units; ++u) puts.units.push_back(u);
    return puts;
  }
  Random random(Hash(s.seed, kPuts, step));
  if (!s.puts || step > s.steps || !random.Percent(60)) return std::nullopt;
  puts.rank = static_cast<Rank>(random.Below(s.world()));
  puts.units.push_back(static_cast<UnitIndex>(random.Below(units)));
  if (random.Percent(40)) puts.state = core::StateKind::kExpAvg;
  return puts;
}

std::optional<core::OptimizerProgress> RestoreOf(const Scenario& s, Step step) {
  Random random(Hash(s.seed, kRestores, step));
  if (!s.restores || step > s.steps || !random.Percent(60)) return std::nullopt;
  core::OptimizerProgress progress;
  for (size_t p = 0; p < s.layout().parameters().size(); ++p) {
    progress.parameter_steps.push_back(random.Below(1000));
  }
  if (s.spec.loss_scale.has_value() && random.Percent(80)) {
    core::LossScalerState& scaler = progress.loss_scaler.emplace();
    scaler.scale = static_cast<double>(8 << random.Below(8));
    scaler.iterations = random.Between(1, 40);
    scaler.last_overflow = static_cast<int64_t>(random.Below(scaler.iterations + 1)) - 1;
    scaler.hysteresis = random.Between(1, 2);
  }
  return progress;
}

std::optional<GradientOfStep> GradientOf(const Scenario& s, Step step) {
  Random random(Hash(s.seed, kGradients, step));
  if (!s.grads || step > s.steps || !random.Percent(60)) return std::nullopt;
  GradientOfStep gradient;
  gradient.unit = static_cast<UnitIndex>(random.Below(s.cells.size()));
  gradient.set = random.Percent(70);
  gradient.rank = static_cast<Rank>(random.Below(s.world()));
  return gradient;
}

Gradient SetGradient(uint64_t value, size_t fragment) {
  return {true, false, Hash(value, fragment), Hash(value, fragment, 1)};
}

uint64_t PutValue(const Scenario& s, Step step, UnitIndex unit, size_t cell) {
  return Hash(s.seed, kPuts, step, unit, cell);
}

}  // namespace zerod::sim
