// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/fake_client.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status.h"
#include "daemon/engine/narrow.h"

namespace zerod::engine::testing {

FakeClient::FakeClient(const Attachment& attachment, const core::Layout* layout,
                       const core::JobPlan* plan)
    : layout_(layout),
      plan_(*plan),
      slot_(attachment.slot),
      step_(attachment.committed_step + 1) {
  for (uint32_t i = 0; i < shm::kClientFiles; ++i) {
    struct stat file {};
    CHECK_EQ(fstat(attachment.fds[i], &file), 0);
    const bool writes = i == 0 || i == 2 || i == 3;
    void* map = mmap(nullptr, file.st_size, writes ? PROT_READ | PROT_WRITE : PROT_READ,
                     MAP_SHARED, attachment.fds[i], 0);
    CHECK(map != MAP_FAILED) << "file " << i;
    map_.push_back(static_cast<std::byte*>(map));
    map_bytes_.push_back(file.st_size);
  }
  doorbell_ = fcntl(attachment.fds[shm::kClientFiles], F_DUPFD_CLOEXEC, 0);
  CHECK(doorbell_ >= 0);
  const uint32_t units = static_cast<uint32_t>(layout_->units().size());
  const auto sections =
      shm::SubmitLayout(units, static_cast<uint32_t>(layout_->parameters().size()));
  const auto table = shm::UnitsLayout(units, layout_->chunks());
  CHECK(shm::CheckPages(submit(), complete()).ok());
  ring_ = std::make_unique<shm::SubmitRing>(submit(), complete(), doorbell_);
  holds_ = std::make_unique<shm::HoldWords>(
      reinterpret_cast<std::atomic<uint32_t>*>(map_[0] + sections.hold),
      reinterpret_cast<const std::atomic<uint64_t>*>(map_[4] + table.word), units);
  touched_ = reinterpret_cast<uint8_t*>(map_[0] + sections.touched);
  chunks_ = reinterpret_cast<const uint32_t*>(map_[4] + table.chunk);
  staged_.resize(layout_->parameters().size());
  staged_sum_.resize(units);
}

FakeClient::~FakeClient() {
  for (size_t i = 0; i < map_.size(); ++i) munmap(map_[i], map_bytes_[i]);
  close(doorbell_);
}

shm::SubmitEntry FakeClient::Entry(shm::Op op, core::UnitIndex u) {
  shm::SubmitEntry entry{};
  entry.op = op;
  entry.unit = u;
  entry.step = step_;
  entry.cookie = next_cookie_++;
  return entry;
}

absl::StatusOr<shm::CompleteEntry> FakeClient::Request(shm::SubmitEntry entry) {
  RETURN_IF_ERROR(ring_->Push(entry));
  return Await(entry);
}

absl::StatusOr<shm::CompleteEntry> FakeClient::Await(const shm::SubmitEntry& entry) {
  if (entry.cookie == 0) return shm::CompleteEntry{};
  absl::StatusOr<shm::CompleteEntry> complete = AwaitAny();
  if (absl::IsDeadlineExceeded(complete.status())) {
    return absl::DeadlineExceededError(absl::StrCat(
        "no answer to request ", static_cast<int>(entry.op), " of unit ", entry.unit));
  }
  if (complete.ok()) CHECK_EQ(complete->cookie, entry.cookie);
  return complete;
}

absl::StatusOr<shm::CompleteEntry> FakeClient::AwaitAny() {
  shm::CompleteEntry complete{};
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  while (absl::Now() < deadline) {
    if (ring_->Pop(&complete)) {
      if (complete.code == 0) return complete;
      return absl::Status(static_cast<absl::StatusCode>(complete.code), ring_->Text(complete));
    }
    RETURN_IF_ERROR(ring_->Failure());
    ring_->Sleep(absl::Milliseconds(100));
  }
  return absl::DeadlineExceededError("no answer");
}

std::optional<shm::CompleteEntry> FakeClient::TryPop() {
  shm::CompleteEntry complete{};
  if (!ring_->Pop(&complete)) return std::nullopt;
  return complete;
}

void FakeClient::RingDoorbell() {
  const uint64_t one = 1;
  CHECK_EQ(write(doorbell_, &one, sizeof(one)), static_cast<ssize_t>(sizeof(one)));
}

absl::Status FakeClient::WaitForFailure() {
  const absl::Time deadline = absl::Now() + absl::Minutes(1);
  while (ring_->Failure().ok() && absl::Now() < deadline) ring_->Sleep(absl::Milliseconds(100));
  return ring_->Failure();
}

absl::Status FakeClient::Gather(core::UnitIndex u) {
  const uint32_t version = static_cast<uint32_t>(step_ - 1);
  if (holds_->Claim(u, version)) return absl::OkStatus();
  holds_->Intend(u, version);
  absl::Status status = Request(Entry(shm::Op::kGather, u)).status();
  if (!status.ok()) holds_->Unclaim(u);
  return status;
}

void FakeClient::Release(core::UnitIndex u) { holds_->Unclaim(u); }

std::vector<float> FakeClient::Values(core::UnitIndex u) const {
  const shm::UnitWord word = holds_->Word(u);
  CHECK(word.state == shm::CopyState::kValid && word.version == step_ - 1)
      << "unit " << u << " is held but not valid";
  const core::Unit& unit = layout_->units()[u];
  const uint64_t bytes = layout_->UnitBytes(u);
  std::vector<std::byte> raw(bytes);
  for (uint64_t i = 0; i < unit.chunks; ++i) {
    const uint64_t begin = i * shm::kChunkBytes;
    if (begin >= bytes) break;
    const uint32_t chunk = __atomic_load_n(&chunks_[unit.first_chunk + i], __ATOMIC_RELAXED);
    memcpy(raw.data() + begin, map_[5] + uint64_t{chunk} * shm::kChunkBytes,
           std::min(shm::kChunkBytes, bytes - begin));
  }
  std::vector<float> values(unit.elements);
  Widen(layout_->dtype(), raw.data(), values.data(), values.size());
  return values;
}

void FakeClient::Land(uint32_t parameter, const std::vector<float>& gradient) {
  const core::Parameter& p = layout_->parameters()[parameter];
  CHECK_EQ(gradient.size(), p.elements);
  float* out;
  bool add;
  if (plan_.node_sum) {
    std::vector<float>& sum = staged_sum_[p.unit];
    sum.resize(layout_->units()[p.unit].trainable_elements);
    out = sum.data() + p.offset;
    add = staged_[parameter];
    staged_[parameter] = true;
  } else {
    out = reinterpret_cast<float*>(map_[2] + plan_.gradient_offsets[p.unit]) + p.offset;
    add = touched_[parameter] != 0;
    touched_[parameter] = 1;
  }
  for (uint64_t i = 0; i < p.elements; ++i) out[i] = add ? out[i] + gradient[i] : gradient[i];
}

absl::Status FakeClient::Scatter(core::UnitIndex u, bool last) {
  shm::SubmitEntry entry = Entry(shm::Op::kScatter, u);
  entry.flags = last ? shm::kLast : 0;
  if (!plan_.node_sum) return last ? Request(entry).status() : absl::OkStatus();
  const core::Unit& unit = layout_->units()[u];
  const uint32_t parts = core::StagedParts(unit, plan_.staged_part_elements);
  staged_sum_[u].resize(unit.trainable_elements);
  for (uint32_t part = 0; part < parts; ++part) {
    RETURN_IF_ERROR(ScatterPart(u, part, last && part + 1 == parts));
  }
  for (uint32_t p : unit.parameters) staged_[p] = false;
  return absl::OkStatus();
}

absl::Status FakeClient::ScatterPart(core::UnitIndex u, uint32_t part, bool last) {
  const core::Unit& unit = layout_->units()[u];
  const core::Range range = core::StagedPart(unit, plan_.staged_part_elements, part);
  shm::SubmitEntry entry = Entry(shm::Op::kScatter, u);
  entry.flags = last ? shm::kLast : 0;
  entry.arg1 = part;
  memcpy(map_[2] + shm::StagedHeaderBytes(unit.parameters.size()),
         staged_sum_[u].data() + range.begin, range.size() * sizeof(float));
  for (size_t i = 0; i < unit.parameters.size(); ++i) {
    // What lies in no element of this part is left out by the daemon.
    map_[2][i] = staged_[unit.parameters[i]] ? std::byte{1} : std::byte{0};
  }
  if (!makes_room_) return Request(entry).status();
  shm::SubmitEntry room = Entry(shm::Op::kMakeRoom, 0);
  room.cookie = 0;
  RETURN_IF_ERROR(ring_->Push(entry));
  RETURN_IF_ERROR(ring_->Push(room));
  return Await(entry).status();
}

absl::Status FakeClient::EndMicroStep() {
  shm::SubmitEntry entry = Entry(shm::Op::kMicroStep, 0);
  entry.cookie = 0;
  return Request(entry).status();
}

absl::Status FakeClient::Reclaim(core::UnitIndex u) {
  ASSIGN_OR_RETURN(shm::CompleteEntry complete, Request(Entry(shm::Op::kReclaim, u)));
  if (complete.result == 1) {
    for (uint32_t p : layout_->units()[u].parameters) touched_[p] = 0;
  }
  return absl::OkStatus();
}

absl::StatusOr<StepAnswer> FakeClient::Step(const StepOptions& options) {
  shm::StepRecord record{};
  record.max_norm = options.hyper.max_norm;
  record.loss_scale = options.hyper.loss_scale;
  record.want_norm = options.hyper.want_norm ? 1 : 0;
  record.groups = static_cast<uint32_t>(options.hyper.groups.size());
  for (size_t i = 0; i < options.hyper.groups.size(); ++i) {
    const core::Group& g = options.hyper.groups[i];
    shm::GroupRecord& r = record.group[i];
    r.lr = g.lr;
    r.beta1 = g.beta1;
    r.beta2 = g.beta2;
    r.eps = g.eps;
    r.weight_decay = g.weight_decay;
    r.momentum = g.momentum;
    r.dampening = g.dampening;
    r.lr_decay = g.lr_decay;
    r.initial_accumulator_value = g.initial_accumulator_value;
    r.flags = (g.decoupled ? uint64_t{shm::kDecoupled} : 0) |
              (g.bias_correction ? uint64_t{shm::kBiasCorrection} : 0) |
              (g.nesterov ? uint64_t{shm::kNesterov} : 0) |
              (g.eps_inside_sqrt ? uint64_t{shm::kEpsInsideSqrt} : 0) |
              (g.standard_newton_schulz ? uint64_t{shm::kStandardNewtonSchulz} : 0) |
              (g.centered ? uint64_t{shm::kCentered} : 0);
    r.min_coeff = g.min_coeff;
    r.max_coeff = g.max_coeff;
    r.alpha = g.alpha;
    r.rho = g.rho;
    r.momentum_decay = g.momentum_decay;
    r.eta_minus = g.eta_minus;
    r.eta_plus = g.eta_plus;
    r.step_min = g.step_min;
    r.step_max = g.step_max;
    r.lambd = g.lambd;
    r.t0 = g.t0;
    r.lr_before = g.lr_before;
  }
  submit()->step = record;
  memcpy(map_[3] + plan_.transfer_values_bytes, options.blob.data(), options.blob.size());
  shm::SubmitEntry entry = Entry(shm::Op::kStep, 0);
  entry.arg0 = options.blob.size();
  RETURN_IF_ERROR(Request(entry).status());
  ++step_;
  std::fill_n(touched_, layout_->parameters().size(), uint8_t{0});
  return StepAnswer{complete()->grad_norm, complete()->skipped != 0};
}

absl::Status FakeClient::Put(core::UnitIndex u, uint64_t begin, const std::vector<float>& values,
                             shm::StateKind kind) {
  memcpy(map_[3], values.data(), values.size() * sizeof(float));
  shm::SubmitEntry entry = Entry(shm::Op::kPut, u);
  entry.arg0 = begin;
  entry.arg1 = values.size();
  entry.flags = static_cast<uint16_t>(kind);
  return Request(entry).status();
}

absl::StatusOr<std::vector<float>> FakeClient::Read(core::UnitIndex u, uint64_t begin,
                                                    uint64_t count, shm::StateKind kind) {
  shm::SubmitEntry entry = Entry(shm::Op::kRead, u);
  entry.arg0 = begin;
  entry.arg1 = count;
  entry.flags = static_cast<uint16_t>(kind);
  RETURN_IF_ERROR(Request(entry).status());
  std::vector<float> values(count);
  memcpy(values.data(), map_[3], count * sizeof(float));
  return values;
}

absl::StatusOr<core::OptimizerProgress> FakeClient::ReadProgress() {
  shm::SubmitEntry entry = Entry(shm::Op::kReadProgress, 0);
  entry.arg0 = layout_->parameters().size();
  RETURN_IF_ERROR(Request(entry).status());
  shm::ProgressRecord record;
  memcpy(&record, map_[3], sizeof(record));
  core::OptimizerProgress progress;
  progress.parameter_steps.resize(entry.arg0);
  memcpy(progress.parameter_steps.data(), map_[3] + sizeof(record), 8 * entry.arg0);
  if (record.has_loss_scaler != 0) {
    progress.loss_scaler = {record.scale, record.iterations, record.last_overflow,
                            record.hysteresis};
  }
  return progress;
}

absl::StatusOr<double> FakeClient::Restore(const core::OptimizerProgress& progress) {
  shm::ProgressRecord record{};
  if (progress.loss_scaler.has_value()) {
    record.has_loss_scaler = 1;
    record.scale = progress.loss_scaler->scale;
    record.iterations = progress.loss_scaler->iterations;
    record.last_overflow = progress.loss_scaler->last_overflow;
    record.hysteresis = progress.loss_scaler->hysteresis;
  }
  memcpy(map_[3], &record, sizeof(record));
  memcpy(map_[3] + sizeof(record), progress.parameter_steps.data(),
         8 * progress.parameter_steps.size());
  shm::SubmitEntry entry = Entry(shm::Op::kRestore, 0);
  entry.arg0 = progress.parameter_steps.size();
  RETURN_IF_ERROR(Request(entry).status());
  return complete()->loss_scale;
}

absl::StatusOr<std::vector<double>> FakeClient::AllReduce(const std::vector<double>& values,
                                                          shm::ScalarOp op) {
  std::copy(values.begin(), values.end(), submit()->scalar.value);
  shm::SubmitEntry entry = Entry(shm::Op::kScalar, 0);
  entry.arg0 = values.size();
  entry.flags = static_cast<uint16_t>(op);
  RETURN_IF_ERROR(Request(entry).status());
  return std::vector<double>(complete()->scalar.value, complete()->scalar.value + values.size());
}

absl::Status FakeClient::Detach() { return Request(Entry(shm::Op::kDetach, 0)).status(); }

}  // namespace zerod::engine::testing
