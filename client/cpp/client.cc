// SPDX-License-Identifier: Apache-2.0
#include <sys/socket.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/cpp/client_impl.h"
#include "proto/shm/fd_socket.h"

namespace zerod::client {

using shm::ClientFile;

ClientImpl::~ClientImpl() {
  if (!fork_guard_.Here()) {
    // The parent's connection stays as it is; this process's copies of the descriptors go with it.
    for (auto& file : attachment_.files) (void)file.Release();
    (void)attachment_.socket.Release();
    return;
  }
  // Tensors may outlive this: what they show must not become another unit's weights in silence.
  ReleaseAll();
  if (space_ != nullptr) space_->Close();
  // Not only closed: a forked worker may still have the socket open.
  if (attachment_.socket) shutdown(attachment_.socket.get(), SHUT_RDWR);
}

absl::Status ClientImpl::Start() {
  const AttachPlan& p = plan();
  const auto units = static_cast<uint32_t>(p.units.size());
  uint64_t chunks = 0;
  for (const UnitPlan& unit : p.units) chunks = std::max(chunks, unit.first_chunk + unit.chunks);
  const shm::SubmitSections submit_at =
      shm::SubmitLayout(units, static_cast<uint32_t>(p.parameters.size()));
  const shm::UnitsSections units_at = shm::UnitsLayout(units, chunks);
  using Mode = FileMapping::Mode;
  ASSIGN_OR_RETURN(submit_file_, FileMapping::Map(FileFd(ClientFile::kSubmit), submit_at.total,
                                                  Mode::kReadWrite, true, "requests"));
  ASSIGN_OR_RETURN(complete_file_,
                   FileMapping::Map(FileFd(ClientFile::kComplete), sizeof(shm::CompletePage),
                                    Mode::kRead, true, "answers"));
  ASSIGN_OR_RETURN(gradient_file_, FileMapping::Map(FileFd(ClientFile::kGradient),
                                                    p.gradient_bytes, Mode::kReadWrite, true,
                                                    "gradients"));
  ASSIGN_OR_RETURN(transfer_file_, FileMapping::Map(FileFd(ClientFile::kTransfer),
                                                    p.transfer_bytes, Mode::kReadWrite, false,
                                                    "transfers"));
  ASSIGN_OR_RETURN(units_file_, FileMapping::Map(FileFd(ClientFile::kUnits), units_at.total,
                                                 Mode::kRead, true, "the unit table"));
  RETURN_IF_ERROR(shm::CheckPages(submit(), complete()));
  const auto* table = At<const shm::UnitTablePage>(units_file_, 0);
  if (table->magic != shm::kMagic || table->version != shm::kFormatVersion ||
      table->units != units || table->chunks < chunks) {
    return absl::InternalError(absl::StrCat("the daemon's unit table (", table->units,
                                            " units, ", table->chunks, " chunks) is not that of "
                                            "the layout it announced (", units, ", ", chunks,
                                            ")"));
  }
  ASSIGN_OR_RETURN(space_, AddressSpace::Create(p, FileFd(ClientFile::kWindow),
                                                At<const uint32_t>(units_file_, units_at.chunk)));
  holds_ = std::make_unique<shm::HoldWords>(
      At<std::atomic<uint32_t>>(submit_file_, submit_at.hold),
      At<const std::atomic<uint64_t>>(units_file_, units_at.word), units);
  requests_ = std::make_unique<Requests>(
      submit(), complete(), attachment_.files[shm::kDoorbellIndex].get(),
      attachment_.socket.get(), attachment_.address,
      Watchers{attachment_.interrupt, attachment_.on_wait, attachment_.wait_notice});
  gradients_ = std::make_unique<Gradients>(&plan(), gradient_file_.data(),
                                           At<uint8_t>(submit_file_, submit_at.touched),
                                           requests_.get());
  const uint64_t element_bytes = DTypeBytes(p.dtype);
  for (const UnitPlan& unit : p.units) {
    units_.push_back({unit.name, unit.elements, unit.trainable_elements, unit.resident});
  }
  for (const ParameterPlan& parameter : p.parameters) {
    parameters_.push_back({parameter.unit, parameter.offset, parameter.elements,
                           space_->UnitData(parameter.unit) + parameter.offset * element_bytes});
  }
  unit_holds_.resize(units);
  held_.reserve(units);
  step_.store(p.committed_step + 1, std::memory_order_relaxed);
  loss_scale_.store(p.loss_scale, std::memory_order_relaxed);
  space_->SetStep(p.committed_step + 1);
  if (p.initialized) return MapResident();
  return absl::OkStatus();
}

absl::Status ClientImpl::CheckUsable() const {
  if (!fork_guard_.Here()) {
    return absl::FailedPreconditionError(
        "this process was forked from the one that attached; it may read mapped parameters, and "
        "needs an attachment of its own for everything else");
  }
  if (left_.load(std::memory_order_relaxed)) {
    return absl::FailedPreconditionError("this client has detached from its job");
  }
  return absl::OkStatus();
}

absl::Status ClientImpl::CheckUnit(uint32_t unit) const {
  RETURN_IF_ERROR(CheckUsable());
  if (unit >= units_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("unit ", unit, " is not one of the layout's ", units_.size()));
  }
  return absl::OkStatus();
}

absl::Status ClientImpl::CheckRange(uint32_t unit, uint64_t begin, uint64_t count) const {
  RETURN_IF_ERROR(CheckUnit(unit));
  if (begin > units_[unit].elements || count > units_[unit].elements - begin) {
    return absl::InvalidArgumentError(
        absl::StrCat("elements [", begin, ", ", begin, " + ", count, ") are not within unit '",
                     units_[unit].name, "', which has ", units_[unit].elements));
  }
  return absl::OkStatus();
}

// --- Gather and Release -----------------------------------------------------------------------

absl::Status ClientImpl::Open(uint32_t unit) {
  UnitHold& hold = unit_holds_[unit];
  const shm::UnitWord word = holds_->Word(unit);
  if (!hold.mapped || hold.epoch != word.epoch) {
    hold.mapped = false;
    RETURN_IF_ERROR(space_->Map(unit));
    hold.mapped = true;
    hold.epoch = word.epoch;
  } else if (!units_[unit].resident) {
    RETURN_IF_ERROR(space_->Unguard(unit));
  }
  hold.held = true;
  held_.push_back(unit);
  space_->SetHeld(unit, true);
  if (trace_len_ < shm::kTraceMax) {
    const shm::SubmitSections at = shm::SubmitLayout(static_cast<uint32_t>(units_.size()), 0);
    __atomic_store_n(At<uint32_t>(submit_file_, at.trace) + trace_len_, unit, __ATOMIC_RELAXED);
    submit()->trace_len.store(++trace_len_, std::memory_order_release);
  }
  return absl::OkStatus();
}

bool ClientImpl::TryGatherLocked(uint32_t unit, absl::Status* error) {
  const UnitHold& hold = unit_holds_[unit];
  if (hold.held) return true;
  const auto version = static_cast<uint32_t>(step() - 1);
  if (hold.waiting > 0) {
    // Claim() would drop another thread's hold, and the daemon might evict what it is promised.
    holds_->Intend(unit, version);
    const shm::UnitWord word = holds_->Word(unit);
    if (word.state != shm::CopyState::kValid || word.version != version) return false;
  } else if (!holds_->Claim(unit, version)) {
    return false;
  }
  *error = Open(unit);
  if (!error->ok()) Unhold(unit);
  return error->ok();
}

void ClientImpl::Unhold(uint32_t unit) {
  if (unit_holds_[unit].waiting == 0) holds_->Unclaim(unit);
}

bool ClientImpl::TryGather(uint32_t unit) {
  if (unit >= units_.size() || !CheckUsable().ok() || requests_->Failed()) return false;
  absl::Status error;
  std::lock_guard<std::mutex> lock(mu_);
  if (!TryGatherLocked(unit, &error)) return false;
  ++counters_.gathers;
  ++counters_.gather_hits;
  return true;
}

absl::Status ClientImpl::Gather(uint32_t unit) {
  RETURN_IF_ERROR(CheckUnit(unit));
  if (requests_->Failed()) return requests_->Failure();
  absl::Status error;
  std::unique_lock<std::mutex> lock(mu_);
  ++counters_.gathers;
  if (TryGatherLocked(unit, &error)) {
    ++counters_.gather_hits;
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(error);
  ++counters_.gather_waits;
  // The hold stands while the copy is being filled, so that it cannot be evicted in between.
  holds_->Intend(unit, static_cast<uint32_t>(step() - 1));
  ++unit_holds_[unit].waiting;
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kGather;
  entry.unit = unit;
  entry.step = step();
  lock.unlock();
  const absl::Time start = MonotonicNow();
  absl::StatusOr<uint64_t> cookie = requests_->Post(entry);
  absl::Status answer = cookie.status();
  if (cookie.ok()) {
    absl::StatusOr<Requests::Answer> waited =
        requests_->Wait(*cookie, absl::StrCat("unit '", units_[unit].name, "'"));
    answer = waited.ok() ? waited->status : waited.status();
    if (absl::IsCancelled(answer)) requests_->Abandon(*cookie);
  }
  lock.lock();
  counters_.gather_wait_seconds += absl::ToDoubleSeconds(MonotonicNow() - start);
  --unit_holds_[unit].waiting;
  if (unit_holds_[unit].held) return absl::OkStatus();  // by another thread meanwhile
  if (answer.ok()) {
    const shm::UnitWord word = holds_->Word(unit);
    if (word.state != shm::CopyState::kValid || word.version + 1 != entry.step) {
      answer = absl::InternalError(absl::StrCat(
          "the daemon answered the gather of unit '", units_[unit].name, "' for step ",
          entry.step, ", but its copy is of version ", word.version, " in state ",
          static_cast<int>(word.state)));
    }
  }
  if (answer.ok()) answer = Open(unit);
  if (!answer.ok()) Unhold(unit);
  return answer;
}

void ClientImpl::ReleaseLocked(uint32_t unit) {
  UnitHold& hold = unit_holds_[unit];
  hold.held = false;
  space_->SetHeld(unit, false);
  if (!units_[unit].resident && plan().guard_pages) {
    // Without the guard a read would be wrong in silence, so one that cannot be had is fatal to
    // nothing but the detection: the next Map or Guard says so.
    space_->Guard(unit).IgnoreError();
  }
  Unhold(unit);
}

void ClientImpl::Release(uint32_t unit) {
  if (!CheckUnit(unit).ok()) return;
  {
    std::lock_guard<std::mutex> lock(mu_);
    if (!unit_holds_[unit].held) return;
    ReleaseLocked(unit);
    // Mostly the last one gathered.
    for (size_t i = held_.size(); i-- > 0;) {
      if (held_[i] != unit) continue;
      held_.erase(held_.begin() + static_cast<ptrdiff_t>(i));
      break;
    }
  }
  if (units_[unit].resident) return;
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kRelease;
  entry.unit = unit;
  entry.step = step();
  requests_->Hint(entry);
}

void ClientImpl::ReleaseAll() {
  if (!CheckUsable().ok()) return;
  std::lock_guard<std::mutex> lock(mu_);
  for (uint32_t unit : held_) ReleaseLocked(unit);
  held_.clear();
}

bool ClientImpl::Held(uint32_t unit) const {
  std::lock_guard<std::mutex> lock(mu_);
  return unit < unit_holds_.size() && unit_holds_[unit].held;
}

absl::Status ClientImpl::MapResident() {
  std::lock_guard<std::mutex> lock(mu_);
  for (uint32_t unit = 0; unit < units_.size(); ++unit) {
    if (!units_[unit].resident) continue;
    UnitHold& hold = unit_holds_[unit];
    const shm::UnitWord word = holds_->Word(unit);
    if (word.state == shm::CopyState::kAbsent) continue;  // no chunks yet
    if (hold.mapped && hold.epoch == word.epoch) continue;
    hold.mapped = false;
    RETURN_IF_ERROR(space_->Map(unit));
    hold.mapped = true;
    hold.epoch = word.epoch;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Client>> NewClient(Attachment attachment) {
  auto client = std::make_unique<ClientImpl>(std::move(attachment));
  RETURN_IF_ERROR(client->Start());
  return client;
}

}  // namespace zerod::client
