// SPDX-License-Identifier: Apache-2.0
//
// The layout of a job: which units there are, where each parameter lies in its unit, and which
// part of each unit a member owns. The same on every member, a function of the model's description
// and nothing else, identified by a hash.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/hash.h"
#include "daemon/core/types.h"

namespace zerod::core {

enum class DType : uint8_t { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr uint64_t DTypeBytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }
constexpr const char* DTypeName(DType t) {  // torch's
  return t == DType::kFloat32 ? "float32" : t == DType::kBFloat16 ? "bfloat16" : "float16";
}

struct ModuleDescription {
  std::string path;  // "" is the root, which comes first; a parent comes before its children
  std::string type;  // equal strings: like siblings
  bool is_container = false;  // a ModuleList or Sequential
  bool leaf = false;  // gathered as one: the parameters of all modules within are its unit's
};

struct ParameterDescription {
  std::string name;
  std::vector<int64_t> shape;
  bool trainable = true;
  uint32_t group = 0;
  std::vector<std::string> modules;  // every module that registers it
};

// As a client describes it. Untrusted.
struct ModelDescription {
  std::vector<ModuleDescription> modules;
  std::vector<ParameterDescription> parameters;
  DType dtype = DType::kFloat32;
  std::vector<OptimizerKind> groups;  // per parameter group; empty: all are kAdam
};

struct Parameter {
  std::string name;
  std::vector<int64_t> shape;
  uint64_t elements = 0;
  bool trainable = true;
  uint32_t group = 0;
  UnitIndex unit = 0;
  uint64_t offset = 0;  // elements from the unit's start, a multiple of kParamAlignElements; a
                        // block boundary for what is updated by matrix
};

struct Unit {
  std::string name;                  // path of its module
  std::vector<uint32_t> parameters;  // indices, by offset: the trainable ones first, of these what
                                     // is updated by matrix
  uint64_t elements = 0;             // padded to the parameter alignment
  uint64_t trainable_elements = 0;   // gradients and moments exist for [0, trainable_elements)
  uint64_t first_chunk = 0;          // in the clients' address space
  uint64_t chunks = 0;
  uint64_t blocks = 0;               // of block_elements, the last may be short
};

struct Range {  // elements of a unit, [begin, end)
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
};
Range Intersect(Range a, Range b);
// node_sum: a unit's trainable elements are handed over in parts of `part_elements`, so that
// staging need not hold the gradient of a large embedding. There is one at least.
uint32_t StagedParts(const Unit& unit, uint64_t part_elements);
Range StagedPart(const Unit& unit, uint64_t part_elements, uint32_t part);

// Elements of one parameter that lie in one block of its unit.
struct TensorPiece {
  uint32_t parameter = 0;  // of the layout
  Range elements;          // of the unit
};

class Layout {
 public:
  // `unit_overrides`: module path -> unit name: those modules' parameters form that unit.
  // INVALID_ARGUMENT where the description contradicts itself; the sentence names what.
  static absl::StatusOr<Layout> Build(const ModelDescription& model,
                                      const std::map<std::string, std::string>& unit_overrides);

  DType dtype() const { return dtype_; }
  const std::vector<Unit>& units() const { return units_; }
  // In the order of the description.
  const std::vector<Parameter>& parameters() const { return parameters_; }
  uint64_t elements() const { return elements_; }              // padded, all units
  uint64_t trainable_elements() const { return trainable_elements_; }
  uint64_t parameter_elements() const { return parameter_elements_; }  // without padding
  uint64_t chunks() const { return chunks_; }
  // Norms are summed, and shards cut, in blocks of this many elements: 64 Ki, fewer in a small
  // model so that its shards balance. A power of two, a function of the layout alone.
  uint64_t block_elements() const { return block_elements_; }
  // Blocks that [range) touches; REQUIRES: it begins on a block boundary.
  uint64_t Blocks(Range range) const {
    return range.empty() ? 0 : (range.size() + block_elements_ - 1) / block_elements_;
  }
  // What updates the parameters of a group; every group of a trainable parameter has one.
  OptimizerKind optimizer(uint32_t group) const {
    return groups_.empty() ? OptimizerKind::kAdam : groups_[group];
  }
  // True where a step that touches these parameters updates some of them by tensor.
  bool AnyByTensor(const std::vector<bool>& touched) const;
  bool IsByMatrix(const Parameter& p) const {
    return p.trainable && ByMatrix(optimizer(p.group));
  }
  // Of those parameters, what lies in `range` of the unit, in order: the pieces over which squares
  // are summed, so that the sum of all of them in layout order has the same bits whoever owns them.
  // REQUIRES: `range` begins on a block boundary.
  std::vector<TensorPiece> TensorPieces(UnitIndex u, Range range,
                                        const std::vector<bool>& touched) const;
  // Tensors of optimizer state kept for every trainable element: the most that any group needs.
  uint32_t state_tensors() const { return state_tensors_; }
  // There is something of this kind.
  bool Has(StateKind kind) const {
    return kind == StateKind::kGradient || static_cast<uint32_t>(kind) <= state_tensors_;
  }
  uint64_t UnitBytes(UnitIndex u) const { return units_[u].elements * DTypeBytes(dtype_); }
  const Hash128& hash() const { return hash_; }

 private:
  void Place(uint64_t matrix_align);
  Hash128 ComputeHash() const;

  DType dtype_ = DType::kFloat32;
  std::vector<Unit> units_;
  std::vector<Parameter> parameters_;
  std::vector<OptimizerKind> groups_;
  uint32_t state_tensors_ = 0;
  uint64_t elements_ = 0;
  uint64_t trainable_elements_ = 0;
  uint64_t parameter_elements_ = 0;
  uint64_t chunks_ = 0;
  uint64_t block_elements_ = 0;
  Hash128 hash_;
};

// Which elements of each unit each member owns: whole blocks, contiguous, balanced over the
// layout (the members that have least so far take the odd blocks). What is updated by matrix is
// whole on one member; there the balance is as good as the matrices' sizes allow.
class Partition {
 public:
  Partition(const Layout& layout, uint32_t members);
  uint32_t members() const { return members_; }
  Range Shard(UnitIndex u, MemberIndex m) const { return shards_[u * members_ + m]; }
  // The part of it that has gradients and moments.
  Range TrainableShard(UnitIndex u, MemberIndex m) const;
  // Sums over the units.
  uint64_t ShardElements(MemberIndex m) const;
  uint64_t TrainableShardElements(MemberIndex m) const;

 private:
  std::vector<uint64_t> CutEvenly(const Layout& layout, const Unit& unit,
                                  const std::vector<uint64_t>& load) const;
  std::vector<uint64_t> CutBetweenMatrices(const Layout& layout, const Unit& unit,
                                           const std::vector<uint64_t>& load) const;

  uint32_t members_;
  std::vector<Range> shards_;
  std::vector<uint64_t> trainable_;
};

}  // namespace zerod::core
