// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/mapping.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "proto/shm/format.h"
#include "proto/shm/ring.h"

namespace zerod::client {
namespace {


absl::Status MapError(absl::string_view what, int error) {
  if (error == ENOMEM) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "cannot map ", what, ": the kernel refuses further mappings; raise vm.max_map_count "
        "(sysctl) or the address space limit (ulimit -v)"));
  }
  return absl::InternalError(absl::StrCat("cannot map ", what, ": ", strerror(error)));
}

}  // namespace

FileMapping::FileMapping(FileMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      guard_(std::move(other.guard_)) {}

FileMapping& FileMapping::operator=(FileMapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(guard_, other.guard_);
  return *this;
}

FileMapping::~FileMapping() {
  // A child has nothing there, or something of its own.
  if (data_ != nullptr && guard_->Here()) munmap(data_, bytes_);
}

absl::StatusOr<FileMapping> FileMapping::Map(int fd, uint64_t bytes, Mode mode, bool populate,
                                             absl::string_view what) {
  FileMapping mapping;
  if (bytes == 0) return mapping;
  struct stat file {};
  if (fstat(fd, &file) != 0) return MapError(what, errno);
  if (static_cast<uint64_t>(file.st_size) < bytes) {
    return absl::InternalError(absl::StrCat("the daemon's file for ", what, " has ", file.st_size,
                                            " bytes where ", bytes, " were announced"));
  }
  const int protection = mode == Mode::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* data = mmap(nullptr, bytes, protection, MAP_SHARED | (populate ? MAP_POPULATE : 0), fd, 0);
  if (data == MAP_FAILED) return MapError(what, errno);
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  mapping.guard_ = std::make_unique<ForkGuard>();
  if (madvise(data, bytes, MADV_DONTFORK) != 0) return MapError(what, errno);
  return mapping;
}

absl::StatusOr<std::shared_ptr<AddressSpace>> AddressSpace::Create(const AttachPlan& plan,
                                                                   int window_fd,
                                                                   const uint32_t* chunk_table) {
  auto space = std::make_shared<AddressSpace>(Private{});
  space->window_fd_ = window_fd;
  space->chunk_table_ = chunk_table;
  space->window_chunks_ = plan.window_chunks;
  uint64_t chunks = 0;
  for (const UnitPlan& unit : plan.units) {
    space->units_.push_back({unit.first_chunk, unit.chunks, false});
    chunks = std::max(chunks, unit.first_chunk + unit.chunks);
  }
  space->mapped_.assign(chunks, shm::kNoChunk);
  // An empty layout still has an address.
  space->bytes_ = std::max<uint64_t>(chunks, 1) * shm::kChunkBytes;
  void* base = mmap(nullptr, space->bytes_, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return MapError(absl::StrCat("the address range of all parameters (", space->bytes_,
                                 " bytes)"), errno);
  }
  space->base_ = static_cast<std::byte*>(base);
  space->held_ = std::make_unique<std::atomic<uint8_t>[]>(plan.units.size());

  FaultTable& faults = space->faults_;
  faults.base = reinterpret_cast<uintptr_t>(base);
  faults.bytes = space->bytes_;
  faults.step = &space->step_;
  faults.held = space->held_.get();
  std::vector<uint32_t> order(plan.units.size());
  for (uint32_t u = 0; u < order.size(); ++u) order[u] = u;
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return plan.units[a].first_chunk < plan.units[b].first_chunk;
  });
  for (uint32_t u : order) {
    const UnitPlan& unit = plan.units[u];
    faults.units.push_back({unit.first_chunk * shm::kChunkBytes,
                            (unit.first_chunk + unit.chunks) * shm::kChunkBytes,
                            unit.name.empty() ? std::string("(root)") : unit.name});
    faults.unit_index.push_back(u);
  }
  for (const ParameterPlan& parameter : plan.parameters) {
    const uint64_t begin = plan.units[parameter.unit].first_chunk * shm::kChunkBytes +
                           parameter.offset * DTypeBytes(plan.dtype);
    faults.parameters.push_back(
        {begin, begin + parameter.elements * DTypeBytes(plan.dtype), parameter.name});
  }
  std::sort(faults.parameters.begin(), faults.parameters.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  RegisterFaults(&faults);
  return space;
}

AddressSpace::~AddressSpace() {
  // The registry is this process's own, forked or not.
  UnregisterFaults(&faults_);
  if (base_ != nullptr && guard_.Here()) munmap(base_, bytes_);
}

const std::byte* AddressSpace::UnitData(uint32_t unit) const {
  return base_ + units_[unit].first_chunk * shm::kChunkBytes;
}

absl::Status AddressSpace::Protect(uint32_t unit, int protection) {
  const UnitPages& pages = units_[unit];
  if (mprotect(base_ + pages.first_chunk * shm::kChunkBytes, pages.chunks * shm::kChunkBytes,
               protection) != 0) {
    return MapError("a unit's pages with another protection", errno);
  }
  units_[unit].readable = protection != PROT_NONE;
  return absl::OkStatus();
}

absl::Status AddressSpace::Guard(uint32_t unit) {
  if (!units_[unit].readable) return absl::OkStatus();
  return Protect(unit, PROT_NONE);
}

absl::Status AddressSpace::Unguard(uint32_t unit) {
  if (units_[unit].readable) return absl::OkStatus();
  return Protect(unit, PROT_READ);
}

absl::Status AddressSpace::Map(uint32_t unit) {
  if (window_fd_ < 0) return absl::FailedPreconditionError("the client has been closed");
  const UnitPages& pages = units_[unit];
  wanted_.resize(pages.chunks);
  shm::CopyShared(wanted_.data(), chunk_table_ + pages.first_chunk, pages.chunks * 4);
  for (uint64_t i = 0; i < pages.chunks; ++i) {
    if (wanted_[i] >= window_chunks_) {
      return absl::InternalError(absl::StrCat(
          "the daemon's chunk table is damaged: chunk ", i, " of unit ", unit, " is at ",
          wanted_[i], " of a window of ", window_chunks_));
    }
  }
  uint32_t* const mapped = mapped_.data() + pages.first_chunk;
  for (uint64_t i = 0; i < pages.chunks;) {
    if (mapped[i] == wanted_[i]) {
      ++i;
      continue;
    }
    uint64_t end = i + 1;  // neighbours in the window are one mapping
    while (end < pages.chunks && wanted_[end] == wanted_[end - 1] + 1 &&
           mapped[end] != wanted_[end]) {
      ++end;
    }
    void* at = base_ + (pages.first_chunk + i) * shm::kChunkBytes;
    const auto offset = static_cast<off_t>(uint64_t{wanted_[i]} * shm::kChunkBytes);
    if (mmap(at, (end - i) * shm::kChunkBytes, PROT_READ, MAP_SHARED | MAP_FIXED | MAP_POPULATE,
             window_fd_, offset) == MAP_FAILED) {
      return MapError("chunks of the window", errno);
    }
    remaps_.fetch_add(1, std::memory_order_relaxed);
    for (; i < end; ++i) mapped[i] = wanted_[i];
  }
  return Unguard(unit);
}

void AddressSpace::Close() {
  window_fd_ = -1;
  chunk_table_ = nullptr;
}

}  // namespace zerod::client
