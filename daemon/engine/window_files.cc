// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/window_files.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "proto/shm/format.h"
#include "proto/shm/ring.h"

namespace zerod::engine {

using core::Range;
using core::UnitIndex;

std::byte* UnitCopy::At(uint64_t element) const {
  const uint64_t byte = element * element_bytes_;
  return window_ + uint64_t{chunks_[byte / shm::kChunkBytes]} * shm::kChunkBytes +
         byte % shm::kChunkBytes;
}

// The end of the piece that begins at range.begin: chunks that follow each other are one piece.
uint64_t UnitCopy::ContiguousEnd(Range range) const {
  const uint64_t per_chunk = shm::kChunkBytes / element_bytes_;
  uint64_t chunk = range.begin / per_chunk;
  while ((chunk + 1) * per_chunk < range.end && chunks_[chunk + 1] == chunks_[chunk] + 1) ++chunk;
  return std::min(range.end, (chunk + 1) * per_chunk);
}

std::byte* UnitCopy::Contiguous(Range range) const {
  if (!mapped() || range.empty()) return nullptr;
  return ContiguousEnd(range) == range.end ? At(range.begin) : nullptr;
}

void UnitCopy::ForEach(Range range,
                       const std::function<void(std::byte*, Range)>& visit) const {
  while (!range.empty()) {
    const uint64_t end = ContiguousEnd(range);
    visit(At(range.begin), Range{range.begin, end});
    range.begin = end;
  }
}

void UnitCopy::Store(Range range, const void* from) const {
  const std::byte* source = static_cast<const std::byte*>(from);
  ForEach(range, [&](std::byte* data, Range piece) {
    memcpy(data, source + (piece.begin - range.begin) * element_bytes_,
           piece.size() * element_bytes_);
  });
}

void UnitCopy::Load(Range range, void* to) const {
  std::byte* target = static_cast<std::byte*>(to);
  ForEach(range, [&](std::byte* data, Range piece) {
    memcpy(target + (piece.begin - range.begin) * element_bytes_, data,
           piece.size() * element_bytes_);
  });
}

absl::StatusOr<std::unique_ptr<WindowFiles>> WindowFiles::Create(
    arena::Arena* arena, const std::string& job, std::shared_ptr<const core::Layout> layout,
    const core::WindowSpec& spec) {
  const uint32_t units = static_cast<uint32_t>(layout->units().size());
  const shm::UnitsSections sections = shm::UnitsLayout(units, layout->chunks());
  ASSIGN_OR_RETURN(arena::Region table,
                   arena->Allocate(absl::StrCat("units of job ", job), sections.total,
                                   sections.total, arena::Access::kClientReads));
  const uint64_t window_bytes = std::max<uint64_t>(spec.max_chunks, 1) * shm::kChunkBytes;
  ASSIGN_OR_RETURN(arena::Region window,
                   arena->Allocate(absl::StrCat("window of job ", job), window_bytes,
                                   spec.base_chunks * shm::kChunkBytes,
                                   arena::Access::kClientReads));
  return std::unique_ptr<WindowFiles>(
      // tidy: allow
      new WindowFiles(std::move(layout), std::move(table), std::move(window)));
}

WindowFiles::WindowFiles(std::shared_ptr<const core::Layout> layout, arena::Region units,
                         arena::Region window)
    : layout_(std::move(layout)), units_(std::move(units)), window_(std::move(window)) {
  const uint32_t count = static_cast<uint32_t>(layout_->units().size());
  const shm::UnitsSections sections = shm::UnitsLayout(count, layout_->chunks());
  auto* page = reinterpret_cast<shm::UnitTablePage*>(units_.data());
  page->magic = shm::kMagic;
  page->version = shm::kFormatVersion;
  page->units = count;
  page->chunks = layout_->chunks();
  words_ = reinterpret_cast<std::atomic<uint64_t>*>(units_.data() + sections.word);
  table_ = reinterpret_cast<uint32_t*>(units_.data() + sections.chunk);
  std::fill_n(table_, layout_->chunks(), shm::kNoChunk);
  chunks_.resize(count);
}

void WindowFiles::SetState(UnitIndex u, uint8_t state, uint32_t version) {
  shm::UnitWord word = shm::UnpackUnitWord(words_[u].load(std::memory_order_relaxed));
  word.state = static_cast<shm::CopyState>(state);
  word.version = version;
  words_[u].store(shm::PackUnitWord(word), std::memory_order_release);
}

void WindowFiles::Map(UnitIndex u, const std::vector<uint32_t>& chunks) {
  const core::Unit& unit = layout_->units()[u];
  CHECK_EQ(chunks.size(), unit.chunks) << "chunks of unit " << unit.name;
  for (size_t i = 0; i < chunks.size(); ++i) {
    CHECK_LT((uint64_t{chunks[i]} + 1) * shm::kChunkBytes, window_.populated_bytes() + 1);
    __atomic_store_n(&table_[unit.first_chunk + i], chunks[i], __ATOMIC_RELAXED);
  }
  shm::UnitWord word = shm::UnpackUnitWord(words_[u].load(std::memory_order_relaxed));
  CHECK(word.state == shm::CopyState::kAbsent) << "unit " << unit.name;
  // The same chunks as before need no new mapping in any client.
  if (chunks != chunks_[u]) ++word.epoch;
  word.state = shm::CopyState::kFilling;
  words_[u].store(shm::PackUnitWord(word), std::memory_order_release);
  chunks_[u] = chunks;
}

void WindowFiles::Publish(UnitIndex u, core::Step version) {
  SetState(u, static_cast<uint8_t>(shm::CopyState::kValid), static_cast<uint32_t>(version));
}

void WindowFiles::Retract(UnitIndex u) {
  const shm::UnitWord word = shm::UnpackUnitWord(words_[u].load(std::memory_order_relaxed));
  SetState(u, static_cast<uint8_t>(shm::CopyState::kFilling), word.version);
}

bool WindowFiles::TryUnmap(UnitIndex u) {
  const shm::UnitWord word = shm::UnpackUnitWord(words_[u].load(std::memory_order_relaxed));
  if (word.state == shm::CopyState::kAbsent) return true;
  if (word.state == shm::CopyState::kFilling) {  // nobody may read it, so nobody does
    SetState(u, static_cast<uint8_t>(shm::CopyState::kAbsent), word.version);
    return true;
  }
  std::vector<const std::atomic<uint32_t>*> holds;
  for (const Holder& holder : holders_()) holds.push_back(holder.holds + u);
  return shm::TryRetract(&words_[u], holds);
}

absl::Status WindowFiles::Grow(uint64_t chunks) {
  RETURN_IF_ERROR(window_.Populate(chunks * shm::kChunkBytes));
  ++growths_;
  return absl::OkStatus();
}

std::vector<core::SlotIndex> WindowFiles::Holders(UnitIndex u) {
  const shm::UnitWord word = shm::UnpackUnitWord(words_[u].load(std::memory_order_relaxed));
  std::vector<core::SlotIndex> slots;
  for (const Holder& holder : holders_()) {
    if (holder.holds[u].load(std::memory_order_relaxed) == word.version + 1) {
      slots.push_back(holder.slot);
    }
  }
  return slots;
}

UnitCopy WindowFiles::Copy(UnitIndex u) const {
  return UnitCopy(window_.data(), chunks_[u], core::DTypeBytes(layout_->dtype()));
}

}  // namespace zerod::engine
