// SPDX-License-Identifier: Apache-2.0
//
// REDUCE_SCATTER: each member sends each owner its node's sum of the owner's slice, in the type of
// MoveContext::wire; the owner adds the nodes in rank order, in fp32, its own as it is. At stage 0
// the owners then give everyone the reduced slices, in fp32: what is applied has the same bits at
// every stage.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "daemon/engine/movements.h"
#include "daemon/engine/narrow.h"
#include "kernels/cpu/kernels.h"

namespace zerod::engine {
namespace {

using core::MemberIndex;
using core::Range;

constexpr uint64_t kScratchElements = 16 * 1024;  // stays in the first cache levels

class Reduce : public Movement {
 public:
  Reduce(const MoveContext* context, const core::StartReduce& action,
         std::shared_ptr<const Sources> sources)
      : c_(*context),
        unit_(action.unit),
        add_(action.round > 1),
        wire_bytes_(core::DTypeBytes(context->wire)),
        sources_(std::move(sources)) {}

  size_t pieces() const override {
    if (c_.members() == 1) return 0;
    size_t most = 0;
    for (MemberIndex m = 0; m < c_.members(); ++m) most = std::max(most, c_.Cuts(Slice(m)));
    return most;
  }

  // Only what must be summed, rounded, or has holes is put together before it is sent.
  size_t PrepareParts(size_t piece) const override {
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      if (m != c_.self && MustSum(c_.Cut(Slice(m), piece))) return c_.members() - 1;
    }
    return 0;
  }
  void Prepare(size_t piece, size_t part, std::byte* staging) override {
    MemberIndex m = static_cast<MemberIndex>(part);
    if (m >= c_.self) ++m;
    const Range slice = c_.Cut(Slice(m), piece);
    if (!MustSum(slice)) return;
    float* const area = c_.SendArea(staging, m);
    if (c_.wire == core::DType::kFloat32) return SumRange(*c_.layout, *sources_, slice, area);
    std::vector<float> scratch(kScratchElements);
    for (uint64_t begin = slice.begin; begin < slice.end; begin += kScratchElements) {
      const Range now{begin, std::min(begin + kScratchElements, slice.end)};
      const float* sum = OnlySource(*c_.layout, *sources_, now);
      if (sum == nullptr) {
        SumRange(*c_.layout, *sources_, now, scratch.data());
        sum = scratch.data();
      }
      Narrow(c_.wire, sum, OnWire(area, begin - slice.begin), now.size());
    }
  }

  void Exchange(size_t piece, std::byte* staging, Transfers* sends,
                Transfers* receives) override {
    const Range own = c_.Cut(Slice(c_.self), piece);
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      if (m == c_.self) continue;
      const Range theirs = c_.Cut(Slice(m), piece);
      if (!theirs.empty()) {
        float* const from = MustSum(theirs)
                                ? c_.SendArea(staging, m)
                                : const_cast<float*>(OnlySource(*c_.layout, *sources_, theirs));
        sends->push_back({m, from, theirs.size() * wire_bytes_});
      }
      if (!own.empty()) {
        receives->push_back({m, c_.ReceiveArea(staging, m), own.size() * wire_bytes_});
      }
    }
  }

  size_t FinishParts(size_t piece) const override {
    return PartsOf(c_.Cut(Slice(c_.self), piece).size());
  }
  void Finish(size_t piece, size_t part, std::byte* staging) override {
    const Range own = c_.Cut(Slice(c_.self), piece);
    const Range range = PartOf(own, part);
    std::vector<float> scratch(2 * kScratchElements);
    float* const node_sum = scratch.data();
    float* const sum = node_sum + kScratchElements;
    for (uint64_t begin = range.begin; begin < range.end; begin += kScratchElements) {
      const Range now{begin, std::min(begin + kScratchElements, range.end)};
      const float* mine = OnlySource(*c_.layout, *sources_, now);
      if (mine == nullptr) {
        SumRange(*c_.layout, *sources_, now, node_sum);
        mine = node_sum;
      }
      float* const out = c_.store->gradient(unit_, begin);
      SumNodes(staging, begin - own.begin, mine, add_ ? sum : out, now.size());
      if (add_) kernels::Accumulate(sum, out, now.size());
    }
  }

  void SecondExchange(size_t piece, Transfers* sends, Transfers* receives) override {
    if (c_.stage != 0) return;
    const Range own = c_.Cut(Slice(c_.self), piece);
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      if (m == c_.self) continue;
      const Range theirs = c_.Cut(Slice(m), piece);
      if (!own.empty()) sends->push_back({m, Gradient(own), own.size() * sizeof(float)});
      if (!theirs.empty()) {
        receives->push_back({m, Gradient(theirs), theirs.size() * sizeof(float)});
      }
    }
  }

 private:
  // What `area` holds in the type of the wire, from the `i`-th element on.
  void* OnWire(float* area, uint64_t i) const {
    return reinterpret_cast<std::byte*>(area) + i * wire_bytes_;
  }
  // `n` elements from the `offset`-th of the own slice on, of all nodes in order; `mine`: this
  // node's.
  void SumNodes(std::byte* staging, uint64_t offset, const float* mine, float* out,
                uint64_t n) const {
    if (c_.wire == core::DType::kFloat32) {
      absl::InlinedVector<const float*, 8> nodes;
      for (MemberIndex m = 0; m < c_.members(); ++m) {
        nodes.push_back(m == c_.self ? mine : c_.ReceiveArea(staging, m) + offset);
      }
      return kernels::Sum(nodes.data(), nodes.size(), out, n);
    }
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      if (m == c_.self) {
        m == 0 ? Widen(core::DType::kFloat32, mine, out, n) : kernels::Accumulate(mine, out, n);
        continue;
      }
      const void* const theirs = OnWire(c_.ReceiveArea(staging, m), offset);
      m == 0 ? Widen(c_.wire, theirs, out, n) : AccumulateWide(c_.wire, theirs, out, n);
    }
  }

  Range Slice(MemberIndex m) const { return c_.partition->TrainableShard(unit_, m); }
  bool MustSum(Range slice) const {
    return !slice.empty() && (c_.wire != core::DType::kFloat32 ||
                              OnlySource(*c_.layout, *sources_, slice) == nullptr);
  }
  float* Gradient(Range range) const { return c_.store->gradient(unit_, range.begin); }

  const MoveContext& c_;
  const core::UnitIndex unit_;
  const bool add_;
  const uint64_t wire_bytes_;
  const std::shared_ptr<const Sources> sources_;
};

}  // namespace

std::shared_ptr<Movement> MakeReduce(const MoveContext* context, const core::StartReduce& action,
                                     std::shared_ptr<const Sources> sources) {
  return std::make_shared<Reduce>(context, action, std::move(sources));
}

}  // namespace zerod::engine
