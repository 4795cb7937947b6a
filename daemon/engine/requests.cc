// SPDX-License-Identifier: Apache-2.0
//
// What clients say: copies of ring entries, checked, then told to core. Whatever no well-behaved
// client library would say ends the attachment of the client that said it, and nothing else.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "daemon/engine/job_runner_impl.h"

namespace zerod::engine {
namespace {

using core::SlotIndex;
using core::UnitIndex;
using shm::Op;

bool IsAnswered(Op op) {
  return op != Op::kRelease && op != Op::kMicroStep && op != Op::kMakeRoom;
}
bool NeedsCookie(Op op) { return IsAnswered(op) && op != Op::kScatter; }
bool NamesUnit(Op op) {
  return op == Op::kGather || op == Op::kRelease || op == Op::kScatter || op == Op::kReclaim ||
         op == Op::kPut || op == Op::kRead;
}

absl::StatusOr<core::HyperParameters> ReadHyperParameters(const shm::StepRecord& record) {
  if (record.groups > shm::kGroupsMax) {
    return absl::InvalidArgumentError(absl::StrCat("STEP with ", record.groups,
                                                   " parameter groups, at most ",
                                                   shm::kGroupsMax, " are possible"));
  }
  core::HyperParameters hyper;
  hyper.max_norm = record.max_norm;
  hyper.loss_scale = record.loss_scale;
  hyper.want_norm = record.want_norm != 0;
  if (!std::isfinite(record.max_norm) || !std::isfinite(record.loss_scale) ||
      record.loss_scale <= 0) {
    return absl::InvalidArgumentError(
        "STEP with hyper-parameters that no optimizer can use: the clipping norm and the loss "
        "scale must be finite, the loss scale above 0");
  }
  for (uint32_t i = 0; i < record.groups; ++i) {
    const shm::GroupRecord& r = record.group[i];
    core::Group& g = hyper.groups.emplace_back();
    g.lr = r.lr;
    g.beta1 = r.beta1;
    g.beta2 = r.beta2;
    g.eps = r.eps;
    g.weight_decay = r.weight_decay;
    g.momentum = r.momentum;
    g.dampening = r.dampening;
    g.lr_decay = r.lr_decay;
    g.initial_accumulator_value = r.initial_accumulator_value;
    g.decoupled = (r.flags & shm::kDecoupled) != 0;
    g.bias_correction = (r.flags & shm::kBiasCorrection) != 0;
    g.nesterov = (r.flags & shm::kNesterov) != 0;
    g.min_coeff = r.min_coeff;
    g.max_coeff = r.max_coeff;
    g.eps_inside_sqrt = (r.flags & shm::kEpsInsideSqrt) != 0;
    g.standard_newton_schulz = (r.flags & shm::kStandardNewtonSchulz) != 0;
    g.centered = (r.flags & shm::kCentered) != 0;
    g.alpha = r.alpha;
    g.rho = r.rho;
    g.momentum_decay = r.momentum_decay;
    g.eta_minus = r.eta_minus;
    g.eta_plus = r.eta_plus;
    g.step_min = r.step_min;
    g.step_max = r.step_max;
    g.lambd = r.lambd;
    g.t0 = r.t0;
    g.lr_before = r.lr_before;
  }
  return hyper;
}

}  // namespace

bool JobRunnerImpl::Serve(SlotIndex slot, int limit) {
  const std::shared_ptr<ClientSlot> client = slots_[slot].client;
  if (client == nullptr) return false;
  for (int i = 0; i < limit; ++i) {
    if (client->state != ClientSlot::State::kAttached) return false;
    shm::SubmitEntry entry;
    const absl::StatusOr<bool> got = client->ring().Pop(&entry);
    if (got.ok() && !*got) return false;
    const absl::Status status = got.ok() ? Handle(client.get(), entry) : got.status();
    if (!status.ok()) Reject(client.get(), status);
    RunActions();
  }
  return true;
}

void JobRunnerImpl::Reject(ClientSlot* client, const absl::Status& why) {
  if (client->state != ClientSlot::State::kAttached) return;
  const std::string text = absl::StrCat("rank ", client->rank, " (process ", client->pid,
                                        ") broke the rules of its ring: ", why.message());
  client->ring().Fail(why.code(), text);
  client->state = ClientSlot::State::kFailed;  // its process lives, and so do its holds
  StopServing(client);
  metrics_->CountClientDeath();
  job_->OnClientGone(client->slot, text);
}

absl::Status JobRunnerImpl::Remember(ClientSlot* client, const shm::SubmitEntry& entry) {
  if (entry.cookie == 0) {
    if (!NeedsCookie(entry.op)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("request ", static_cast<int>(entry.op),
                                                   " without a cookie"));
  }
  if (!IsAnswered(entry.op)) return absl::OkStatus();
  if (client->pending.size() >= shm::kRingEntries) {
    return absl::ResourceExhaustedError(
        absl::StrCat("more than ", shm::kRingEntries, " requests in flight"));
  }
  PendingRequest request;
  request.op = entry.op;
  request.since = MonotonicNow();
  request.unit = entry.unit;
  request.count = entry.arg1;
  request.staging_offset = entry.arg0;
  request.part = static_cast<uint32_t>(entry.arg1);
  if (!client->pending.emplace(entry.cookie, std::move(request)).second) {
    return absl::InvalidArgumentError(
        absl::StrCat("the cookie ", entry.cookie, " names two requests in flight"));
  }
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::CheckRange(const shm::SubmitEntry& entry) const {
  const uint64_t elements = request_.layout->units()[entry.unit].elements;
  if (entry.arg0 > elements || entry.arg1 > elements - entry.arg0 || entry.arg1 == 0 ||
      entry.arg1 > plan_.transfer_values_bytes / sizeof(float)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "elements [", entry.arg0, ", +", entry.arg1, ") of unit ", entry.unit, ", which has ",
        elements, "; one transfer has 1 to ", plan_.transfer_values_bytes / sizeof(float)));
  }
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::Handle(ClientSlot* client, const shm::SubmitEntry& entry) {
  if (NamesUnit(entry.op) && entry.unit >= request_.layout->units().size()) {
    return absl::InvalidArgumentError(absl::StrCat("there is no unit ", entry.unit,
                                                   ", the layout has ",
                                                   request_.layout->units().size()));
  }
  RETURN_IF_ERROR(Remember(client, entry));
  if (entry.step != 0) slots_[client->slot].step = entry.step;
  const SlotIndex slot = client->slot;
  switch (entry.op) {
    case Op::kGather:
      job_->OnGather(slot, entry.cookie, entry.unit, entry.step);
      return absl::OkStatus();
    case Op::kRelease:
      job_->OnRelease(slot, entry.unit);
      return absl::OkStatus();
    case Op::kScatter:
      return HandleScatter(client, entry);
    case Op::kMicroStep:
      job_->OnMicroStep(slot, entry.step);
      return absl::OkStatus();
    case Op::kMakeRoom:
      job_->OnMakeRoom(slot);
      return absl::OkStatus();
    case Op::kReclaim:
      job_->OnReclaim(slot, entry.cookie, entry.unit, entry.step);
      return absl::OkStatus();
    case Op::kStep:
      return HandleStep(client, entry);
    case Op::kPut:
    case Op::kRead:
      return HandlePutOrRead(client, entry);
    case Op::kScalar:
      return HandleScalar(client, entry);
    case Op::kReadProgress:
      RETURN_IF_ERROR(CheckProgress(entry));
      job_->OnReadProgress(slot, entry.cookie);
      return absl::OkStatus();
    case Op::kRestore:
      return HandleRestore(client, entry);
    case Op::kDetach:
      job_->OnDetach(slot, entry.cookie);
      return absl::OkStatus();
    case Op::kNone:
      break;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("there is no request ", static_cast<int>(entry.op)));
}

// The unit's elements that this scatter is of.
absl::StatusOr<core::Range> JobRunnerImpl::ScatteredRange(const shm::SubmitEntry& entry) const {
  const core::Unit& unit = request_.layout->units()[entry.unit];
  if (!plan_.node_sum) return core::Range{0, unit.trainable_elements};
  const uint32_t parts = core::StagedParts(unit, plan_.staged_part_elements);
  if (entry.arg1 >= parts) {
    return absl::InvalidArgumentError(absl::StrCat("part ", entry.arg1, " of the gradient of unit ",
                                                   entry.unit, ", which has ", parts));
  }
  const core::Range range = core::StagedPart(unit, plan_.staged_part_elements,
                                             static_cast<uint32_t>(entry.arg1));
  const uint64_t needed =
      shm::StagedHeaderBytes(unit.parameters.size()) + range.size() * sizeof(float);
  if (entry.cookie == 0 || entry.arg0 % shm::kStagedAlignBytes != 0 ||
      needed > plan_.gradient_file_bytes || entry.arg0 > plan_.gradient_file_bytes - needed) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a gradient of unit ", entry.unit, " staged at byte ", entry.arg0, ": it needs ", needed,
        " of ", plan_.gradient_file_bytes, " bytes, an offset divisible by ",
        shm::kStagedAlignBytes, " and a cookie"));
  }
  return range;
}

// Which of the unit's parameters this scatter carries: from the touched bytes of the submit file,
// or, under node_sum, from those in front of the staged gradient.
// REQUIRES: `range` is ScatteredRange(entry).
std::vector<bool> JobRunnerImpl::ScatteredParameters(const ClientSlot& client,
                                                     const shm::SubmitEntry& entry,
                                                     core::Range range) const {
  const core::Unit& unit = request_.layout->units()[entry.unit];
  const size_t parameters = unit.parameters.size();
  std::vector<bool> touched(parameters);
  std::vector<uint8_t> bytes(parameters);
  if (plan_.node_sum) {
    shm::CopyShared(bytes.data(), client.gradient() + entry.arg0, parameters);
  } else {
    for (size_t i = 0; i < parameters; ++i) {
      shm::CopyShared(&bytes[i], client.touched() + unit.parameters[i], 1);
    }
  }
  for (size_t i = 0; i < parameters; ++i) {
    const core::Parameter& p = request_.layout->parameters()[unit.parameters[i]];
    const bool here =
        p.elements == 0 || !Intersect(range, {p.offset, p.offset + p.elements}).empty();
    touched[i] = bytes[i] != 0 && p.trainable && here;
  }
  return touched;
}

absl::Status JobRunnerImpl::HandleScatter(ClientSlot* client, const shm::SubmitEntry& entry) {
  if ((entry.flags & ~shm::kLast) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("SCATTER with flags ", entry.flags));
  }
  ASSIGN_OR_RETURN(const core::Range range, ScatteredRange(entry));
  const std::vector<bool> touched = ScatteredParameters(*client, entry, range);
  const bool last = (entry.flags & shm::kLast) != 0;
  const core::Unit& unit = request_.layout->units()[entry.unit];
  // As in core, which answers the others with an error.
  const bool counts = job_->state() == core::JobState::kRunning &&
                      entry.step == job_->committed() + 1 &&
                      job_->NextRound(client->slot, entry.unit) <= core::kRoundsMax &&
                      std::none_of(client->pending.begin(), client->pending.end(),
                                   [](const auto& p) { return p.second.op == Op::kStep; });
  if (counts) {
    uint64_t elements = 0;
    for (size_t i = 0; i < touched.size(); ++i) {
      const core::Parameter& p = request_.layout->parameters()[unit.parameters[i]];
      if (touched[i]) elements += Intersect(range, {p.offset, p.offset + p.elements}).size();
    }
    bytes_scattered_ += elements * sizeof(float);
    metrics_->Add(metrics::Traffic::kScatteredFromClient, elements * sizeof(float));
    if (plan_.node_sum || last) {
      book_->Mark(client->slot, entry.unit, entry.step,
                  job_->NextRound(client->slot, entry.unit), last, touched);
    }
    if (plan_.node_sum) client->pending.at(entry.cookie).touched = touched;
  }
  job_->OnScatter(client->slot, entry.cookie, entry.unit, entry.step, last, entry.arg0, touched,
                  plan_.node_sum ? static_cast<uint32_t>(entry.arg1) : 0);
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::HandleStep(ClientSlot* client, const shm::SubmitEntry& entry) {
  const uint64_t blob_area = plan_.transfer_bytes - plan_.transfer_values_bytes;
  if (entry.arg0 > std::min<uint64_t>(blob_area, request_.config.zerod.client_state_bytes_max)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "STEP with ", entry.arg0, " bytes of client state; zerod.client_state_bytes_max is ",
        request_.config.zerod.client_state_bytes_max));
  }
  shm::StepRecord record;
  shm::CopyShared(&record, &client->submit()->step, sizeof(record));
  ASSIGN_OR_RETURN(core::HyperParameters hyper, ReadHyperParameters(record));
  const uint32_t length = std::min(client->submit()->trace_len.load(std::memory_order_acquire),
                                   shm::kTraceMax);
  std::vector<UnitIndex> trace(length);
  shm::CopyShared(trace.data(), client->trace(), length * sizeof(UnitIndex));
  SlotInfo& slot = slots_[client->slot];
  if (entry.step == job_->committed() + 1) {
    std::string blob(entry.arg0, '\0');
    shm::CopyShared(blob.data(), client->transfer() + plan_.transfer_values_bytes, blob.size());
    slot.pending_blob.emplace(entry.step, std::move(blob));
    last_step_at_ = MonotonicNow();
  }
  job_->OnStep(client->slot, entry.cookie, entry.step, hyper, trace);
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::HandlePutOrRead(ClientSlot* client, const shm::SubmitEntry& entry) {
  RETURN_IF_ERROR(CheckRange(entry));
  if (entry.flags > static_cast<uint16_t>(shm::StateKind::kGradient)) {
    return absl::InvalidArgumentError(absl::StrCat("there is no state of kind ", entry.flags));
  }
  const auto kind = static_cast<core::StateKind>(entry.flags);
  if (entry.op == Op::kPut) {
    job_->OnPut(client->slot, entry.cookie, entry.unit, entry.arg0, entry.arg1, kind);
  } else {
    job_->OnRead(client->slot, entry.cookie, entry.unit, entry.arg0, entry.arg1, kind);
  }
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::CheckProgress(const shm::SubmitEntry& entry) const {
  const uint64_t parameters = request_.layout->parameters().size();
  if (entry.arg0 != parameters ||
      shm::ProgressBytes(parameters) > plan_.transfer_values_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the steps of ", entry.arg0, " parameters, where the layout has ", parameters,
                     " and one transfer has ", plan_.transfer_values_bytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::HandleRestore(ClientSlot* client, const shm::SubmitEntry& entry) {
  RETURN_IF_ERROR(CheckProgress(entry));
  shm::ProgressRecord record;
  shm::CopyShared(&record, client->transfer(), sizeof(record));
  core::OptimizerProgress progress;
  progress.parameter_steps.resize(entry.arg0);
  shm::CopyShared(progress.parameter_steps.data(), client->transfer() + sizeof(record),
                  entry.arg0 * sizeof(uint64_t));
  if (record.has_loss_scaler != 0) {
    progress.loss_scaler = {record.scale, record.iterations, record.last_overflow,
                            record.hysteresis};
  }
  job_->OnRestore(client->slot, entry.cookie, progress);
  return absl::OkStatus();
}

absl::Status JobRunnerImpl::HandleScalar(ClientSlot* client, const shm::SubmitEntry& entry) {
  if (entry.arg0 > shm::kScalarsMax ||
      entry.flags > static_cast<uint16_t>(shm::ScalarOp::kMax)) {
    return absl::InvalidArgumentError(absl::StrCat("SCALAR of ", entry.arg0, " values, operation ",
                                                   entry.flags, "; at most ", shm::kScalarsMax,
                                                   " values"));
  }
  core::ScalarValues values;
  values.op = static_cast<core::ScalarOp>(entry.flags);
  values.values.resize(entry.arg0);
  shm::CopyShared(values.values.data(), &client->submit()->scalar, entry.arg0 * sizeof(double));
  job_->OnScalar(client->slot, entry.cookie, values);
  return absl::OkStatus();
}

}  // namespace zerod::engine
