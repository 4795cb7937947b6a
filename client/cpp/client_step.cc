// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/cpp/client_impl.h"

namespace zerod::client {

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

absl::StatusOr<uint32_t> ClientImpl::HandOver(uint32_t unit) {
  RETURN_IF_ERROR(CheckUnit(unit));
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->HandOver(unit, step());
}

absl::Status ClientImpl::EndMicroStep() {
  RETURN_IF_ERROR(CheckUsable());
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kLanding, "another thread's gradient"));
  TurnHolder turn(requests_.get(), Requests::Turn::kLanding);
  return gradients_->EndMicroStep(step());
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
    shm::GroupRecord& r = record.group[i];
    r.lr = group.lr;
    r.beta1 = group.beta1;
    r.beta2 = group.beta2;
    r.eps = group.eps;
    r.weight_decay = group.weight_decay;
    r.momentum = group.momentum;
    r.dampening = group.dampening;
    r.lr_decay = group.lr_decay;
    r.initial_accumulator_value = group.initial_accumulator_value;
    r.flags = (group.decoupled ? uint64_t{shm::kDecoupled} : 0) |
              (group.bias_correction ? uint64_t{shm::kBiasCorrection} : 0) |
              (group.nesterov ? uint64_t{shm::kNesterov} : 0) |
              (group.eps_inside_sqrt ? uint64_t{shm::kEpsInsideSqrt} : 0) |
              (group.standard_newton_schulz ? uint64_t{shm::kStandardNewtonSchulz} : 0) |
              (group.centered ? uint64_t{shm::kCentered} : 0);
    r.min_coeff = group.min_coeff;
    r.max_coeff = group.max_coeff;
    r.alpha = group.alpha;
    r.rho = group.rho;
    r.momentum_decay = group.momentum_decay;
    r.eta_minus = group.eta_minus;
    r.eta_plus = group.eta_plus;
    r.step_min = group.step_min;
    r.step_max = group.step_max;
    r.lambd = group.lambd;
    r.t0 = group.t0;
    r.lr_before = group.lr_before;
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
  const absl::Time start = MonotonicNow();
  ReleaseAll();
  // A step that was interrupted is on its way already, and is taken up again here.
  if (step_left_behind_ == 0) RETURN_IF_ERROR(PostStep(request));
  absl::StatusOr<Requests::Answer> answer =
      requests_->Wait(step_left_behind_, "the other ranks' step");
  {
    std::lock_guard<std::mutex> lock(mu_);
    counters_.step_wait_seconds += absl::ToDoubleSeconds(MonotonicNow() - start);
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
  result.loss_scale = complete()->loss_scale;
  loss_scale_.store(result.loss_scale, std::memory_order_relaxed);
  RETURN_IF_ERROR(ForgetStep(true));
  return result;
}

// --- Put, Read, Restore, AllReduce ------------------------------------------------------------

absl::Status ClientImpl::Transfer(const shm::SubmitEntry& entry, absl::string_view what) {
  ASSIGN_OR_RETURN(transfer_left_behind_, requests_->Post(entry));
  absl::StatusOr<Requests::Answer> answer = requests_->Wait(transfer_left_behind_, what);
  if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
  transfer_left_behind_ = 0;
  return answer.ok() ? answer->status : answer.status();
}

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
    RETURN_IF_ERROR(
        Transfer(entry, in != nullptr ? "a write of parameters" : "a read of parameters"));
    if (out != nullptr) memcpy(out, area, entry.arg1 * sizeof(float));
    if (in != nullptr) in += entry.arg1;
    if (out != nullptr) out += entry.arg1;
    entry.arg0 += entry.arg1;
    left -= entry.arg1;
  }
  return absl::OkStatus();
}

absl::Status ClientImpl::Put(uint32_t unit, uint64_t begin, const float* values, uint64_t count,
                             StateKind kind) {
  RETURN_IF_ERROR(CheckRange(unit, begin, count));
  if (kind == StateKind::kMaster && Held(unit)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "unit '", units_[unit].name, "' is gathered; release it before it is written"));
  }
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kPut;
  entry.flags = static_cast<uint16_t>(kind);
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

absl::Status ClientImpl::CheckProgressFits() const {
  RETURN_IF_ERROR(CheckUsable());
  const uint64_t bytes = shm::ProgressBytes(plan().parameters.size());
  if (bytes <= plan().blob_offset) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the steps of ", plan().parameters.size(), " parameters take ", bytes,
                   " bytes, one transfer has ", plan().blob_offset));
}

absl::StatusOr<OptimizerProgress> ClientImpl::ReadProgress() {
  RETURN_IF_ERROR(CheckProgressFits());
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kTransfer, "another thread's transfer"));
  TurnHolder turn(requests_.get(), Requests::Turn::kTransfer);
  RETURN_IF_ERROR(Settle(&transfer_left_behind_, "an earlier transfer"));
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kReadProgress;
  entry.step = step();
  entry.arg0 = plan().parameters.size();
  RETURN_IF_ERROR(Transfer(entry, "the optimizer's counts"));
  shm::ProgressRecord record;
  memcpy(&record, transfer_file_.data(), sizeof(record));
  const auto* steps = At<const uint64_t>(transfer_file_, sizeof(record));
  OptimizerProgress progress;
  for (const ParameterPlan& p : plan().parameters) {
    progress.parameter_steps.push_back(steps[p.touched]);
  }
  if (record.has_loss_scaler != 0) {
    progress.loss_scaler = {record.scale, record.iterations, record.last_overflow,
                            record.hysteresis};
  }
  return progress;
}

absl::Status ClientImpl::Restore(const OptimizerProgress& progress) {
  RETURN_IF_ERROR(CheckProgressFits());
  if (progress.parameter_steps.size() != plan().parameters.size()) {
    return absl::InvalidArgumentError(absl::StrCat(progress.parameter_steps.size(),
                                                   " parameters' steps to restore, the job has ",
                                                   plan().parameters.size()));
  }
  RETURN_IF_ERROR(requests_->Acquire(Requests::Turn::kTransfer, "another thread's transfer"));
  TurnHolder turn(requests_.get(), Requests::Turn::kTransfer);
  RETURN_IF_ERROR(Settle(&transfer_left_behind_, "an earlier transfer"));
  shm::ProgressRecord record{};
  if (progress.loss_scaler.has_value()) {
    record.has_loss_scaler = 1;
    record.scale = progress.loss_scaler->scale;
    record.iterations = progress.loss_scaler->iterations;
    record.last_overflow = progress.loss_scaler->last_overflow;
    record.hysteresis = progress.loss_scaler->hysteresis;
  }
  memcpy(transfer_file_.data(), &record, sizeof(record));
  auto* steps = At<uint64_t>(transfer_file_, sizeof(record));
  for (size_t i = 0; i < progress.parameter_steps.size(); ++i) {
    steps[plan().parameters[i].touched] = progress.parameter_steps[i];
  }
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kRestore;
  entry.step = step();
  entry.arg0 = progress.parameter_steps.size();
  RETURN_IF_ERROR(Transfer(entry, "the other ranks' restore"));
  loss_scale_.store(complete()->loss_scale, std::memory_order_relaxed);
  return absl::OkStatus();
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

}  // namespace zerod::client
