// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/gradient_book.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "kernels/cpu/kernels.h"

namespace zerod::engine {

using core::Range;
using core::SlotIndex;
using core::Step;
using core::UnitIndex;

void SumInto(const absl::InlinedVector<Source, 4>& sources, Range range, float* out) {
  if (sources.empty()) {
    memset(out, 0, range.size() * sizeof(float));
    return;
  }
  absl::InlinedVector<const float*, 8> in;
  for (const Source& source : sources) in.push_back(source.At(range.begin));
  kernels::Sum(in.data(), in.size(), out, range.size());
}

void SumRange(const core::Layout& layout, const Sources& sources, Range range, float* out) {
  uint64_t next = range.begin;
  ForEachParameter(layout, sources.unit, range, [&](size_t index, Range part) {
    memset(out + (next - range.begin), 0, (part.begin - next) * sizeof(float));
    SumInto(sources.of[index], part, out + (part.begin - range.begin));
    next = part.end;
  });
  memset(out + (next - range.begin), 0, (range.end - next) * sizeof(float));
}

void SetRange(const core::Layout& layout, const Sources& sources, Range range,
              const float* values) {
  ForEachParameter(layout, sources.unit, range, [&](size_t index, Range part) {
    const size_t bytes = part.size() * sizeof(float);
    const auto& of = sources.of[index];
    for (size_t i = 0; i < of.size(); ++i) {
      float* const to = of[i].At(part.begin);
      if (i == 0) {
        memcpy(to, values + (part.begin - range.begin), bytes);
      } else {
        memset(to, 0, bytes);
      }
    }
  });
}

const float* OnlySource(const core::Layout& layout, const Sources& sources, Range range) {
  const Source* only = nullptr;
  bool several = false;
  ForEachParameter(layout, sources.unit, range, [&](size_t index, Range) {
    const auto& of = sources.of[index];
    several |= of.size() != 1 ||
               (only != nullptr && (only->data != of[0].data || only->begin != of[0].begin));
    if (!several) only = &of[0];
  });
  return several || only == nullptr ? nullptr : only->At(range.begin);
}

double BlockSquare(const core::Layout& layout, const Sources& sources, Range range,
                   bool* nonfinite) {
  // Most blocks lie within one parameter: no need to put its gradient together first.
  const absl::InlinedVector<Source, 4>* whole = nullptr;
  ForEachParameter(layout, sources.unit, range, [&](size_t index, Range part) {
    if (part.size() == range.size()) whole = &sources.of[index];
  });
  if (whole != nullptr) {
    if (whole->empty()) return 0;
    absl::InlinedVector<const float*, 8> in;
    for (const Source& source : *whole) in.push_back(source.At(range.begin));
    return kernels::SquaredNorm(in.data(), in.size(), range.size(), nonfinite);
  }
  thread_local std::vector<float> scratch;
  if (scratch.size() < range.size()) scratch.resize(range.size());
  SumRange(layout, sources, range, scratch.data());
  const float* in = scratch.data();
  return kernels::SquaredNorm(&in, 1, range.size(), nonfinite);
}

GradientBook::GradientBook(std::shared_ptr<const core::Layout> layout,
                           const core::Partition* partition, core::MemberIndex self,
                           uint32_t local_world, const core::JobPlan* plan,
                           const ShardStore* store)
    : layout_(std::move(layout)),
      plan_(plan),
      store_(store),
      several_members_(partition->members() > 1) {
  const auto& units = layout_->units();
  marks_.assign(local_world, std::vector<Marks>(units.size()));
  units_.resize(units.size());
  blocks_.resize(units.size());
  const uint64_t block = layout_->block_elements();
  size_t index = 0;
  for (UnitIndex u = 0; u < units.size(); ++u) {
    units_[u].touched.resize(units[u].parameters.size());
    const uint32_t parts =
        plan->node_sum ? core::StagedParts(units[u], plan->staged_part_elements) : 0;
    units_[u].accumulated.resize(parts, std::vector<bool>(units[u].parameters.size()));
    const Range shard = partition->TrainableShard(u, self);
    for (uint64_t begin = shard.begin; begin < shard.end; begin += block, ++index) {
      blocks_[u].push_back({index, {begin, std::min(begin + block, shard.end)}});
    }
  }
  squares_.assign(index, 0);
  nonfinite_.assign(index, 0);
}

void GradientBook::Mark(SlotIndex slot, UnitIndex unit, Step step, uint32_t round, bool last,
                        const std::vector<bool>& touched) {
  Marks& marks = marks_[slot][unit];
  if (marks.step != step) marks = Marks{step, 0, {}};
  if (last) marks.round = round;
  marks.touched = touched;
  UnitState& state = units_[unit];
  if (state.touched_step != step) {
    state.touched_step = step;
    std::fill(state.touched.begin(), state.touched.end(), false);
    ForgetAccumulated(&state);
  }
  for (size_t i = 0; i < touched.size(); ++i) {
    if (touched[i]) state.touched[i] = true;
  }
}

std::vector<bool> GradientBook::Accumulate(UnitIndex unit, uint32_t part, bool first,
                                           const std::vector<bool>& touched) {
  if (first) ForgetAccumulated(&units_[unit]);
  std::vector<bool>& has = units_[unit].accumulated[part];
  std::vector<bool> before = has;
  for (size_t i = 0; i < touched.size(); ++i) {
    if (touched[i]) has[i] = true;
  }
  return before;
}

void GradientBook::ConsumeAccumulator(UnitIndex unit) { ForgetAccumulated(&units_[unit]); }

void GradientBook::ForgetAccumulated(UnitState* state) {
  for (std::vector<bool>& part : state->accumulated) std::fill(part.begin(), part.end(), false);
}

// Fills what is missing of the parameter, which lies there from an earlier step, with zeros.
bool GradientBook::HasAccumulated(UnitIndex u, size_t parameter) const {
  const auto& parts = units_[u].accumulated;
  const auto has = [&](const std::vector<bool>& part) { return part[parameter]; };
  if (std::none_of(parts.begin(), parts.end(), has)) return false;
  const core::Unit& unit = layout_->units()[u];
  const core::Parameter& p = layout_->parameters()[unit.parameters[parameter]];
  for (uint32_t part = 0; part < parts.size(); ++part) {
    if (parts[part][parameter]) continue;
    const Range missing = Intersect({p.offset, p.offset + p.elements},
                                    core::StagedPart(unit, plan_->staged_part_elements, part));
    if (missing.empty()) continue;
    memset(store_->accumulator(u, missing.begin), 0, missing.size() * sizeof(float));
  }
  return true;
}

std::shared_ptr<const Sources> GradientBook::NodeSources(
    UnitIndex unit, Step step, uint32_t round,
    const std::vector<std::shared_ptr<ClientSlot>>& clients) const {
  auto sources = std::make_shared<Sources>();
  sources->unit = unit;
  sources->of.resize(layout_->units()[unit].parameters.size());
  if (plan_->node_sum) {
    for (size_t i = 0; i < sources->of.size(); ++i) {
      if (units_[unit].touched_step == step && HasAccumulated(unit, i)) {
        sources->of[i].push_back({store_->accumulator(unit, 0), 0});
      }
    }
    return sources;
  }
  std::vector<const ClientSlot*> by_rank;
  for (const auto& client : clients) {
    if (client == nullptr) continue;
    const Marks& marks = marks_[client->slot][unit];
    if (marks.step != step || marks.round == 0) continue;
    if (round != 0 && marks.round != round) continue;
    by_rank.push_back(client.get());
    sources->keep_alive.push_back(client);
  }
  std::sort(by_rank.begin(), by_rank.end(),
            [](const ClientSlot* a, const ClientSlot* b) { return a->rank < b->rank; });
  for (const ClientSlot* client : by_rank) {
    auto* const data =
        reinterpret_cast<float*>(client->gradient() + plan_->gradient_offsets[unit]);
    const std::vector<bool>& touched = marks_[client->slot][unit].touched;
    for (size_t i = 0; i < sources->of.size(); ++i) {
      if (touched[i]) sources->of[i].push_back({data, 0});
    }
  }
  return sources;
}

std::shared_ptr<const Sources> GradientBook::FinalSources(
    UnitIndex unit, Step step, const std::vector<std::shared_ptr<ClientSlot>>& clients) const {
  if (!several_members_) return NodeSources(unit, step, /*round=*/0, clients);
  auto sources = std::make_shared<Sources>();
  sources->unit = unit;
  sources->of.resize(layout_->units()[unit].parameters.size());
  const Range range = store_->GradientRange(unit);
  // Reduced on all members as soon as one of them had a gradient; else there is none.
  if (units_[unit].reduced_step != step || range.empty()) return sources;
  for (auto& of : sources->of) of.push_back({store_->gradient(unit, range.begin), range.begin});
  return sources;
}

std::vector<bool> GradientBook::Touched(Step step) const {
  std::vector<bool> touched(layout_->parameters().size());
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (units_[u].touched_step != step) continue;
    const auto& parameters = layout_->units()[u].parameters;
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (units_[u].touched[i]) touched[parameters[i]] = true;
    }
  }
  return touched;
}

void GradientBook::SetReduced(UnitIndex unit, Step step, uint32_t round) {
  UnitState& state = units_[unit];
  if (state.reduced_step != step) state.squares_round = 0;
  state.reduced_step = step;
  state.reduced_round = round;
}

bool GradientBook::SquaresMissing(UnitIndex unit, Step step) const {
  const UnitState& state = units_[unit];
  return state.reduced_step == step && state.squares_round != state.reduced_round;
}

void GradientBook::SetSquaresDone(UnitIndex unit) {
  units_[unit].squares_round = units_[unit].reduced_round;
}

void GradientBook::SetSquaresMissing(UnitIndex unit) { units_[unit].squares_round = 0; }

std::vector<double> GradientBook::Squares(Step step, bool* nonfinite) const {
  std::vector<double> squares(squares_.size(), 0.0);
  for (UnitIndex u = 0; u < units_.size(); ++u) {
    if (units_[u].reduced_step != step) continue;
    for (const Block& block : blocks_[u]) {
      squares[block.index] = squares_[block.index];
      if (nonfinite_[block.index] != 0) *nonfinite = true;
    }
  }
  return squares;
}

void GradientBook::Drop() {
  for (auto& slot : marks_) {
    for (Marks& marks : slot) marks = Marks{};
  }
  for (UnitState& state : units_) {
    state.touched_step = 0;
    state.reduced_step = 0;
    state.reduced_round = 0;
    state.squares_round = 0;
    ForgetAccumulated(&state);
  }
}

}  // namespace zerod::engine
