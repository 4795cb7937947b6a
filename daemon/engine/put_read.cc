// SPDX-License-Identifier: Apache-2.0
//
// PUT: a client's fp32 values into whatever keeps them. READ: the other way.
#include <algorithm>
#include <cstring>
#include <utility>

#include "daemon/engine/movements.h"
#include "daemon/engine/narrow.h"

namespace zerod::engine {
namespace {

using core::Intersect;
using core::MemberIndex;
using core::Range;

// Which of the optimizer's tensors it is. REQUIRES: one of them.
int StateTensor(core::StateKind kind) {
  return static_cast<int>(kind) - static_cast<int>(core::StateKind::kExpAvg);
}

class Put : public Movement {
 public:
  Put(const MoveContext* context, const core::StartPut& action,
      std::shared_ptr<ClientSlot> origin, UnitCopy copy, std::shared_ptr<const Sources> sources)
      : c_(*context),
        unit_(action.unit),
        all_{action.begin, action.begin + action.count},
        kind_(action.kind),
        origin_member_(action.origin),
        resident_(c_.plan->window.resident[unit_]),
        origin_(std::move(origin)),
        copy_(std::move(copy)),
        sources_(std::move(sources)) {}

  size_t pieces() const override { return c_.Cuts(all_); }

  // The client may write its area at any time: one private copy goes to everybody, so that all
  // members store the same. With one member there is nobody to disagree with.
  size_t PrepareParts(size_t /*piece*/) const override {
    return IsOrigin() && c_.members() > 1 ? 1 : 0;
  }
  void Prepare(size_t piece, size_t /*part*/, std::byte* staging) override {
    const Range range = c_.Cut(all_, piece);
    memcpy(Private(staging), Given(range.begin), range.size() * sizeof(float));
  }

  void Exchange(size_t piece, std::byte* staging, Transfers* sends,
                Transfers* receives) override {
    const Range range = c_.Cut(all_, piece);
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      const Range needed = Intersect(range, Needs(m));
      if (needed.empty() || m == origin_member_) continue;
      if (IsOrigin()) {
        sends->push_back({m, Private(staging) + (needed.begin - range.begin),
                          needed.size() * sizeof(float)});
      } else if (m == c_.self) {
        receives->push_back({origin_member_, c_.ReceiveArea(staging, origin_member_),
                             needed.size() * sizeof(float)});
      }
    }
  }

  size_t FinishParts(size_t piece) const override {
    return PartsOf(Intersect(c_.Cut(all_, piece), Needs(c_.self)).size());
  }
  void Finish(size_t piece, size_t part, std::byte* staging) override {
    const Range range = c_.Cut(all_, piece);
    const Range needed = Intersect(range, Needs(c_.self));
    if (needed.empty()) return;
    const Range now = PartOf(needed, part);
    const float* values;
    if (!IsOrigin()) {
      values = c_.ReceiveArea(staging, origin_member_) + (now.begin - needed.begin);
    } else if (c_.members() > 1) {
      values = Private(staging) + (now.begin - range.begin);
    } else {
      values = Given(now.begin);
    }
    Store(now, values);
  }

 private:
  bool IsOrigin() const { return origin_member_ == c_.self; }
  float* Private(std::byte* staging) const { return c_.SendArea(staging, c_.self == 0 ? 1 : 0); }
  const float* Given(uint64_t element) const {
    return reinterpret_cast<const float*>(origin_->transfer()) + (element - all_.begin);
  }
  // A copy that is always there, or a full master, takes all; else an owner takes its shard.
  Range Needs(MemberIndex m) const {
    if (kind_ != core::StateKind::kMaster) {
      if (!c_.store->full()) return c_.partition->TrainableShard(unit_, m);
      return {0, c_.layout->units()[unit_].trainable_elements};
    }
    if (c_.stage < 3 || resident_ || c_.members() == 1) {
      return {0, c_.layout->units()[unit_].elements};
    }
    return c_.partition->Shard(unit_, m);
  }

  void Store(Range range, const float* values) const {
    if (kind_ == core::StateKind::kGradient) {
      return SetRange(*c_.layout, *sources_, range, values);
    }
    if (kind_ != core::StateKind::kMaster) {
      const int which = StateTensor(kind_);
      if (c_.store->narrow_states()) {
        return Narrow(c_.layout->dtype(), values,
                      c_.store->narrow_moment(which, unit_, range.begin), range.size());
      }
      memcpy(c_.store->moment(which, unit_, range.begin), values, range.size() * sizeof(float));
      return;
    }
    const Range kept = Intersect(range, c_.store->MasterRange(unit_));
    if (!kept.empty() && !c_.plan->master_in_window) {
      const float* from = values + (kept.begin - range.begin);
      memcpy(c_.store->master(unit_, kept.begin), from, kept.size() * sizeof(float));
    }
    const Range copied = Intersect(range, c_.store->CopyRange(unit_));
    if (!copied.empty()) {
      Narrow(c_.layout->dtype(), values + (copied.begin - range.begin),
             c_.store->copy(unit_, copied.begin), copied.size());
    }
    if (!resident_) return;
    if (c_.layout->dtype() == core::DType::kFloat32) return copy_.Store(range, values);
    copy_.ForEach(range, [&](std::byte* data, Range piece) {
      Narrow(c_.layout->dtype(), values + (piece.begin - range.begin), data, piece.size());
    });
  }

  const MoveContext& c_;
  const core::UnitIndex unit_;
  const Range all_;
  const core::StateKind kind_;
  const MemberIndex origin_member_;
  const bool resident_;
  const std::shared_ptr<ClientSlot> origin_;
  const UnitCopy copy_;
  const std::shared_ptr<const Sources> sources_;
};

class Read : public Movement {
 public:
  Read(const MoveContext* context, const core::StartRead& action,
       std::shared_ptr<ClientSlot> origin, UnitCopy copy, std::shared_ptr<const Sources> sources)
      : c_(*context),
        unit_(action.unit),
        all_{action.begin, action.begin + action.count},
        kind_(action.kind),
        origin_member_(action.origin),
        origin_(std::move(origin)),
        copy_(std::move(copy)),
        sources_(std::move(sources)) {}

  // Members that have nothing to do take no part.
  size_t pieces() const override { return c_.Cuts(all_); }

  size_t PrepareParts(size_t piece) const override {
    if (IsOrigin()) return kind_ == core::StateKind::kMaster ? 0 : 1;
    const Range own = Intersect(c_.Cut(all_, piece), Keeps(c_.self));
    return !own.empty() && Direct(own) == nullptr ? 1 : 0;
  }
  void Prepare(size_t piece, size_t /*part*/, std::byte* staging) override {
    const Range range = c_.Cut(all_, piece);
    if (IsOrigin()) {  // what is not trained has moments of zero
      memset(Wanted(range.begin), 0, range.size() * sizeof(float));
    } else {
      Load(Intersect(range, Keeps(c_.self)), c_.SendArea(staging, origin_member_));
    }
  }

  void Exchange(size_t piece, std::byte* staging, Transfers* sends,
                Transfers* receives) override {
    const Range range = c_.Cut(all_, piece);
    for (MemberIndex m = 0; m < c_.members(); ++m) {
      const Range kept = Intersect(range, Keeps(m));
      if (kept.empty() || m == origin_member_) continue;
      if (IsOrigin()) {
        receives->push_back({m, Wanted(kept.begin), kept.size() * sizeof(float)});
      } else if (m == c_.self) {
        float* from = Direct(kept);
        if (from == nullptr) from = c_.SendArea(staging, origin_member_);
        sends->push_back({origin_member_, from, kept.size() * sizeof(float)});
      }
    }
  }

  size_t FinishParts(size_t piece) const override {
    if (!IsOrigin()) return 0;
    return PartsOf(Intersect(c_.Cut(all_, piece), Keeps(c_.self)).size());
  }
  void Finish(size_t piece, size_t part, std::byte* /*staging*/) override {
    const Range kept = Intersect(c_.Cut(all_, piece), Keeps(c_.self));
    if (kept.empty()) return;
    const Range now = PartOf(kept, part);
    const float* from = Direct(now);
    if (from != nullptr) {
      memcpy(Wanted(now.begin), from, now.size() * sizeof(float));
    } else {
      Load(now, Wanted(now.begin));
    }
  }

 private:
  bool IsOrigin() const { return origin_member_ == c_.self; }
  float* Wanted(uint64_t element) const {
    return reinterpret_cast<float*>(origin_->transfer()) + (element - all_.begin);
  }
  // What member `m` hands over: its shard, or nothing where the origin has it all itself.
  Range Keeps(MemberIndex m) const {
    const core::Unit& unit = c_.layout->units()[unit_];
    const bool master = kind_ == core::StateKind::kMaster;
    if (c_.store->full()) {
      if (m != origin_member_) return {0, 0};
      return {0, master ? unit.elements : unit.trainable_elements};
    }
    return master ? c_.partition->Shard(unit_, m) : c_.partition->TrainableShard(unit_, m);
  }
  void Load(Range range, float* out) const {
    if (kind_ == core::StateKind::kGradient) {
      SumRange(*c_.layout, *sources_, range, out);
    } else if (kind_ != core::StateKind::kMaster) {
      Widen(c_.layout->dtype(), c_.store->narrow_moment(StateTensor(kind_), unit_, range.begin),
            out, range.size());
    } else if (c_.plan->master_in_window) {
      copy_.Load(range, out);
    } else {
      LoadWithoutMaster(range, out);
    }
  }
  // A range of which a part, its end, has 16-bit values only: beside the window, else in it.
  void LoadWithoutMaster(Range range, float* out) const {
    const core::DType dtype = c_.layout->dtype();
    const Range mastered = Intersect(range, c_.store->MasterRange(unit_));
    if (!mastered.empty()) {
      memcpy(out, c_.store->master(unit_, mastered.begin), mastered.size() * sizeof(float));
    }
    const Range rest{range.begin + mastered.size(), range.end};
    if (rest.empty()) return;
    float* const to = out + mastered.size();
    if (const void* copy = c_.store->copy(unit_, rest.begin)) {
      return Widen(dtype, copy, to, rest.size());
    }
    copy_.ForEach(rest, [&](std::byte* data, Range piece) {
      Widen(dtype, data, to + (piece.begin - rest.begin), piece.size());
    });
  }
  // Where this member's own elements lie; null where they must be put together.
  float* Direct(Range range) const {
    if (kind_ == core::StateKind::kGradient) return nullptr;
    if (kind_ != core::StateKind::kMaster) {
      if (c_.store->narrow_states()) return nullptr;
      return c_.store->moment(StateTensor(kind_), unit_, range.begin);
    }
    if (!c_.plan->master_in_window) {
      const Range kept = c_.store->MasterRange(unit_);
      const bool whole = kept.begin <= range.begin && range.end <= kept.end;
      return whole ? c_.store->master(unit_, range.begin) : nullptr;
    }
    return reinterpret_cast<float*>(copy_.Contiguous(range));
  }

  const MoveContext& c_;
  const core::UnitIndex unit_;
  const Range all_;
  const core::StateKind kind_;
  const MemberIndex origin_member_;
  const std::shared_ptr<ClientSlot> origin_;
  const UnitCopy copy_;
  const std::shared_ptr<const Sources> sources_;
};

}  // namespace

std::shared_ptr<Movement> MakePut(const MoveContext* context, const core::StartPut& action,
                                  std::shared_ptr<ClientSlot> origin, UnitCopy copy,
                                  std::shared_ptr<const Sources> sources) {
  return std::make_shared<Put>(context, action, std::move(origin), std::move(copy),
                               std::move(sources));
}

std::shared_ptr<Movement> MakeRead(const MoveContext* context, const core::StartRead& action,
                                   std::shared_ptr<ClientSlot> origin, UnitCopy copy,
                                   std::shared_ptr<const Sources> sources) {
  return std::make_shared<Read>(context, action, std::move(origin), std::move(copy),
                                std::move(sources));
}

}  // namespace zerod::engine
