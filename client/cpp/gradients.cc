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

shm::SubmitEntry ScatterEntry(uint32_t unit, bool last, uint64_t step) {
  shm::SubmitEntry entry{};
  entry.op = shm::Op::kScatter;
  entry.flags = last ? shm::kLast : 0;
  entry.unit = unit;
  entry.step = step;
  return entry;
}

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
    if (!plan_.node_sum) continue;
    const uint64_t elements = plan_.units[&unit - units_.data()].trainable_elements;
    const uint64_t parts = AlignUp(elements, plan_.staged_part_elements);
    unit.slots.resize(std::max<uint64_t>(1, parts / plan_.staged_part_elements));
  }
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
  if (plan_.node_sum) {
    RETURN_IF_ERROR(LandInParts(parameter, static_cast<const std::byte*>(gradient), dtype, step));
  } else {
    float* const to =
        reinterpret_cast<float*>(file_ + plan_.units[p.unit].gradient_offset) + p.offset;
    (touched_[p.touched] == 0 ? LandCopy : LandAdd)(to, gradient, dtype, p.elements);
    touched_[p.touched] = 1;
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
  if (!plan_.node_sum) {
    RETURN_IF_ERROR(requests_->PostUnanswered(ScatterEntry(u, last, step)));
  } else {
    // The mark travels with a slot, if need be with an empty one.
    if (last && OpenPartsOf(u).empty()) RETURN_IF_ERROR(OpenSlot({u, 0}, step));
    const std::vector<Part> open = OpenPartsOf(u);
    for (size_t i = 0; i < open.size(); ++i) {
      RETURN_IF_ERROR(PostSlot(open[i], last && i + 1 == open.size(), step));
    }
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
  const bool something = plan_.node_sum ? !OpenPartsOf(u).empty() || (last && unit.unmarked)
                                        : unit.landed && last;
  if (something) RETURN_IF_ERROR(Post(u, last, step));
  unit.last = last;
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> Gradients::HandOver(uint32_t u, uint64_t step) {
  Unit& unit = units_[u];
  if (unit.last && unit.posted) return unit.rounds;
  RETURN_IF_ERROR(TakeAnswers());
  RETURN_IF_ERROR(error_);
  RETURN_IF_ERROR(Post(u, /*last=*/true, step));
  unit.last = true;
  return unit.rounds;
}

absl::Status Gradients::EndMicroStep(uint64_t step) {
  if (!plan_.node_sum) return absl::OkStatus();
  RETURN_IF_ERROR(TakeAnswers());
  // What is open belongs to this micro-step, and is added in its place.
  while (!open_.empty()) RETURN_IF_ERROR(PostSlot(open_.front(), /*last=*/false, step));
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
      for (uint32_t p : unit.parameters) touched_[plan_.parameters[p].touched] = 0;
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
    if (!units_[u].landed || units_[u].last) continue;
    if (plan_.node_sum && OpenPartsOf(u).empty()) continue;  // STEP, which follows, is the mark
    RETURN_IF_ERROR(Scatter(u, true, step));
  }
  return absl::OkStatus();
}

absl::Status Gradients::EndStep() {
  for (Unit& unit : units_) {
    if (unit.landed && !plan_.node_sum) {
      for (uint32_t p : unit.parameters) touched_[plan_.parameters[p].touched] = 0;
    }
    if (unit.reclaim != 0) requests_->Abandon(unit.reclaim);
    unit.landed = unit.last = unit.posted = unit.unmarked = false;
    for (Slot& slot : unit.slots) slot.open = false;
    unit.rounds = 0;
    unit.reclaim = 0;
  }
  open_.clear();
  error_ = absl::OkStatus();
  return TakeAnswers();
}

// --- node_sum: parts and slots ----------------------------------------------------------------

uint64_t Gradients::PartEnd(Part part) const {
  return std::min(PartBegin(part) + plan_.staged_part_elements,
                  plan_.units[part.unit].trainable_elements);
}

uint64_t Gradients::HeaderBytes(const Unit& unit) const {
  return shm::StagedHeaderBytes(unit.parameters.size());
}

uint64_t Gradients::SlotBytes(Part part) const {
  return AlignUp(HeaderBytes(units_[part.unit]) + (PartEnd(part) - PartBegin(part)) * sizeof(float),
                 shm::kStagedAlignBytes);
}

std::vector<Gradients::Part> Gradients::OpenPartsOf(uint32_t unit) const {
  std::vector<Part> open;
  for (uint32_t i = 0; i < units_[unit].slots.size(); ++i) {
    if (units_[unit].slots[i].open) open.push_back({unit, i});
  }
  return open;
}

// The parts that have nothing but this parameter leave at once, so that a large one takes no more
// staging than a small one. The others wait for the rest of their unit, and for the mark.
absl::Status Gradients::LandInParts(uint32_t parameter, const std::byte* gradient, DType dtype,
                                    uint64_t step) {
  const ParameterPlan& p = plan_.parameters[parameter];
  const auto parts = static_cast<uint32_t>(units_[p.unit].slots.size());
  const auto part_of = [&](uint64_t element) {
    return std::min(static_cast<uint32_t>(element / plan_.staged_part_elements), parts - 1);
  };
  const uint32_t first = part_of(p.offset);
  const uint32_t last = p.elements == 0 ? first : part_of(p.offset + p.elements - 1);
  bool landed = false;
  for (Part part{p.unit, first}; part.part <= last; ++part.part) {
    absl::Status status;
    if (!SlotOf(part).open) status = OpenSlot(part, step);
    const bool whole = PartBegin(part) >= p.offset && PartEnd(part) <= p.offset + p.elements;
    if (status.ok()) {
      LandPart(parameter, part, gradient, dtype);
      landed = true;
      if (whole && first != last) status = PostSlot(part, /*last=*/false, step);
    }
    if (status.ok()) continue;
    if (landed && error_.ok()) {
      error_ = absl::FailedPreconditionError(absl::StrCat(
          "the gradient of parameter '", p.name, "' was interrupted while it was handed over (",
          status.message(), "), so step ", step, " cannot be completed: start this rank again"));
    }
    return status;
  }
  return absl::OkStatus();
}

// Lands what lies in `part`, whose slot is open.
void Gradients::LandPart(uint32_t parameter, Part part, const std::byte* gradient, DType dtype) {
  const ParameterPlan& p = plan_.parameters[parameter];
  const Unit& unit = units_[part.unit];
  std::byte* const slot = file_ + SlotOf(part).offset;
  auto* const touched = reinterpret_cast<uint8_t*>(slot) + place_[parameter];
  auto* const elements = reinterpret_cast<float*>(slot + HeaderBytes(unit));
  const uint64_t begin = std::max(p.offset, PartBegin(part));
  const uint64_t end = std::min(p.offset + p.elements, PartEnd(part));
  float* const to = elements + (begin - PartBegin(part));
  const std::byte* const from = gradient + (begin - p.offset) * DTypeBytes(dtype);
  if (*touched != 0) return LandAdd(to, from, dtype, end - begin);
  LandCopy(to, from, dtype, end - begin);
  *touched = 1;
  // A slot had other gradients before: the padding behind this one must count as zero.
  const uint64_t next = std::min(AlignUp(end, shm::kParamAlignElements), PartEnd(part));
  memset(to + (end - begin), 0, (next - end) * sizeof(float));
}

absl::Status Gradients::PostSlot(Part part, bool last, uint64_t step) {
  Slot& slot = SlotOf(part);
  if (in_flight_.size() >= kScattersInFlightMax) RETURN_IF_ERROR(TakeAnswers());
  while (in_flight_.size() >= kScattersInFlightMax) RETURN_IF_ERROR(AwaitAnswer());
  shm::SubmitEntry entry = ScatterEntry(part.unit, last, step);
  entry.arg0 = slot.offset;
  entry.arg1 = part.part;
  ASSIGN_OR_RETURN(const uint64_t cookie, requests_->Post(entry));
  in_flight_.push_back({cookie, slot.offset, SlotBytes(part)});
  slot.open = false;
  units_[part.unit].unmarked = !last;
  std::erase_if(open_, [&](Part other) {
    return other.unit == part.unit && other.part == part.part;
  });
  return absl::OkStatus();
}

// --- node_sum: room ---------------------------------------------------------------------------

std::optional<uint64_t> Gradients::FindRoom(uint64_t bytes) const {
  std::vector<std::pair<uint64_t, uint64_t>> taken;
  for (const InFlight& slot : in_flight_) taken.emplace_back(slot.offset, slot.bytes);
  for (Part part : open_) taken.emplace_back(SlotOf(part).offset, SlotBytes(part));
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
  std::vector<Part> open = open_;
  std::sort(open.begin(), open.end(),
            [&](Part a, Part b) { return SlotOf(a).offset < SlotOf(b).offset; });
  uint64_t start = 0;
  for (Part part : open) {
    memmove(file_ + start, file_ + SlotOf(part).offset, SlotBytes(part));
    SlotOf(part).offset = start;
    start += SlotBytes(part);
  }
}

absl::Status Gradients::OpenSlot(Part part, uint64_t step) {
  const uint64_t bytes = SlotBytes(part);
  if (bytes > plan_.gradient_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a part of the gradient of unit '", plan_.units[part.unit].name, "' needs ", bytes,
        " bytes of staging and there are ", plan_.gradient_bytes,
        "; set zerod.staging_bytes to at least the former"));
  }
  RETURN_IF_ERROR(TakeAnswers());
  // What is open cannot be waited for, so the oldest is handed over early. This looks at nothing
  // that depends on time, so the order of sums is the same in every run.
  for (;;) {
    uint64_t open_bytes = 0;
    for (Part other : open_) open_bytes += SlotBytes(other);
    if (open_bytes + bytes <= plan_.gradient_bytes) break;
    RETURN_IF_ERROR(PostSlot(open_.front(), /*last=*/false, step));
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
  Slot& slot = SlotOf(part);
  slot.offset = *room;
  slot.open = true;
  open_.push_back(part);
  memset(file_ + slot.offset, 0, HeaderBytes(units_[part.unit]));
  return absl::OkStatus();
}

}  // namespace zerod::client
