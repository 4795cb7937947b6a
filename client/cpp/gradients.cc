// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/gradients.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"
#include "client/cpp/land.h"
#include "proto/shm/format.h"

namespace zerod::client {
namespace {

uint64_t AlignUp(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

}  // namespace

Gradients::Gradients(const AttachPlan* plan, std::byte* file, uint8_t* touched,
                     Requests* requests)
    : plan_(*plan),
      file_(file),
      touched_(touched),
      requests_(requests),
      units_(plan->units.size()),
      place_(plan->parameters.size()) {
  for (uint32_t p = 0; p < plan_.parameters.size(); ++p) {
    units_[plan_.parameters[p].unit].parameters.push_back(p);
  }
  for (Unit& unit : units_) {
    std::stable_sort(unit.parameters.begin(), unit.parameters.end(), [&](uint32_t a, uint32_t b) {
      return std::pair(plan_.parameters[a].offset, plan_.parameters[a].touched) <
             std::pair(plan_.parameters[b].offset, plan_.parameters[b].touched);
    });
    for (uint32_t i = 0; i < unit.parameters.size(); ++i) place_[unit.parameters[i]] = i;
  }
}

uint64_t Gradients::HeaderBytes(const Unit& unit) const {
  return shm::StagedHeaderBytes(unit.parameters.size());
}

uint64_t Gradients::SlotBytes(uint32_t unit) const {
  return AlignUp(HeaderBytes(units_[unit]) + plan_.units[unit].trainable_elements * sizeof(float),
                 shm::kStagedAlignBytes);
}

float* Gradients::Destination(uint32_t parameter) const {
  const ParameterPlan& p = plan_.parameters[parameter];
  const Unit& unit = units_[p.unit];
  const uint64_t start = plan_.node_sum ? unit.offset + HeaderBytes(unit)
                                        : plan_.units[p.unit].gradient_offset;
  return reinterpret_cast<float*>(file_ + start) + p.offset;
}

uint8_t* Gradients::TouchedByte(uint32_t parameter) const {
  const ParameterPlan& p = plan_.parameters[parameter];
  if (!plan_.node_sum) return touched_ + p.touched;
  return reinterpret_cast<uint8_t*>(file_ + units_[p.unit].offset) + place_[parameter];
}

absl::Status Gradients::Land(uint32_t parameter, const void* gradient, DType dtype,
                             uint64_t step) {
  const ParameterPlan& p = plan_.parameters[parameter];
  Unit& unit = units_[p.unit];
  if (!p.trainable) {
    return absl::InvalidArgumentError(absl::StrCat(
        "parameter '", p.name, "' is frozen (requires_grad was False at attach) and has no "
        "gradient memory"));
  }
  if (unit.last) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the gradients of unit '", plan_.units[p.unit].name, "' of step ", step,
        " are handed over already; keep this one and land it after Reclaim"));
  }
  RETURN_IF_ERROR(error_);
  if (plan_.node_sum && !unit.open) RETURN_IF_ERROR(OpenSlot(p.unit, step));
  float* to = Destination(parameter);
  uint8_t* touched = TouchedByte(parameter);
  if (*touched == 0) {
    LandCopy(to, gradient, dtype, p.elements);
    *touched = 1;
    // A slot had other gradients before: the padding behind this one must count as zero.
    if (plan_.node_sum) {
      const uint64_t next = AlignUp(p.offset + p.elements, shm::kParamAlignElements);
      const uint64_t end = std::min(next, plan_.units[p.unit].trainable_elements);
      if (end > p.offset + p.elements) {
        memset(to + p.elements, 0, (end - p.offset - p.elements) * sizeof(float));
      }
    }
  } else {
    LandAdd(to, gradient, dtype, p.elements);
  }
  unit.landed = true;
  landed_bytes_ += p.elements * sizeof(float);
  return absl::OkStatus();
}

absl::Status Gradients::Post(uint32_t u, bool last, uint64_t step) {
  Unit& unit = units_[u];
  if (last && unit.rounds >= shm::kRoundsMax) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the gradients of unit '", plan_.units[u].name, "' were completed ", unit.rounds,
        " times in step ", step, ", as often as is possible: call step() in between"));
  }
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kScatter;
  entry.flags = last ? shm::kLast : 0;
  entry.unit = u;
  entry.step = step;
  if (!plan_.node_sum) {
    RETURN_IF_ERROR(requests_->PostUnanswered(entry));
  } else {
    entry.arg0 = unit.offset;
    ASSIGN_OR_RETURN(const uint64_t cookie, requests_->Post(entry));
    in_flight_.push_back({cookie, unit.offset, SlotBytes(u)});
    unit.open = false;
  }
  unit.posted = unit.posted || last;
  unit.rounds += last ? 1 : 0;
  return absl::OkStatus();
}

absl::Status Gradients::Scatter(uint32_t u, bool last, uint64_t step) {
  Unit& unit = units_[u];
  if (unit.last) return absl::OkStatus();
  RETURN_IF_ERROR(TakeAnswers());
  RETURN_IF_ERROR(error_);
  // Without a gradient there is nothing to hand over; STEP says that none comes.
  const bool something = plan_.node_sum ? unit.open : unit.landed && last;
  if (something) RETURN_IF_ERROR(Post(u, last, step));
  unit.last = last;
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> Gradients::HandOver(uint32_t u, uint64_t step) {
  Unit& unit = units_[u];
  if (unit.last && unit.posted) return unit.rounds;
  RETURN_IF_ERROR(TakeAnswers());
  RETURN_IF_ERROR(error_);
  if (plan_.node_sum && !unit.open) RETURN_IF_ERROR(OpenSlot(u, step));
  RETURN_IF_ERROR(Post(u, /*last=*/true, step));
  unit.last = true;
  return unit.rounds;
}

absl::Status Gradients::EndMicroStep(uint64_t step) {
  if (!plan_.node_sum) return absl::OkStatus();
  RETURN_IF_ERROR(TakeAnswers());
  // What is open belongs to this micro-step, and is added in its place.
  while (const std::optional<uint32_t> open = OldestOpen()) {
    RETURN_IF_ERROR(Post(*open, /*last=*/false, step));
  }
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kMicroStep;
  entry.step = step;
  return requests_->PostUnanswered(entry);
}

absl::Status Gradients::Reclaim(uint32_t u, uint64_t step) {
  Unit& unit = units_[u];
  if (!unit.last) return absl::OkStatus();
  if (unit.posted) {
    if (unit.reclaim == 0) {
      shm::SubmitEntry entry{};
      entry.op = shm::Op::kReclaim;
      entry.unit = u;
      entry.step = step;
      ASSIGN_OR_RETURN(unit.reclaim, requests_->Post(entry));
      for (Unit& other : units_) other.rounds = std::max(other.rounds, unit.rounds);
    }
    const absl::Time start = MonotonicNow();
    absl::StatusOr<Requests::Answer> answer =
        requests_->Wait(unit.reclaim, "the gradient memory of a unit");
    wait_seconds_ += absl::ToDoubleSeconds(MonotonicNow() - start);
    if (!answer.ok() && absl::IsCancelled(answer.status())) return answer.status();
    unit.reclaim = 0;
    if (!answer.ok()) return answer.status();
    RETURN_IF_ERROR(answer->status);
    // What lies there was consumed; a later landing starts afresh.
    if (!plan_.node_sum && answer->result == 1) {
      for (uint32_t p : unit.parameters) *TouchedByte(p) = 0;
      unit.landed = false;
    }
  }
  unit.last = false;
  unit.posted = false;
  return absl::OkStatus();
}

absl::Status Gradients::ScatterRest(uint64_t step) {
  RETURN_IF_ERROR(TakeAnswers());
  RETURN_IF_ERROR(error_);
  for (uint32_t u = 0; u < units_.size(); ++u) {
    if (units_[u].landed && !units_[u].last) RETURN_IF_ERROR(Scatter(u, true, step));
  }
  return absl::OkStatus();
}

absl::Status Gradients::EndStep() {
  for (Unit& unit : units_) {
    if (unit.landed && !plan_.node_sum) {
      for (uint32_t p : unit.parameters) *TouchedByte(p) = 0;
    }
    if (unit.reclaim != 0) requests_->Abandon(unit.reclaim);
    unit.landed = unit.last = unit.posted = unit.open = false;
    unit.rounds = 0;
    unit.reclaim = 0;
  }
  error_ = absl::OkStatus();
  return TakeAnswers();
}

// --- node_sum ---------------------------------------------------------------------------------

std::optional<uint64_t> Gradients::FindRoom(uint64_t bytes) const {
  std::vector<std::pair<uint64_t, uint64_t>> taken;
  for (const InFlight& slot : in_flight_) taken.emplace_back(slot.offset, slot.bytes);
  for (uint32_t u = 0; u < units_.size(); ++u) {
    if (units_[u].open) taken.emplace_back(units_[u].offset, SlotBytes(u));
  }
  std::sort(taken.begin(), taken.end());
  uint64_t start = 0;
  for (const auto& [offset, length] : taken) {
    if (offset >= start && offset - start >= bytes) return start;
    start = std::max(start, offset + length);
  }
  if (plan_.gradient_bytes >= start && plan_.gradient_bytes - start >= bytes) return start;
  return std::nullopt;
}

absl::Status Gradients::TakeAnswers() {
  for (size_t i = 0; i < in_flight_.size();) {
    std::optional<Requests::Answer> answer = requests_->TryTake(in_flight_[i].cookie);
    if (!answer.has_value()) {
      ++i;
      continue;
    }
    if (!answer->status.ok() && error_.ok()) error_ = answer->status;
    in_flight_.erase(in_flight_.begin() + static_cast<ptrdiff_t>(i));
  }
  return error_;
}

// Waits for the answer to any scatter. Those that wait for other ranks are not to keep this one
// waiting: the daemon is asked to put one of them elsewhere.
absl::Status Gradients::AwaitAnswer() {
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kMakeRoom;
  RETURN_IF_ERROR(requests_->PostUnanswered(entry));
  std::vector<uint64_t> cookies;
  for (const InFlight& slot : in_flight_) cookies.push_back(slot.cookie);
  const absl::Time start = MonotonicNow();
  absl::Status waited =
      requests_->WaitAny(cookies, "room in the gradient staging memory").status();
  wait_seconds_ += absl::ToDoubleSeconds(MonotonicNow() - start);
  RETURN_IF_ERROR(waited);
  return TakeAnswers();
}

// Moves the open slots to the front: they are this client's alone until they are posted.
// REQUIRES: nothing is in flight.
void Gradients::Compact() {
  std::vector<uint32_t> open;
  for (uint32_t u = 0; u < units_.size(); ++u) {
    if (units_[u].open) open.push_back(u);
  }
  std::sort(open.begin(), open.end(),
            [&](uint32_t a, uint32_t b) { return units_[a].offset < units_[b].offset; });
  uint64_t start = 0;
  for (uint32_t u : open) {
    memmove(file_ + start, file_ + units_[u].offset, SlotBytes(u));
    units_[u].offset = start;
    start += SlotBytes(u);
  }
}

// The unit whose open slot was opened first.
std::optional<uint32_t> Gradients::OldestOpen() const {
  std::optional<uint32_t> oldest;
  for (uint32_t u = 0; u < units_.size(); ++u) {
    if (!units_[u].open) continue;
    if (!oldest.has_value() || units_[u].opened < units_[*oldest].opened) oldest = u;
  }
  return oldest;
}

absl::Status Gradients::OpenSlot(uint32_t u, uint64_t step) {
  const uint64_t bytes = SlotBytes(u);
  if (bytes > plan_.gradient_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the gradient of unit '", plan_.units[u].name, "' needs ", bytes,
        " bytes of staging and there are ", plan_.gradient_bytes,
        "; set zerod.staging_bytes to at least the former"));
  }
  RETURN_IF_ERROR(TakeAnswers());
  // What is open cannot be waited for, so the oldest is handed over early. This looks at nothing
  // that depends on time, so the order of sums is the same in every run.
  for (;;) {
    uint64_t open_bytes = 0;
    for (uint32_t other = 0; other < units_.size(); ++other) {
      if (units_[other].open) open_bytes += SlotBytes(other);
    }
    if (open_bytes + bytes <= plan_.gradient_bytes) break;
    RETURN_IF_ERROR(Post(*OldestOpen(), /*last=*/false, step));
  }
  std::optional<uint64_t> room = FindRoom(bytes);
  while (!room.has_value() && !in_flight_.empty()) {
    RETURN_IF_ERROR(AwaitAnswer());
    room = FindRoom(bytes);
  }
  if (!room.has_value()) {
    Compact();
    room = FindRoom(bytes);
  }
  Unit& unit = units_[u];
  unit.offset = *room;
  unit.open = true;
  unit.opened = ++opened_;
  memset(file_ + unit.offset, 0, HeaderBytes(unit));
  return absl::OkStatus();
}

}  // namespace zerod::client
