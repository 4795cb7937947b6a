// SPDX-License-Identifier: Apache-2.0
//
// ALL_GATHER: the owners' shards into the windows of the members that want the unit.
#include <algorithm>
#include <utility>

#include "daemon/engine/movements.h"
#include "daemon/engine/narrow.h"

namespace zerod::engine {
namespace {

using core::Intersect;
using core::MemberIndex;
using core::Range;

class Gather : public Movement {
 public:
  Gather(const MoveContext* context, const core::StartAllGather& action, UnitCopy copy)
      : c_(*context),
        unit_(action.unit),
        wants_(action.wants),
        receive_(action.receive),
        // Up to stage 2 the window's copy of the own shard is the one that is kept up to date.
        from_window_(c_.plan->master_in_window || c_.stage < 3),
        element_bytes_(core::DTypeBytes(c_.layout->dtype())),
        copy_(std::move(copy)) {}

  size_t pieces() const override {
    size_t most = 0;
    for (MemberIndex m = 0; m < c_.members(); ++m) most = std::max(most, c_.Cuts(Shard(m)));
    return most;
  }

  size_t PrepareParts(size_t piece) const override {
    const Range own = c_.Cut(Shard(c_.self), piece);
    return from_window_ && Others() && !own.empty() && copy_.Contiguous(own) == nullptr ? 1 : 0;
  }
  void Prepare(size_t piece, size_t /*part*/, std::byte* staging) override {
    copy_.Load(c_.Cut(Shard(c_.self), piece), SendFrom(staging));
  }

  void Exchange(size_t piece, std::byte* staging, Transfers* sends,
                Transfers* receives) override {
    const Range own = c_.Cut(Shard(c_.self), piece);
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      if (m == c_.self) continue;
      if (Wants(m) && !own.empty()) {
        sends->push_back({m, SendSource(own, staging), own.size() * element_bytes_});
      }
      const Range theirs = c_.Cut(Shard(m), piece);
      if (Wants(c_.self) && !theirs.empty()) {
        // Without room the bytes must be taken all the same: the others send them.
        std::byte* place = receive_ ? copy_.Contiguous(theirs) : nullptr;
        void* to = place != nullptr ? static_cast<void*>(place) : c_.ReceiveArea(staging, m);
        receives->push_back({m, to, theirs.size() * element_bytes_});
      }
    }
  }

  size_t FinishParts(size_t piece) const override {
    if (!receive_) return 0;
    const size_t own = from_window_ ? 0 : PartsOf(c_.Cut(Shard(c_.self), piece).size());
    return own + (c_.members() - 1);
  }
  void Finish(size_t piece, size_t part, std::byte* staging) override {
    const Range own = c_.Cut(Shard(c_.self), piece);
    const size_t own_parts = from_window_ ? 0 : PartsOf(own.size());
    if (part < own_parts) return CopyOwn(PartOf(own, part));
    MemberIndex m = static_cast<MemberIndex>(part - own_parts);
    if (m >= c_.self) ++m;
    const Range theirs = c_.Cut(Shard(m), piece);
    if (theirs.empty() || copy_.Contiguous(theirs) != nullptr) return;
    copy_.Store(theirs, c_.ReceiveArea(staging, m));
  }

 private:
  Range Shard(MemberIndex m) const { return c_.partition->Shard(unit_, m); }
  bool Wants(MemberIndex m) const { return (wants_ >> m & 1) != 0; }
  bool Others() const { return (wants_ & ~(core::MemberSet{1} << c_.self)) != 0; }
  // Where a shard that lies scattered in the window is put together: the area of any one peer.
  float* SendFrom(std::byte* staging) const {
    return c_.SendArea(staging, c_.self == 0 ? 1 : 0);
  }
  void* SendSource(Range own, std::byte* staging) const {
    if (from_window_) {
      std::byte* place = copy_.Contiguous(own);
      return place != nullptr ? static_cast<void*>(place) : SendFrom(staging);
    }
    if (element_bytes_ == 2) return c_.store->copy(unit_, own.begin);
    return c_.store->master(unit_, own.begin);
  }
  void CopyOwn(Range range) const {
    if (element_bytes_ == 4) return copy_.Store(range, c_.store->master(unit_, range.begin));
    const Range copied = Intersect(range, c_.store->CopyRange(unit_));
    if (!copied.empty()) {
      copy_.Store(copied, c_.store->copy(unit_, copied.begin));
      range.end = copied.begin;  // copies are kept of all, or of what has no master: the end
    }
    const Range mastered = Intersect(range, c_.store->MasterRange(unit_));
    if (mastered.empty()) return;
    copy_.ForEach(mastered, [&](std::byte* data, Range piece) {
      Narrow(c_.layout->dtype(), c_.store->master(unit_, piece.begin), data, piece.size());
    });
  }

  const MoveContext& c_;
  const core::UnitIndex unit_;
  const core::MemberSet wants_;
  const bool receive_;
  const bool from_window_;
  const uint64_t element_bytes_;
  const UnitCopy copy_;
};

}  // namespace

std::shared_ptr<Movement> MakeGather(const MoveContext* context,
                                     const core::StartAllGather& action, UnitCopy copy) {
  return std::make_shared<Gather>(context, action, std::move(copy));
}

}  // namespace zerod::engine
