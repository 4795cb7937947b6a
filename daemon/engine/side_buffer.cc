// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/side_buffer.h"

#include <utility>

#include "base/status.h"

namespace zerod::engine {

SideBuffer::Memory SideBuffer::Reuse(uint64_t bytes, std::vector<Memory>* surplus) {
  on_their_way_ += bytes;
  for (Memory& memory : free_) {
    if (memory->bytes() != bytes) continue;
    std::swap(memory, free_.back());
    Memory found = std::move(free_.back());
    free_.pop_back();
    return found;
  }
  if (this->bytes() + on_their_way_ > bytes_max_) *surplus = std::exchange(free_, {});
  return nullptr;
}

void SideBuffer::Forgo(uint64_t bytes) { on_their_way_ -= bytes; }

void SideBuffer::Put(uint64_t number, uint64_t bytes, StagedGradient gradient) {
  on_their_way_ -= bytes;
  gradients_[number] = std::move(gradient);
}

absl::StatusOr<SideBuffer::Memory> SideBuffer::Allocate(uint64_t bytes) const {
  ASSIGN_OR_RETURN(arena::Region region,
                   arena_->Allocate(name_, bytes, bytes, arena::Access::kPrivate));
  return std::make_shared<const arena::Region>(std::move(region));
}

const StagedGradient* SideBuffer::Find(uint64_t number) const {
  const auto it = gradients_.find(number);
  return it == gradients_.end() ? nullptr : &it->second;
}

void SideBuffer::Drop(uint64_t number) {
  const auto it = gradients_.find(number);
  if (it == gradients_.end()) return;
  free_.push_back(std::move(it->second.aside));
  gradients_.erase(it);
}

std::vector<SideBuffer::Memory> SideBuffer::TakeAll() {
  std::vector<Memory> all = std::exchange(free_, {});
  for (auto& [number, gradient] : std::exchange(gradients_, {})) {
    all.push_back(std::move(gradient.aside));
  }
  return all;
}

uint64_t SideBuffer::bytes() const {
  uint64_t sum = 0;
  for (const Memory& memory : free_) sum += memory->bytes();
  for (const auto& [number, gradient] : gradients_) sum += gradient.aside->bytes();
  return sum;
}

}  // namespace zerod::engine
