// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/layout.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "daemon/core/units.h"

namespace zerod::core {
namespace {

// proto/shm/format.h's values; core may not include it, tests/core asserts that they agree.
constexpr uint64_t kChunkBytes = 64 * 1024;
constexpr uint64_t kParamAlign = 32;
constexpr uint32_t kGroupsMax = 64;
constexpr uint64_t kElementsMax = uint64_t{1} << 40;
constexpr size_t kParametersMax = 1 << 20;

constexpr uint64_t kBlockMax = 64 * 1024;
constexpr uint64_t kBlockMin = 256;
constexpr uint64_t kBlocksWanted = 256;

uint64_t RoundUp(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

absl::StatusOr<uint64_t> Elements(const ParameterDescription& p) {
  uint64_t n = 1;
  for (int64_t d : p.shape) {
    if (d < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("the parameter '", p.name, "' has a negative dimension ", d));
    }
    if (d != 0 && n > kElementsMax / static_cast<uint64_t>(d)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the parameter '", p.name, "' has more than 2^40 elements"));
    }
    n *= static_cast<uint64_t>(d);
  }
  return n;
}

absl::Status CheckMatrix(const Parameter& p) {
  if (p.shape.size() == 2 || p.shape.size() == 4) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the parameter '", p.name, "' has ", p.shape.size(),
                   " dimensions, and Muon updates matrices, and filters of 4: set its use_muon to "
                   "False, so that Adam updates it"));
}

// 64 Ki, or the power of two that gives a small model some 256 blocks.
uint64_t BlockElements(uint64_t elements) {
  uint64_t block = kBlockMax;
  while (block > kBlockMin && elements / block < kBlocksWanted) block /= 2;
  return block;
}

}  // namespace

Range Intersect(Range a, Range b) {
  Range r{std::max(a.begin, b.begin), std::min(a.end, b.end)};
  if (r.end < r.begin) r.end = r.begin;
  return r;
}

uint32_t StagedParts(const Unit& unit, uint64_t part_elements) {
  const uint64_t parts = (unit.trainable_elements + part_elements - 1) / part_elements;
  return static_cast<uint32_t>(std::max<uint64_t>(1, parts));
}

Range StagedPart(const Unit& unit, uint64_t part_elements, uint32_t part) {
  const uint64_t begin = std::min(part * part_elements, unit.trainable_elements);
  return {begin, std::min(begin + part_elements, unit.trainable_elements)};
}

absl::StatusOr<Layout> Layout::Build(const ModelDescription& model,
                                     const std::map<std::string, std::string>& unit_overrides) {
  if (model.parameters.empty()) {
    return absl::InvalidArgumentError("the model has no parameters");
  }
  if (model.parameters.size() > kParametersMax) {
    return absl::InvalidArgumentError("the model has more than 2^20 parameter tensors");
  }
  ASSIGN_OR_RETURN(UnitAssignment assignment, AssignUnits(model, unit_overrides));

  Layout layout;
  layout.dtype_ = model.dtype;
  layout.groups_ = model.groups;
  std::set<std::string> names;
  layout.units_.resize(assignment.names.size());
  for (size_t u = 0; u < assignment.names.size(); ++u) layout.units_[u].name = assignment.names[u];
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    const ParameterDescription& d = model.parameters[i];
    if (!names.insert(d.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("the parameter '", d.name, "' is listed twice"));
    }
    if (d.group >= kGroupsMax) {
      return absl::InvalidArgumentError(absl::StrCat("the parameter '", d.name, "' is in group ",
                                                     d.group, ": at most ", kGroupsMax,
                                                     " parameter groups are served"));
    }
    if (d.trainable && !model.groups.empty() && d.group >= model.groups.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the parameter '", d.name, "' is in group ", d.group,
                       " of an optimizer with ", model.groups.size(), " groups"));
    }
    Parameter p;
    p.name = d.name;
    p.shape = d.shape;
    p.trainable = d.trainable;
    p.group = d.group;
    p.unit = assignment.of[i];
    ASSIGN_OR_RETURN(p.elements, Elements(d));
    layout.parameter_elements_ += p.elements;
    if (layout.parameter_elements_ > kElementsMax) {
      return absl::InvalidArgumentError("the model has more than 2^40 parameter elements");
    }
    layout.units_[p.unit].parameters.push_back(static_cast<uint32_t>(i));
    layout.parameters_.push_back(std::move(p));
  }

  bool matrices = false;
  for (const Parameter& p : layout.parameters_) {
    if (!p.trainable) continue;
    layout.state_tensors_ =
        std::max(layout.state_tensors_, StateTensors(layout.optimizer(p.group)));
    if (!layout.IsByMatrix(p)) continue;
    matrices = true;
    RETURN_IF_ERROR(CheckMatrix(p));
  }
  layout.Place(/*matrix_align=*/1);
  layout.block_elements_ = BlockElements(layout.elements_);
  if (matrices) layout.Place(layout.block_elements_);
  if (layout.chunks_ >= std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError("the model needs more than 2^32 chunks of 64 KiB");
  }
  for (Unit& unit : layout.units_) unit.blocks = layout.Blocks({0, unit.elements});

  layout.hash_ = layout.ComputeHash();
  return layout;
}

// Gives every parameter its offset, trainable ones first, and every unit its chunks. What is
// updated by matrix comes first of all, from multiples of `matrix_align`.
void Layout::Place(uint64_t matrix_align) {
  chunks_ = elements_ = trainable_elements_ = 0;
  const auto rank = [&](uint32_t i) {
    return IsByMatrix(parameters_[i]) ? 0 : parameters_[i].trainable ? 1 : 2;
  };
  for (Unit& unit : units_) {
    unit.elements = unit.trainable_elements = 0;
    std::stable_sort(unit.parameters.begin(), unit.parameters.end(),
                     [&](uint32_t a, uint32_t b) { return rank(a) < rank(b); });
    for (uint32_t i : unit.parameters) {
      Parameter& p = parameters_[i];
      p.offset = IsByMatrix(p) ? RoundUp(unit.elements, matrix_align) : unit.elements;
      // An empty parameter takes a place too, so that every parameter has an address of its own.
      unit.elements = p.offset + RoundUp(std::max<uint64_t>(p.elements, 1), kParamAlign);
      if (p.trainable) unit.trainable_elements = unit.elements;
    }
    unit.chunks = RoundUp(unit.elements * DTypeBytes(dtype_), kChunkBytes) / kChunkBytes;
    unit.first_chunk = chunks_;
    chunks_ += unit.chunks;
    elements_ += unit.elements;
    trainable_elements_ += unit.trainable_elements;
  }
}

bool Layout::AnyByTensor(const std::vector<bool>& touched) const {
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const Parameter& parameter = parameters_[p];
    if (touched[p] && parameter.trainable && ByTensor(optimizer(parameter.group))) return true;
  }
  return false;
}

std::vector<TensorPiece> Layout::TensorPieces(UnitIndex u, Range range,
                                              const std::vector<bool>& touched) const {
  std::vector<TensorPiece> pieces;
  for (const uint32_t index : units_[u].parameters) {
    const Parameter& p = parameters_[index];
    if (!p.trainable) break;  // the others come behind
    if (!touched[index] || !ByTensor(optimizer(p.group))) continue;
    Range left = Intersect(range, {p.offset, p.offset + p.elements});
    while (!left.empty()) {
      const uint64_t block_end = (left.begin / block_elements_ + 1) * block_elements_;
      const uint64_t end = std::min(left.end, block_end);
      pieces.push_back({index, {left.begin, end}});
      left.begin = end;
    }
  }
  return pieces;
}

Hash128 Layout::ComputeHash() const {
  Hasher h;
  h.Add("zerod layout 2").Add(uint64_t(dtype_)).Add(uint64_t{units_.size()});
  for (const Unit& unit : units_) {
    h.Add(unit.name).Add(unit.elements).Add(uint64_t{unit.parameters.size()});
    for (uint32_t i : unit.parameters) {
      const Parameter& p = parameters_[i];
      h.Add(uint64_t{i}).Add(p.name).Add(uint64_t{p.shape.size()});
      for (int64_t d : p.shape) h.Add(static_cast<uint64_t>(d));
      h.Add(p.offset).Add(uint64_t{p.group}).Add(uint64_t{p.trainable});
      if (p.trainable) h.Add(uint64_t(optimizer(p.group)));
    }
  }
  return h.Finish();
}

Partition::Partition(const Layout& layout, uint32_t members) : members_(members) {
  const uint64_t block = layout.block_elements();
  std::vector<uint64_t> load(members, 0);
  for (const Unit& unit : layout.units()) {
    const bool matrices =
        !unit.parameters.empty() && layout.IsByMatrix(layout.parameters()[unit.parameters[0]]);
    const std::vector<uint64_t> blocks =
        matrices ? CutBetweenMatrices(layout, unit, load) : CutEvenly(layout, unit, load);
    uint64_t begin = 0;
    for (MemberIndex m = 0; m < members; ++m) {
      Range r{begin, std::min(begin + blocks[m] * block, unit.elements)};
      shards_.push_back(r);
      load[m] += r.size();
      begin = r.end;
    }
    trainable_.push_back(unit.trainable_elements);
  }
}

// Blocks of the unit for each member that has `load` elements so far.
std::vector<uint64_t> Partition::CutEvenly(const Layout& layout, const Unit& unit,
                                           const std::vector<uint64_t>& load) const {
  std::vector<MemberIndex> order(members_);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](MemberIndex a, MemberIndex b) { return load[a] < load[b]; });
  std::vector<uint64_t> blocks(members_, unit.blocks / members_);
  for (uint64_t i = 0; i < unit.blocks % members_; ++i) ++blocks[order[i]];
  // Short last blocks all fall to the later members: what has gathered is evened out.
  const MemberIndex least = order.front();
  const MemberIndex most = order.back();
  if (load[most] - load[least] >= layout.block_elements() && blocks[most] > 0 &&
      unit.blocks % members_ == 0) {
    --blocks[most];
    ++blocks[least];
  }
  return blocks;
}

// The same where only whole runs of blocks can be given: those of a matrix, or one of the others.
// The most that any member has is then least: members in order take what fits below a bound.
std::vector<uint64_t> Partition::CutBetweenMatrices(const Layout& layout, const Unit& unit,
                                                    const std::vector<uint64_t>& load) const {
  const uint64_t block = layout.block_elements();
  std::vector<uint64_t> runs;  // in blocks
  uint64_t next = 0;
  for (const uint32_t index : unit.parameters) {
    const Parameter& p = layout.parameters()[index];
    if (!layout.IsByMatrix(p)) break;
    const uint64_t end = (p.offset + std::max<uint64_t>(p.elements, 1) + block - 1) / block;
    runs.push_back(end - next);
    next = end;
  }
  runs.resize(runs.size() + (unit.blocks - next), 1);
  std::vector<uint64_t> blocks;
  const auto fits = [&](uint64_t bound) {
    blocks.assign(members_, 0);
    size_t run = 0;
    for (MemberIndex m = 0; m < members_; ++m) {
      while (run < runs.size() && load[m] + (blocks[m] + runs[run]) * block <= bound) {
        blocks[m] += runs[run++];
      }
    }
    return run == runs.size();
  };
  uint64_t low = 0;  // does not fit, or is the least
  uint64_t high = *std::max_element(load.begin(), load.end()) + unit.blocks * block;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (fits(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  fits(high);
  return blocks;
}

Range Partition::TrainableShard(UnitIndex u, MemberIndex m) const {
  return Intersect(Shard(u, m), {0, trainable_[u]});
}

uint64_t Partition::ShardElements(MemberIndex m) const {
  uint64_t n = 0;
  for (size_t u = 0; u < trainable_.size(); ++u) n += Shard(u, m).size();
  return n;
}

uint64_t Partition::TrainableShardElements(MemberIndex m) const {
  uint64_t n = 0;
  for (size_t u = 0; u < trainable_.size(); ++u) n += TrainableShard(u, m).size();
  return n;
}

}  // namespace zerod::core
