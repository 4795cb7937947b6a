// SPDX-License-Identifier: Apache-2.0
//
// The log entries that move bytes, as Movements: gather.cc, reduce.cc, put_read.cc.
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/core/job.h"
#include "daemon/core/layout.h"
#include "daemon/engine/gradient_book.h"
#include "daemon/engine/mover.h"
#include "daemon/engine/shard_store.h"
#include "daemon/engine/window_files.h"

namespace zerod::engine {

// What every movement of a job shares. Outlives them.
struct MoveContext {
  std::shared_ptr<const core::Layout> layout;
  const core::Partition* partition = nullptr;
  const core::JobPlan* plan = nullptr;
  ShardStore* store = nullptr;
  core::MemberIndex self = 0;
  uint32_t stage = 0;
  core::DType wire = core::DType::kFloat32;  // of gradients between members
  uint64_t piece_elements = 0;  // the same on all members: see core::PieceElements

  uint32_t members() const { return partition->members(); }
  // Staging of one piece: an area to send from, then one to receive into, per other member.
  float* SendArea(std::byte* staging, core::MemberIndex m) const;
  float* ReceiveArea(std::byte* staging, core::MemberIndex m) const;
  size_t StagingBytes() const;  // of one piece
  // The `piece`-th cut of `range`, and how many there are.
  core::Range Cut(core::Range range, size_t piece) const;
  size_t Cuts(core::Range range) const;
};

// Work on a piece is shared out among the workers in parts of this many elements.
inline constexpr uint64_t kPartElements = 128 * 1024;
inline size_t PartsOf(uint64_t elements) {
  return static_cast<size_t>((elements + kPartElements - 1) / kPartElements);
}
inline core::Range PartOf(core::Range range, size_t part) {
  const uint64_t begin = range.begin + part * kPartElements;
  return {begin, begin + kPartElements < range.end ? begin + kPartElements : range.end};
}

// `copy`: where the unit lies in the window here (of no use unless action.receive or the window is
// what this member sends from).
std::shared_ptr<Movement> MakeGather(const MoveContext* context,
                                     const core::StartAllGather& action, UnitCopy copy);
std::shared_ptr<Movement> MakeReduce(const MoveContext* context, const core::StartReduce& action,
                                     std::shared_ptr<const Sources> sources);
// `origin`: the client whose transfer area has (PUT) or gets (READ) the values; null elsewhere.
// `sources`: where a gradient lies; else null.
std::shared_ptr<Movement> MakePut(const MoveContext* context, const core::StartPut& action,
                                  std::shared_ptr<ClientSlot> origin, UnitCopy copy,
                                  std::shared_ptr<const Sources> sources);
std::shared_ptr<Movement> MakeRead(const MoveContext* context, const core::StartRead& action,
                                   std::shared_ptr<ClientSlot> origin, UnitCopy copy,
                                   std::shared_ptr<const Sources> sources);

}  // namespace zerod::engine
