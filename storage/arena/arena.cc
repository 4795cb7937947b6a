// SPDX-License-Identifier: Apache-2.0
#include "storage/arena/arena.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace zerod::arena {
namespace {

// Memory is populated in pieces of this size, and asked for again before each: populating takes
// about a second per GiB, in which somebody else may take what was there. Of a piece under way the
// kernel's number and `pending` count some pages twice, so that small ones refuse less in vain.
constexpr size_t kPopulatePieceBytes = size_t{64} << 20;
// Larger requests are a mistake; the bound keeps sums below from wrapping.
constexpr uint64_t kRegionBytesMax = uint64_t{1} << 46;

size_t PageBytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

uint64_t RoundUpToPages(uint64_t bytes) {
  return (bytes + PageBytes() - 1) & ~uint64_t{PageBytes() - 1};
}

std::string Human(uint64_t bytes) {
  if (bytes >= uint64_t{1} << 30) return absl::StrFormat("%.2f GiB", bytes / double(1 << 30));
  if (bytes >= uint64_t{1} << 20) return absl::StrFormat("%.1f MiB", bytes / double(1 << 20));
  return absl::StrCat(bytes, " bytes");
}

absl::StatusOr<int> MakeMemfd(const std::string& name) {
  // Memory for data is never to be executed; kernels before 6.3 do not know the flag.
  int fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) {
    fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  }
  if (fd >= 0) return fd;
  if (errno == EMFILE || errno == ENFILE) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name, ": no file descriptor left for a shared memory file; raise the "
                           "daemon's limit of open files (ulimit -n, LimitNOFILE=)"));
  }
  return absl::InternalError(absl::StrCat(name, ": memfd_create: ", strerror(errno)));
}

// Reserves the pages of [begin, begin + bytes), which nothing reserved so far. errno or 0.
int PopulatePages(std::byte* data, size_t begin, size_t bytes, int fd) {
  int result;
  do {
    result = madvise(data + begin, bytes, MADV_POPULATE_WRITE);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  if (result == 0) return 0;
  if (errno != EINVAL) return errno;
  // Kernels before 5.14. For a file, fallocate fails where touching would raise SIGBUS.
  if (fd >= 0) {
    do {
      result = fallocate(fd, 0, static_cast<off_t>(begin), static_cast<off_t>(bytes));
    } while (result != 0 && errno == EINTR);
    if (result != 0) return errno;
  }
  for (size_t at = begin; at < begin + bytes; at += PageBytes()) {
    *reinterpret_cast<volatile std::byte*>(data + at) = std::byte{0};
  }
  return 0;
}

}  // namespace

struct Arena::Impl {
  Impl(std::unique_ptr<MemorySource> memory_source, uint64_t reserve)
      : reserve_bytes(reserve), source(std::move(memory_source)) {}

  // `others`: what the rest of the daemon was promised and has not taken.
  // The caller holds `mutex`.
  absl::Status AdmitLocked(uint64_t bytes, uint64_t others, absl::string_view what);

  const uint64_t reserve_bytes;
  // Never held while pages are populated: one job's gigabytes would keep another's loop waiting.
  // Not absl's: Debian's library is not instrumented, so the thread sanitizer would not see it.
  std::mutex mutex;
  std::unique_ptr<MemorySource> source;  // guarded by `mutex`
  // Admitted and not populated yet, so that two requests are not admitted for the same memory.
  uint64_t pending = 0;  // guarded by `mutex`
  std::atomic<uint64_t> populated{0};
};

absl::Status Arena::Impl::AdmitLocked(uint64_t bytes, uint64_t others, absl::string_view what) {
  ASSIGN_OR_RETURN(const Available available, source->Read());
  const uint64_t spoken_for = reserve_bytes + others;
  const uint64_t usable = available.bytes > spoken_for ? available.bytes - spoken_for : 0;
  if (bytes <= usable) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      what, " needs ", Human(bytes), " (", bytes, " bytes), and ", Human(usable), " (", usable,
      " bytes) can be had: ", available.limited_by, " leaves ", available.bytes, " bytes, ",
      reserve_bytes, " of which are kept for the rest of the machine",
      others == 0 ? "" : absl::StrCat(" and ", others, " for what is being reserved now"),
      ", and this daemon holds ", populated.load(std::memory_order_relaxed),
      " bytes already. Free memory, raise that limit, use more nodes, or ask for less"));
}

Arena::Arena(std::unique_ptr<MemorySource> source, uint64_t reserve_bytes)
    : impl_(std::make_unique<Impl>(std::move(source), reserve_bytes)) {}

Arena::~Arena() = default;

absl::Status Arena::Admit(uint64_t bytes, absl::string_view what) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->AdmitLocked(bytes, impl_->pending, what);
}

uint64_t Arena::reserved_bytes() const {
  return impl_->populated.load(std::memory_order_relaxed);
}

absl::StatusOr<Region> Arena::Allocate(absl::string_view name, uint64_t bytes,
                                       uint64_t populate_bytes, Access access) {
  if (bytes == 0 || bytes > kRegionBytesMax || populate_bytes > bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": a region has 1 to ", kRegionBytesMax,
                     " bytes and populates at most its own; asked for ", bytes, " bytes, ",
                     populate_bytes, " of them populated"));
  }
  Region region;
  region.arena_ = this;
  region.name_ = std::string(name);
  region.bytes_ = RoundUpToPages(bytes);

  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (access != Access::kPrivate) {
    ASSIGN_OR_RETURN(region.fd_, MakeMemfd(region.name_));
    if (ftruncate(region.fd_, static_cast<off_t>(region.bytes_)) != 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat(name, ": cannot make a shared memory file of ", region.bytes_,
                       " bytes: ", strerror(errno)));
    }
    flags = MAP_SHARED | MAP_NORESERVE;
  }
  void* data = mmap(nullptr, region.bytes_, PROT_READ | PROT_WRITE, flags, region.fd_, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(name, ": cannot map ", region.bytes_, " bytes: ", strerror(errno),
                     "; look at ulimit -v and vm.max_map_count"));
  }
  region.data_ = static_cast<std::byte*>(data);

  if (access != Access::kPrivate) {
    // After our own map: F_SEAL_FUTURE_WRITE refuses every later writable one, ours included, and
    // hole punching with it. F_SEAL_WRITE would be refused while our map exists.
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    if (access == Access::kClientReads) seals |= F_SEAL_FUTURE_WRITE;
    if (fcntl(region.fd_, F_ADD_SEALS, seals) != 0) {
      return absl::InternalError(absl::StrCat(name, ": cannot seal its memory file: ",
                                              strerror(errno), " (zerod needs Linux 5.1)"));
    }
  }
  RETURN_IF_ERROR(region.Populate(populate_bytes));
  return region;
}

Region::Region(Region&& other) noexcept
    : arena_(other.arena_),
      name_(std::move(other.name_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      populated_(std::exchange(other.populated_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

Region& Region::operator=(Region&& other) noexcept {
  Region taken(std::move(other));
  std::swap(arena_, taken.arena_);
  std::swap(name_, taken.name_);
  std::swap(data_, taken.data_);
  std::swap(bytes_, taken.bytes_);
  std::swap(populated_, taken.populated_);
  std::swap(fd_, taken.fd_);
  return *this;  // what was ours ends with `taken`
}

Region::~Region() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
  if (populated_ > 0) arena_->impl_->populated.fetch_sub(populated_, std::memory_order_relaxed);
}

absl::Status Region::Populate(size_t to_bytes) {
  if (to_bytes > bytes_) {
    return absl::InvalidArgumentError(absl::StrCat("region \"", name_, "\" has ", bytes_,
                                                   " bytes; asked to populate ", to_bytes));
  }
  const size_t end = RoundUpToPages(to_bytes);
  if (end <= populated_) return absl::OkStatus();
  Arena::Impl& arena = *arena_->impl_;
  absl::Status status;
  size_t at = populated_;
  uint64_t pending = 0;  // of this call, in arena.pending
  uint64_t counted = 0;  // of this call, in arena.populated
  while (at < end) {
    {
      const std::lock_guard<std::mutex> lock(arena.mutex);
      // Later pieces were promised already, and whoever came since was told so.
      const uint64_t others = at == populated_ ? arena.pending : 0;
      arena.pending -= std::exchange(pending, 0);
      status = arena.AdmitLocked(end - at, others, name_);
      if (!status.ok()) break;
      pending = end - at;
      arena.pending += pending;
    }
    const size_t piece = std::min(end - at, kPopulatePieceBytes);
    const int error = PopulatePages(data_, at, piece, fd_);
    at += piece;
    if (error != 0) {
      status = absl::ResourceExhaustedError(
          absl::StrCat(name_, ": the kernel refused to reserve ", end - populated_,
                       " bytes that seemed to be there (", strerror(error),
                       "); free memory or ask for less"));
      break;
    }
    arena.populated.fetch_add(piece, std::memory_order_relaxed);
    counted += piece;
  }
  if (pending > 0) {
    const std::lock_guard<std::mutex> lock(arena.mutex);
    arena.pending -= pending;
  }
  if (!status.ok()) {
    // Give back what this call took. A file sealed against writes cannot be punched (EPERM):
    // there the pages wait for the next Populate(), or for the end of the region.
    madvise(data_ + populated_, at - populated_, fd_ >= 0 ? MADV_REMOVE : MADV_DONTNEED);
    arena.populated.fetch_sub(counted, std::memory_order_relaxed);
    return status;
  }
  populated_ = end;
  return absl::OkStatus();
}

}  // namespace zerod::arena
