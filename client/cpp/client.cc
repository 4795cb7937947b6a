// SPDX-License-Identifier: Apache-2.0
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "client/cpp/attachment.h"
#include "client/cpp/fork_guard.h"
#include "client/cpp/gradients.h"
#include "client/cpp/mapping.h"
#include "client/cpp/wait.h"
#include "proto/shm/fd_socket.h"

namespace zerod::client {
namespace {

using shm::ClientFile;

template <typename T>
T* At(const FileMapping& mapping, uint64_t offset) {
  return reinterpret_cast<T*>(mapping.data() + offset);
}

class ClientImpl final : public Client {
 public:
  explicit ClientImpl(Attachment attachment) : attachment_(std::move(attachment)) {}
  ~ClientImpl() override;
  absl::Status Start();

  const std::vector<UnitView>& units() const override { return units_; }
  const std::vector<ParameterView>& parameters() const override { return parameters_; }
  uint64_t generation() const override { return plan().generation; }
  uint64_t resumed_step() const override { return plan().committed_step; }
  bool initialized() const override { return plan().initialized; }
  uint32_t members() const override { return plan().members; }
  uint32_t stage() const override { return plan().stage; }
  DType dtype() const override { return plan().dtype; }
  const std::string& resolved_config() const override { return plan().resolved_config; }
  const std::string& plan_text() const override { return plan().plan_text; }
  bool guard_pages() const override { return plan().guard_pages; }
  uint64_t step() const override { return step_.load(std::memory_order_relaxed); }

  absl::Status Gather(uint32_t unit) override;
  bool TryGather(uint32_t unit) override;
  void Release(uint32_t unit) override;
  void ReleaseAll() override;
  bool Held(uint32_t unit) const override;
  absl::Status Land(uint32_t parameter, const void* gradient, DType dtype) override;
  bool Scattered(uint32_t unit) const override;
  absl::Status Scatter(uint32_t unit, bool last) override;
  absl::Status Reclaim(uint32_t unit) override;
  absl::StatusOr<StepResult> Step(const StepRequest& request) override;
  absl::Status Put(uint32_t unit, uint64_t begin, const float* values, uint64_t count) override;
  absl::Status Read(uint32_t unit, uint64_t begin, float* values, uint64_t count,
                    StateKind kind) override;
  absl::StatusOr<std::vector<double>> AllReduce(const std::vector<double>& values,
                                                ScalarOp op) override;
  absl::StatusOr<std::string> ClientState() override;
  absl::Status Detach() override;
  ClientCounters counters() const override;
  const void* base() const override { return space_->base(); }
  uint64_t reserved_bytes() const override { return space_->bytes(); }
  std::shared_ptr<const void> memory() const override { return space_; }

 private:
  const AttachPlan& plan() const { return attachment_.plan; }
  const shm::CompletePage* complete() const {
    return At<const shm::CompletePage>(complete_file_, 0);
  }
  shm::SubmitPage* submit() const { return At<shm::SubmitPage>(submit_file_, 0); }
  int FileFd(ClientFile file) const {
    return attachment_.files[static_cast<size_t>(file)].get();
  }
  absl::Status CheckUsable() const;
  absl::Status CheckUnit(uint32_t unit) const;
  absl::Status CheckRange(uint32_t unit, uint64_t begin, uint64_t count) const;

  // mu_ held. The copy is claimed and valid: maps it if it moved, and counts the unit as held.
  absl::Status Open(uint32_t unit);
  bool TryGatherLocked(uint32_t unit, absl::Status* error);
  void ReleaseLocked(uint32_t unit);
  absl::Status MapResident();
  // PUT and READ, one piece of the transfer area at a time.
  absl::Status Exchange(shm::SubmitEntry entry, const float* in, float* out);
  // Waits for an operation that an interrupt left behind, if there is one.
  absl::Status Settle(uint64_t* left_behind, absl::string_view what);
  absl::Status PostStep(const StepRequest& request);
  // The gradients of this step are used up, or dropped; `committed`: and its number too.
  absl::Status ForgetStep(bool committed);

  Attachment attachment_;
  ForkGuard fork_guard_;
  std::vector<UnitView> units_;
  std::vector<ParameterView> parameters_;
  FileMapping submit_file_;
  FileMapping complete_file_;
  FileMapping gradient_file_;
  FileMapping transfer_file_;
  FileMapping units_file_;
  std::shared_ptr<AddressSpace> space_;
  std::unique_ptr<shm::HoldWords> holds_;
  std::unique_ptr<Requests> requests_;
  std::unique_ptr<Gradients> gradients_;  // Turn::kLanding
  std::atomic<uint64_t> step_{1};         // written under mu_
  std::atomic<bool> left_{false};         // Detach() succeeded

  // Before Requests' own mutex in the order of locking.
  mutable std::mutex mu_;
  struct UnitHold {
    bool held = false;
    bool mapped = false;
    uint32_t epoch = 0;  // of what is mapped
  };
  std::vector<UnitHold> unit_holds_;  // mu_
  std::vector<uint32_t> held_;        // mu_: the held units
  uint32_t trace_len_ = 0;            // mu_
  ClientCounters counters_;           // mu_

  uint64_t transfer_left_behind_ = 0;  // Turn::kTransfer
  uint64_t scalar_left_behind_ = 0;    // Turn::kScalar
  uint64_t step_left_behind_ = 0;      // Turn::kStep
};

ClientImpl::~ClientImpl() {
  if (!fork_guard_.Here()) {
    // The parent's connection stays as it is; this process's copies of the descriptors go with it.
    for (auto& file : attachment_.files) (void)file.Release();
    (void)attachment_.socket.Release();
    return;
  }
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
      attachment_.socket.get(), attachment_.address, attachment_.interrupt);
  gradients_ = std::make_unique<Gradients>(&plan(), gradient_file_.data(),
                                           At<uint8_t>(submit_file_, submit_at.touched),
                                           requests_.get());
  const uint64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
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
  if (unit_holds_[unit].held) return true;
  if (!holds_->Claim(unit, static_cast<uint32_t>(step() - 1))) return false;
  *error = Open(unit);
  if (!error->ok()) holds_->Unclaim(unit);
  return error->ok();
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
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kGather;
  entry.unit = unit;
  entry.step = step();
  lock.unlock();
  const absl::Time start = absl::Now();
  absl::StatusOr<uint64_t> cookie = requests_->Post(entry);
  absl::Status answer = cookie.status();
  if (cookie.ok()) {
    absl::StatusOr<Requests::Answer> waited =
        requests_->Wait(*cookie, absl::StrCat("unit '", units_[unit].name, "'"));
    answer = waited.ok() ? waited->status : waited.status();
    if (absl::IsCancelled(answer)) requests_->Abandon(*cookie);
  }
  lock.lock();
  counters_.gather_wait_seconds += absl::ToDoubleSeconds(absl::Now() - start);
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
  if (!answer.ok()) holds_->Unclaim(unit);
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
  holds_->Unclaim(unit);
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

// --- Gradients --------------------------------------------------------------------------------

absl::Status ClientImpl::Land(uint32_t parameter, const void* gradient, DType dtype) {
  RETURN_IF_ERROR(CheckUsable());
  if (parameter >= parameters_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("parameter ", parameter, " is not one of the ",
                                                   parameters_.size(), " attached"));
  }
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->Land(parameter, gradient, dtype, step());
}

bool ClientImpl::Scattered(uint32_t unit) const {
  if (!CheckUnit(unit).ok()) return false;
  if (!requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient").ok()) {
    return false;
  }
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->Scattered(unit);
}

absl::Status ClientImpl::Scatter(uint32_t unit, bool last) {
  RETURN_IF_ERROR(CheckUnit(unit));
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->Scatter(unit, last, step());
}

absl::Status ClientImpl::Reclaim(uint32_t unit) {
  RETURN_IF_ERROR(CheckUnit(unit));
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->Reclaim(unit, step());
}

// --- Step -------------------------------------------------------------------------------------

absl::Status ClientImpl::Settle(uint64_t* left_behind, absl::string_view what) {
  if (*left_behind == 0) return absl::OkStatus();
  absl::StatusOr<Requests::Answer> answer = requests_->Wait(*left_behind, what);
  if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
  *left_behind = 0;  // what it said is of no use to the operation that follows
  return absl::OkStatus();
}

absl::Status ClientImpl::PostStep(const StepRequest& request) {
  if (request.groups.size() > shm::kGroupsMax) {
    return absl::InvalidArgumentError(absl::StrCat(request.groups.size(),
                                                   " parameter groups, at most ",
                                                   shm::kGroupsMax, " are served"));
  }
  const uint64_t blob_room = plan().transfer_bytes - plan().blob_offset;
  if (request.blob.size() > blob_room) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "this client's state has ", request.blob.size(), " bytes and at most ", blob_room,
        " are kept with a step; raise zerod.client_state_bytes_max"));
  }
  {
    RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
    TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
    RETURN_IF_ERROR(gradients_->ScatterRest(step()));
  }
  if (!request.blob.empty()) {
    memcpy(transfer_file_.data() + plan().blob_offset, request.blob.data(), request.blob.size());
  }
  shm::StepRecord record{};
  record.max_norm = request.max_norm;
  record.loss_scale = request.loss_scale;
  record.want_norm = request.want_norm ? 1 : 0;
  record.groups = static_cast<uint32_t>(request.groups.size());
  for (size_t i = 0; i < request.groups.size(); ++i) {
    const Group& group = request.groups[i];
    record.group[i] = {group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, {}};
  }
  memcpy(&submit()->step, &record, sizeof(record));
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kStep;
  entry.step = step();
  entry.arg0 = request.blob.size();
  ASSIGN_OR_RETURN(step_left_behind_, requests_->Post(entry));
  return absl::OkStatus();
}

absl::Status ClientImpl::ForgetStep(bool committed) {
  {
    RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
    TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
    RETURN_IF_ERROR(gradients_->EndStep());
  }
  {
    std::lock_guard<std::mutex> lock(mu_);
    trace_len_ = 0;
    submit()->trace_len.store(0, std::memory_order_relaxed);
    if (!committed) return absl::OkStatus();
    step_.fetch_add(1, std::memory_order_relaxed);
    space_->SetStep(step());
  }
  return MapResident();
}

absl::StatusOr<StepResult> ClientImpl::Step(const StepRequest& request) {
  RETURN_IF_ERROR(CheckUsable());
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kStep, "another thread's step"));
  TurnHolder turn(requests_.get(), Requests::Turn::kStep);
  const absl::Time start = absl::Now();
  ReleaseAll();
  // A step that was interrupted is on its way already, and is taken up again here.
  if (step_left_behind_ == 0) RETURN_IF_ERROR(PostStep(request));
  absl::StatusOr<Requests::Answer> answer =
      requests_->Wait(step_left_behind_, "the other ranks' step");
  {
    std::lock_guard<std::mutex> lock(mu_);
    counters_.step_wait_seconds += absl::ToDoubleSeconds(absl::Now() - start);
  }
  if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
  step_left_behind_ = 0;
  if (!answer.ok()) return answer.status();
  if (!answer->status.ok()) {
    // Refused by all: the gradients are dropped on every rank.
    if (absl::IsFailedPrecondition(answer->status)) RETURN_IF_ERROR(ForgetStep(false));
    return answer->status;
  }
  StepResult result;
  result.skipped = complete()->skipped != 0;
  result.grad_norm = complete()->grad_norm;
  RETURN_IF_ERROR(ForgetStep(true));
  return result;
}

// --- Put, Read, AllReduce ---------------------------------------------------------------------

absl::Status ClientImpl::Exchange(shm::SubmitEntry entry, const float* in, float* out) {
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kTransfer, "another thread's transfer"));
  TurnHolder turn(requests_.get(), Requests::Turn::kTransfer);
  RETURN_IF_ERROR(Settle(&transfer_left_behind_, "an earlier transfer"));
  auto* area = At<float>(transfer_file_, 0);
  const uint64_t room = plan().blob_offset / sizeof(float);
  uint64_t left = entry.arg1;
  while (left > 0) {
    entry.arg1 = std::min(left, room);
    if (in != nullptr) memcpy(area, in, entry.arg1 * sizeof(float));
    ASSIGN_OR_RETURN(transfer_left_behind_, requests_->Post(entry));
    absl::StatusOr<Requests::Answer> answer =
        requests_->Wait(transfer_left_behind_, in != nullptr ? "a write of parameters"
                                                             : "a read of parameters");
    if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
    transfer_left_behind_ = 0;
    if (!answer.ok()) return answer.status();
    RETURN_IF_ERROR(answer->status);
    if (out != nullptr) memcpy(out, area, entry.arg1 * sizeof(float));
    if (in != nullptr) in += entry.arg1;
    if (out != nullptr) out += entry.arg1;
    entry.arg0 += entry.arg1;
    left -= entry.arg1;
  }
  return absl::OkStatus();
}

absl::Status ClientImpl::Put(uint32_t unit, uint64_t begin, const float* values, uint64_t count) {
  RETURN_IF_ERROR(CheckRange(unit, begin, count));
  if (Held(unit)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "unit '", units_[unit].name, "' is gathered; release it before it is written"));
  }
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kPut;
  entry.unit = unit;
  entry.step = step();
  entry.arg0 = begin;
  entry.arg1 = count;
  return Exchange(entry, values, nullptr);
}

absl::Status ClientImpl::Read(uint32_t unit, uint64_t begin, float* values, uint64_t count,
                              StateKind kind) {
  RETURN_IF_ERROR(CheckRange(unit, begin, count));
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kRead;
  entry.flags = static_cast<uint16_t>(kind);
  entry.unit = unit;
  entry.step = step();
  entry.arg0 = begin;
  entry.arg1 = count;
  return Exchange(entry, nullptr, values);
}

absl::StatusOr<std::vector<double>> ClientImpl::AllReduce(const std::vector<double>& values,
                                                          ScalarOp op) {
  RETURN_IF_ERROR(CheckUsable());
  if (values.size() > shm::kScalarsMax) {
    return absl::InvalidArgumentError(absl::StrCat(values.size(), " values, at most ",
                                                   shm::kScalarsMax,
                                                   " are reduced in one call"));
  }
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kScalar, "another thread's all-reduce"));
  TurnHolder turn(requests_.get(), Requests::Turn::kScalar);
  RETURN_IF_ERROR(Settle(&scalar_left_behind_, "an earlier all-reduce"));
  for (size_t i = 0; i < values.size(); ++i) submit()->scalar.value[i] = values[i];
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kScalar;
  entry.flags = static_cast<uint16_t>(op);
  entry.step = step();
  entry.arg0 = values.size();
  ASSIGN_OR_RETURN(scalar_left_behind_, requests_->Post(entry));
  absl::StatusOr<Requests::Answer> answer = requests_->Wait(
      scalar_left_behind_, values.empty() ? "the other ranks' barrier"
                                          : "the other ranks' all-reduce");
  if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
  scalar_left_behind_ = 0;
  if (!answer.ok()) return answer.status();
  RETURN_IF_ERROR(answer->status);
  std::vector<double> result(values.size());
  shm::CopyShared(result.data(), complete()->scalar.value, result.size() * sizeof(double));
  return result;
}

absl::StatusOr<std::string> ClientImpl::ClientState() {
  RETURN_IF_ERROR(CheckUsable());
  return attachment_.client_state;
}

absl::Status ClientImpl::Detach() {
  RETURN_IF_ERROR(CheckUsable());
  ReleaseAll();
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kDetach;
  entry.step = step();
  ASSIGN_OR_RETURN(const uint64_t cookie, requests_->Post(entry));
  absl::StatusOr<Requests::Answer> answer = requests_->Wait(cookie, "the daemon's farewell");
  if (answer.ok()) {
    RETURN_IF_ERROR(answer->status);
  } else if (!absl::IsUnavailable(answer.status()) || !requests_->AllTaken()) {
    return answer.status();
  }
  // Where the last one left, the daemon may hang up before this process has read the answer.
  left_.store(true, std::memory_order_relaxed);
  return absl::OkStatus();
}

ClientCounters ClientImpl::counters() const {
  ClientCounters result;
  {
    std::lock_guard<std::mutex> lock(mu_);
    result = counters_;
  }
  result.remaps = space_->remaps();
  if (!CheckUsable().ok()) return result;
  if (requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient").ok()) {
    TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
    result.scatter_bytes = gradients_->landed_bytes();
    result.scatter_wait_seconds = gradients_->wait_seconds();
  }
  return result;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> NewClient(Attachment attachment) {
  auto client = std::make_unique<ClientImpl>(std::move(attachment));
  RETURN_IF_ERROR(client->Start());
  return client;
}

}  // namespace zerod::client
