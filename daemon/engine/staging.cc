// SPDX-License-Identifier: Apache-2.0
//
// node_sum: gradients on their way from their clients' staging to the node's accumulator, at once
// or by way of the side buffer.
#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "daemon/engine/apply.h"
#include "daemon/engine/job_runner_impl.h"

namespace zerod::engine {

using core::Range;
using core::UnitIndex;

// Where a client's gradient lies in its staging; `data` null where its request is gone: it died or
// was detached, its generation ends, and with it this step.
StagedGradient JobRunnerImpl::FindStaged(core::SlotIndex slot, UnitIndex u,
                                         uint64_t cookie) const {
  const core::Unit& unit = request_.layout->units()[u];
  StagedGradient staged;
  staged.touched.resize(unit.parameters.size());
  staged.client = slots_[slot].client;
  if (staged.client == nullptr) return staged;
  const auto found = staged.client->pending.find(cookie);
  if (found == staged.client->pending.end()) return staged;
  const PendingRequest& request = found->second;
  if (request.op != shm::Op::kScatter || request.unit != u ||
      request.touched.size() != unit.parameters.size()) {
    return staged;
  }
  staged.touched = request.touched;
  staged.part = request.part;
  staged.range = core::StagedPart(unit, plan_.staged_part_elements, request.part);
  const uint64_t header = shm::StagedHeaderBytes(unit.parameters.size());
  staged.data = reinterpret_cast<const float*>(staged.client->gradient() +
                                               request.staging_offset + header);
  for (uint32_t p : unit.parameters) {
    const uint64_t first = std::max(request_.layout->parameters()[p].offset, staged.range.begin);
    staged.begins.push_back(first - staged.range.begin);
  }
  return staged;
}

void JobRunnerImpl::Do(core::StartAccumulate& action) {
  const UnitIndex u = action.unit;
  const core::SlotIndex slot = action.slot;
  auto task = std::make_shared<AccumulateTask>();
  task->context = &move_;
  task->unit = u;
  if (action.aside != 0) {
    const StagedGradient* const aside = side_->Find(action.aside);
    CHECK(aside != nullptr) << "nothing was set aside under number " << action.aside;
    task->gradient = *aside;
  } else {
    task->gradient = FindStaged(slot, u, action.cookie);
  }
  task->add = book_->Accumulate(u, task->gradient.part, action.first, task->gradient.touched);
  if (task->gradient.data == nullptr) {
    mailbox_->Post([this, u, slot] { job_->OnAccumulateDone(u, slot); });
    return;
  }
  const Range all = task->gradient.range;
  const absl::Status status = workers_->Run(
      PartsOf(all.size()), [task, all](size_t part) { Accumulate(*task, PartOf(all, part)); },
      [this, u, slot, number = action.aside] {
        if (number != 0) side_->Drop(number);
        job_->OnAccumulateDone(u, slot);
      });
  if (!status.ok()) Broken(status);
}

// --- The side buffer -----------------------------------------------------------------------------

void JobRunnerImpl::Do(core::StartSetAside& action) {
  auto task = std::make_shared<SetAsideTask>();
  task->context = &move_;
  task->unit = action.unit;
  task->from = FindStaged(action.slot, action.unit, action.cookie);
  if (task->from.data == nullptr) {
    mailbox_->Post([this, action] { job_->OnSetAsideDone(action.unit, action.aside, false); });
    return;
  }
  auto surplus = std::make_shared<std::vector<SideBuffer::Memory>>();
  SideBuffer::Memory memory = side_->Reuse(action.bytes, surplus.get());
  if (memory != nullptr) return CopyAside(action, std::move(task), std::move(memory));
  auto taken = std::make_shared<absl::StatusOr<SideBuffer::Memory>>();
  const absl::Status status = workers_->Run(
      1,
      [side = side_.get(), surplus, taken, bytes = action.bytes](size_t) {
        surplus->clear();
        *taken = side->Allocate(bytes);
      },
      [this, action, task, taken] {
        if (taken->ok()) return CopyAside(action, task, **taken);
        // The client waits for the other ranks, as it would without any of this.
        side_->Forgo(action.bytes);
        job_->OnSetAsideDone(action.unit, action.aside, false);
      });
  if (!status.ok()) Broken(status);
}

void JobRunnerImpl::CopyAside(const core::StartSetAside& action,
                              std::shared_ptr<SetAsideTask> task, SideBuffer::Memory memory) {
  StagedGradient gradient;
  gradient.part = task->from.part;
  gradient.range = task->from.range;
  gradient.touched = task->from.touched;
  uint64_t next = 0;
  for (size_t i = 0; i < gradient.touched.size(); ++i) {
    const uint32_t index = request_.layout->units()[action.unit].parameters[i];
    const core::Parameter& p = request_.layout->parameters()[index];
    gradient.begins.push_back(next);
    if (!gradient.touched[i]) continue;
    next += Intersect(gradient.range, {p.offset, p.offset + p.elements}).size();
  }
  CHECK_LE(next * sizeof(float), memory->bytes());
  gradient.data = task->to = reinterpret_cast<float*>(memory->data());
  gradient.aside = std::move(memory);
  task->begins = gradient.begins;
  side_->Put(action.aside, action.bytes, std::move(gradient));
  ReportMemory();
  const Range all = task->from.range;
  const absl::Status status = workers_->Run(
      PartsOf(all.size()), [task, all](size_t part) { SetAside(*task, PartOf(all, part)); },
      [this, action] {
        metrics_->Add(metrics::Traffic::kSetAside, action.bytes);
        job_->OnSetAsideDone(action.unit, action.aside, true);
      });
  if (!status.ok()) Broken(status);
}

void JobRunnerImpl::Do(core::DropAside& action) { side_->Drop(action.aside); }

// Not on the loop: unmapping gigabytes takes time.
void JobRunnerImpl::GiveSideMemoryBack() {
  auto all = std::make_shared<std::vector<SideBuffer::Memory>>(side_->TakeAll());
  if (all->empty()) return;
  ReportMemory();
  const absl::Status status = workers_->Run(1, [all](size_t) { all->clear(); }, [] {});
  if (!status.ok()) all->clear();
}

}  // namespace zerod::engine
