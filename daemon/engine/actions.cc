// SPDX-License-Identifier: Apache-2.0
//
// What core wants done.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/clock.h"
#include "daemon/engine/apply.h"
#include "daemon/engine/job_runner_impl.h"

namespace zerod::engine {
namespace {

using core::Range;
using core::UnitIndex;

// Blocks per part of a norm: one is 64 Ki elements at most.
constexpr size_t kBlocksPerPart = 4;

double SecondsSince(absl::Time since) { return absl::ToDoubleSeconds(MonotonicNow() - since); }

}  // namespace

void JobRunnerImpl::RunActions() {
  for (;;) {
    std::vector<core::Action> actions = job_->TakeActions();
    if (actions.empty()) return;
    for (core::Action& action : actions) {
      std::visit([this](auto& a) { Do(a); }, action);
    }
  }
}

// A failure that core must hear of, but not from within its own action.
void JobRunnerImpl::Broken(const absl::Status& status) {
  mailbox_->Post([this, status] { job_->OnFail(status); });
}

std::vector<std::shared_ptr<ClientSlot>> JobRunnerImpl::Clients() const {
  std::vector<std::shared_ptr<ClientSlot>> clients;
  for (const SlotInfo& slot : slots_) clients.push_back(slot.client);
  return clients;
}

// --- Clients -----------------------------------------------------------------------------------

void JobRunnerImpl::Observe(const PendingRequest& request, const core::Complete& action) {
  if (!action.status.ok()) return;
  const double seconds = SecondsSince(request.since);
  const uint64_t bytes = request.count * sizeof(float);
  switch (request.op) {
    case shm::Op::kGather:
      metrics_->Observe(metrics::Latency::kGather, seconds);
      break;
    case shm::Op::kScatter:
      metrics_->Observe(metrics::Latency::kScatter, seconds);
      break;
    case shm::Op::kPut:
      metrics_->Observe(metrics::Latency::kPut, seconds);
      metrics_->Add(metrics::Traffic::kCopiedFromTransfer, bytes);
      break;
    case shm::Op::kRead:
      metrics_->Observe(metrics::Latency::kRead, seconds);
      metrics_->Add(metrics::Traffic::kCopiedToTransfer, bytes);
      break;
    default:
      break;
  }
}

void JobRunnerImpl::WriteProgress(const core::OptimizerProgress& progress,
                                  ClientSlot* client) const {
  const std::vector<uint64_t>& steps = progress.parameter_steps;
  CHECK_LE(shm::ProgressBytes(steps.size()), plan_.transfer_values_bytes);
  shm::ProgressRecord record{};
  if (progress.loss_scaler.has_value()) {
    record.has_loss_scaler = 1;
    record.scale = progress.loss_scaler->scale;
    record.iterations = progress.loss_scaler->iterations;
    record.last_overflow = progress.loss_scaler->last_overflow;
    record.hysteresis = progress.loss_scaler->hysteresis;
  }
  memcpy(client->transfer(), &record, sizeof(record));
  memcpy(client->transfer() + sizeof(record), steps.data(), steps.size() * sizeof(uint64_t));
}

void JobRunnerImpl::Do(core::Complete& action) {
  const std::shared_ptr<ClientSlot> client = slots_[action.slot].client;
  if (client == nullptr || client->state != ClientSlot::State::kAttached) return;
  const auto it = client->pending.find(action.cookie);
  if (it == client->pending.end()) return;
  const PendingRequest request = std::move(it->second);
  client->pending.erase(it);
  Observe(request, action);
  shm::CompletePage* page = client->complete();
  if (action.scalar.has_value()) {
    const std::vector<double>& values = action.scalar->values;
    std::copy_n(values.begin(), std::min<size_t>(values.size(), shm::kScalarsMax),
                page->scalar.value);
  }
  // Once per step, with the last of its answers; a STEP that was asked again is none of them.
  if (request.op == shm::Op::kStep && action.step.has_value() && !OldestStep().has_value() &&
      observed_step_ != job_->committed()) {
    observed_step_ = job_->committed();
    last_step_seconds_ = SecondsSince(last_step_at_);
    metrics_->Observe(metrics::Latency::kStep, last_step_seconds_);
  }
  if (action.step.has_value()) {
    page->grad_norm = action.step->grad_norm;
    page->skipped = action.step->skipped ? 1 : 0;
    page->loss_scale = action.step->next_loss_scale;
  }
  if (action.loss_scale.has_value()) page->loss_scale = *action.loss_scale;
  if (action.progress.has_value()) WriteProgress(*action.progress, client.get());
  shm::CompleteEntry entry{};
  entry.cookie = action.cookie;
  entry.code = static_cast<int32_t>(action.status.code());
  entry.result = action.result;
  const absl::Status pushed =
      client->ring().Push(entry, std::string(action.status.message()));
  if (!pushed.ok()) return Reject(client.get(), pushed);
  client->ring().Wake();
  if (request.op == shm::Op::kDetach && action.status.ok()) {
    client->state = ClientSlot::State::kLeft;
    StopServing(client.get());
  }
}

void JobRunnerImpl::Do(core::FailSlot& action) {
  SlotInfo& slot = slots_[action.slot];
  if (slot.preparing) slot.preparing_failure = action.status;
  if (slot.client == nullptr || slot.client->state != ClientSlot::State::kAttached) return;
  slot.client->ring().Fail(action.status.code(), std::string(action.status.message()));
  slot.client->state = ClientSlot::State::kFailed;
  StopServing(slot.client.get());
}

void JobRunnerImpl::Do(core::Send& action) {
  CHECK_NE(action.to, request_.self);
  peers_->Send(action.to, std::move(action.message));
}

void JobRunnerImpl::Do(core::CommitBlobs& action) {
  for (SlotInfo& slot : slots_) {
    if (slot.client == nullptr || !slot.pending_blob.has_value() ||
        slot.pending_blob->first != action.step) {
      continue;
    }
    blobs_[slot.client->rank] = {action.step, std::move(slot.pending_blob->second)};
    slot.pending_blob.reset();
  }
  GiveSideMemoryBack();
}

void JobRunnerImpl::Do(core::DropGradients&) {
  book_->Drop();
  GiveSideMemoryBack();
  for (SlotInfo& slot : slots_) slot.pending_blob.reset();
}

void JobRunnerImpl::Do(core::End& action) {
  if (over_) return;
  over_ = true;
  connect_cancel_->Cancel();
  if (fabric_ != nullptr) {
    fabric_->Abort(action.status.ok() ? absl::CancelledError("the job is over") : action.status);
  }
  ended_(action.status);
}

// --- Between members ---------------------------------------------------------------------------

void JobRunnerImpl::Do(core::Connect&) {
  if (request_.members == 1) {  // nothing will ever be exchanged
    mailbox_->Post([this] { job_->OnConnected(absl::OkStatus()); });
    return;
  }
  CHECK(!connector_.joinable()) << "core connects once";
  connector_ = std::thread([this] {
    fabric::FabricOptions options;
    options.rank = request_.self;
    options.size = request_.members;
    options.bind_host = request_.fabric_bind_host;
    options.stall_timeout = request_.fabric_stall_timeout;
    options.connect_cancel = connect_cancel_;
    auto connected = std::make_shared<absl::StatusOr<std::unique_ptr<fabric::Fabric>>>(
        fabric::ConnectGlooFabric(options, peers_->rendezvous()));
    mailbox_->Post([this, connected] {
      if (connected->ok()) {
        fabric_ = std::move(connected->value());
        mover_->set_fabric(fabric_.get());
        if (over_) fabric_->Abort(absl::CancelledError("the job is over"));
      }
      job_->OnConnected(connected->status());
    });
  });
}

void JobRunnerImpl::Do(core::StartAllGather& action) {
  const uint64_t bytes = action.receive ? request_.layout->UnitBytes(action.unit) : 0;
  mover_->Start(action.seq, MakeGather(&move_, action, window_->Copy(action.unit)),
                [this, seq = action.seq, bytes](absl::Status status) {
                  if (status.ok()) {
                    bytes_gathered_ += bytes;
                    metrics_->Add(metrics::Traffic::kGatheredToWindow, bytes);
                  }
                  job_->OnEntryDone(seq, status);
                });
}

void JobRunnerImpl::Do(core::StartReduce& action) {
  const absl::Time since = MonotonicNow();
  auto sources = book_->NodeSources(action.unit, action.step, action.round, Clients());
  mover_->Start(
      action.seq, MakeReduce(&reduce_, action, std::move(sources)),
      [this, action, since](absl::Status status) {
        if (!status.ok()) return job_->OnEntryDone(action.seq, status);
        metrics_->Observe(metrics::Latency::kReduce, SecondsSince(since));
        if (request_.members > 1) book_->ConsumeAccumulator(action.unit);
        book_->SetReduced(action.unit, action.step, action.round);
        // The last step's norm was asked for: this one's will be too, and the gradient is warm.
        if (!norm_was_needed_) return job_->OnEntryDone(action.seq, absl::OkStatus());
        ComputeSquares(action.step, {action.unit},
                       [this, seq = action.seq] { job_->OnEntryDone(seq, absl::OkStatus()); });
      });
}

absl::Status JobRunnerImpl::CheckTransfer(UnitIndex unit, core::MemberIndex origin,
                                          core::SlotIndex slot, uint64_t begin,
                                          uint64_t count) const {
  const uint64_t elements = request_.layout->units()[unit].elements;
  const bool here = origin == request_.self;
  if (origin >= request_.members || begin > elements || count > elements - begin ||
      count > plan_.transfer_values_bytes / sizeof(float) ||
      (here && (slot >= slots_.size() || slots_[slot].client == nullptr))) {
    return absl::InternalError(
        absl::StrCat("the log has a transfer of elements [", begin, ", +", count, ") of unit ",
                     unit, " for slot ", slot, " of member ", origin, ", which cannot be"));
  }
  return absl::OkStatus();
}

std::shared_ptr<const Sources> JobRunnerImpl::GradientSources(core::StateKind kind,
                                                              UnitIndex unit) const {
  if (kind != core::StateKind::kGradient) return nullptr;
  return book_->FinalSources(unit, job_->committed() + 1, Clients());
}

void JobRunnerImpl::Do(core::StartPut& action) {
  const absl::Status status =
      CheckTransfer(action.unit, action.origin, action.slot, action.begin, action.count);
  if (!status.ok()) return Broken(status);
  std::shared_ptr<ClientSlot> origin =
      action.origin == request_.self ? slots_[action.slot].client : nullptr;
  mover_->Start(action.seq,
                MakePut(&move_, action, std::move(origin), window_->Copy(action.unit),
                        GradientSources(action.kind, action.unit)),
                [this, action](absl::Status done) {
                  if (done.ok() && action.kind == core::StateKind::kMaster) {
                    NotePut(action.unit, action.begin, action.count);
                  } else if (action.kind == core::StateKind::kGradient) {
                    book_->SetSquaresMissing(action.unit);
                  }
                  job_->OnEntryDone(action.seq, done);
                });
}

void JobRunnerImpl::Do(core::StartRead& action) {
  const absl::Status status =
      CheckTransfer(action.unit, action.origin, action.slot, action.begin, action.count);
  if (!status.ok()) return Broken(status);
  std::shared_ptr<ClientSlot> origin =
      action.origin == request_.self ? slots_[action.slot].client : nullptr;
  mover_->Start(action.seq,
                MakeRead(&move_, action, std::move(origin), window_->Copy(action.unit),
                         GradientSources(action.kind, action.unit)),
                [this, seq = action.seq](absl::Status done) { job_->OnEntryDone(seq, done); });
}

void JobRunnerImpl::NotePut(UnitIndex unit, uint64_t begin, uint64_t count) {
  std::vector<Range>& ranges = put_[unit];
  Range added{begin, begin + count};
  std::vector<Range> merged;
  for (const Range& r : ranges) {
    if (r.end < added.begin || r.begin > added.end) {
      merged.push_back(r);
    } else {
      added = {std::min(r.begin, added.begin), std::max(r.end, added.end)};
    }
  }
  merged.push_back(added);
  std::sort(merged.begin(), merged.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  ranges = std::move(merged);
}

// The weights are there: every parameter was PUT, or a step was made from what there was.
bool JobRunnerImpl::Initialized() const {
  if (job_->committed() > 0) return true;
  for (const core::Parameter& p : request_.layout->parameters()) {
    const std::vector<Range>& ranges = put_[p.unit];
    const bool covered = std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) {
      return r.begin <= p.offset && p.offset + p.elements <= r.end;
    });
    if (!covered) return false;
  }
  return true;
}

// --- Arithmetic --------------------------------------------------------------------------------

void JobRunnerImpl::ComputeSquares(core::Step step, const std::vector<UnitIndex>& units,
                                   std::function<void()> done) {
  struct Part {
    std::shared_ptr<const Sources> sources;
    const GradientBook::Block* first;
    const GradientBook::Block* last;
  };
  auto parts = std::make_shared<std::vector<Part>>();
  const std::vector<std::shared_ptr<ClientSlot>> clients = Clients();
  for (UnitIndex u : units) {
    const std::vector<GradientBook::Block>& blocks = book_->BlocksOf(u);
    if (blocks.empty()) continue;
    const auto sources = book_->FinalSources(u, step, clients);
    for (size_t i = 0; i < blocks.size(); i += kBlocksPerPart) {
      parts->push_back({sources, blocks.data() + i,
                        blocks.data() + std::min(i + kBlocksPerPart, blocks.size())});
    }
  }
  const absl::Status status = workers_->Run(
      parts->size(),
      [this, parts](size_t i) {
        const Part& part = (*parts)[i];
        for (const GradientBook::Block* block = part.first; block != part.last; ++block) {
          bool nonfinite = false;
          *book_->square(block->index) =
              BlockSquare(*request_.layout, *part.sources, block->elements, &nonfinite);
          *book_->nonfinite(block->index) = nonfinite ? 1 : 0;
        }
      },
      [this, units, done = std::move(done)] {
        for (UnitIndex u : units) book_->SetSquaresDone(u);
        done();
      });
  if (!status.ok()) Broken(status);
}

void JobRunnerImpl::Do(core::ComputeNorm& action) {
  norm_was_needed_ = action.needed;
  const core::Step step = action.step;
  std::vector<UnitIndex> missing;
  if (action.needed) {
    for (UnitIndex u = 0; u < request_.layout->units().size(); ++u) {
      if (book_->SquaresMissing(u, step)) missing.push_back(u);
    }
  }
  ComputeSquares(step, missing, [this, step, needed = action.needed] {
    core::NormPart part;
    part.touched = book_->Touched(step);
    if (needed) part.block_squares = book_->Squares(step, &part.nonfinite);
    job_->OnNormDone(step, std::move(part));
  });
}

void JobRunnerImpl::Do(core::StartMeasure& action) {
  const core::Layout& layout = *request_.layout;
  const UnitIndex unit = action.unit;
  if (absl::Status status = CheckApply(layout, unit, *action.plan); !status.ok()) {
    return Broken(status);
  }
  auto task = std::make_shared<MeasureTask>();
  task->context = &move_;
  task->unit = unit;
  task->plan = action.plan;
  task->sources = book_->FinalSources(unit, action.plan->step, Clients());
  task->copy = window_->Copy(unit);
  task->pieces =
      layout.TensorPieces(unit, store_->TrainRange(unit), action.plan->decision.touched);
  task->squares.resize(task->pieces.size());
  auto cuts = std::make_shared<std::vector<size_t>>(1, 0);  // of the pieces, into parts
  uint64_t elements = 0;
  for (size_t i = 0; i < task->pieces.size(); ++i) {
    elements += task->pieces[i].elements.size();
    if (elements < kPartElements && i + 1 < task->pieces.size()) continue;
    cuts->push_back(i + 1);
    elements = 0;
  }
  const absl::Status status = workers_->Run(
      cuts->size() - 1,
      [task, cuts](size_t part) { Measure(task.get(), (*cuts)[part], (*cuts)[part + 1]); },
      [this, task] {
        // Where more is kept than owned, each square is told by its owner alone.
        const Range own = partition_->Shard(task->unit, request_.self);
        std::vector<core::TensorSquares> squares;
        for (size_t i = 0; i < task->pieces.size(); ++i) {
          const Range& piece = task->pieces[i].elements;
          if (own.begin <= piece.begin && piece.end <= own.end) {
            squares.push_back(task->squares[i]);
          }
        }
        job_->OnMeasured(task->unit, task->plan->step, std::move(squares));
      });
  if (!status.ok()) Broken(status);
}

void JobRunnerImpl::Do(core::StartApply& action) {
  auto task = std::make_shared<ApplyTask>();
  task->context = &move_;
  task->unit = action.unit;
  task->plan = action.plan;
  task->copy = window_->Copy(action.unit);
  if (absl::Status status = CheckApply(*request_.layout, action.unit, *action.plan);
      !status.ok()) {
    return Broken(status);
  }
  task->sources = book_->FinalSources(action.unit, action.plan->step, Clients());
  const Range range = store_->TrainRange(action.unit);
  const absl::Time since = MonotonicNow();
  const uint64_t copied =
      job_->ValidAfterApply(action.unit) ? request_.layout->UnitBytes(action.unit) : 0;
  const std::vector<size_t> matrices = TouchedMatrices(*task);
  auto left = std::make_shared<size_t>(matrices.size() + 1);
  const auto done = [this, left, unit = action.unit, step = action.plan->step, since, copied] {
    if (--*left != 0) return;
    metrics_->Observe(metrics::Latency::kApply, SecondsSince(since));
    bytes_gathered_ += copied;
    metrics_->Add(metrics::Traffic::kGatheredToWindow, copied);
    job_->OnApplyDone(unit, step);
  };
  for (const size_t place : matrices) {
    matrices_->Push([task, place](float* scratch) { ApplyMatrix(*task, place, scratch); }, done);
  }
  const absl::Status status = workers_->Run(
      range.empty() ? 0 : PartsOf(range.size()),
      [task, range](size_t part) { Apply(*task, PartOf(range, part)); }, done);
  if (!status.ok()) Broken(status);
}

// Places in the unit of what is to be updated by matrix here.
std::vector<size_t> JobRunnerImpl::TouchedMatrices(const ApplyTask& task) const {
  const core::Layout& layout = *request_.layout;
  const std::vector<uint32_t>& parameters = layout.units()[task.unit].parameters;
  const Range kept = store_->TrainRange(task.unit);
  std::vector<size_t> places;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const core::Parameter& p = layout.parameters()[parameters[i]];
    if (!layout.IsByMatrix(p)) break;  // they come first
    const bool here = p.elements > 0 && p.offset >= kept.begin && p.offset < kept.end;
    if (here && task.plan->decision.touched[parameters[i]]) places.push_back(i);
  }
  return places;
}

}  // namespace zerod::engine
