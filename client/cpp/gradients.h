// SPDX-License-Identifier: Apache-2.0
//
// Gradients on their way to the daemon, under both plans (docs/formats/window.md).
//   per_rank  the gradient file holds a whole fp32 gradient; micro-steps are added in place, and
//             only the last scatter of a unit is a request.
//   node_sum  the gradient file is bounded staging: each (part of a unit's elements, pass) takes a
//             slot of [touched bytes, padded to 64][fp32 elements], each scatter is a request, and
//             its answer frees the slot. A parameter of several parts leaves part by part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/attachment.h"
#include "client/cpp/wait.h"

namespace zerod::client {

// The caller holds Requests::Turn::kLanding around every call.
class Gradients {
 public:
  // `file`: the gradient file; `touched`: the submit file's section. `plan` and `requests` outlive
  // this.
  Gradients(const AttachPlan* plan, std::byte* file, uint8_t* touched, Requests* requests);

  // See Client. `step` is the one being computed.
  absl::Status Land(uint32_t parameter, const void* gradient, DType dtype, uint64_t step);
  absl::Status Scatter(uint32_t unit, bool last, uint64_t step);
  absl::StatusOr<uint32_t> HandOver(uint32_t unit, uint64_t step);
  absl::Status EndMicroStep(uint64_t step);
  absl::Status Reclaim(uint32_t unit, uint64_t step);
  bool Scattered(uint32_t unit) const { return units_[unit].last; }

  // Hands over what was landed and not yet scattered for the last time, of all units, in order.
  absl::Status ScatterRest(uint64_t step);
  // The step is over: nothing is landed any more.
  absl::Status EndStep();

  uint64_t landed_bytes() const { return landed_bytes_; }
  double wait_seconds() const { return wait_seconds_; }

 private:
  struct Part {  // of a unit's trainable elements
    uint32_t unit = 0;
    uint32_t part = 0;
  };
  // Requests::Post would wait for an answer too, and not ask for one as AwaitAnswer does. The other
  // half is for all else.
  static constexpr size_t kScattersInFlightMax = kPendingMax / 2;
  struct Slot {
    bool open = false;
    uint64_t offset = 0;
  };
  struct Unit {
    std::vector<uint32_t> parameters;  // by offset
    bool landed = false;   // something, in this step
    bool last = false;     // Scatter(last) was called
    bool posted = false;   // and the daemon was told
    bool unmarked = false;  // node_sum: something was posted that no mark followed
    uint32_t rounds = 0;   // as the daemon counts them: Job::CloseRounds
    uint64_t reclaim = 0;  // cookie of a RECLAIM that was interrupted
    std::vector<Slot> slots;  // node_sum: those being landed in, one for each part
  };
  struct InFlight {  // node_sum: a slot that the daemon has not added yet
    uint64_t cookie = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };

  uint64_t HeaderBytes(const Unit& unit) const;
  absl::Status Post(uint32_t unit, bool last, uint64_t step);
  // node_sum.
  uint64_t PartBegin(Part part) const { return part.part * plan_.staged_part_elements; }
  uint64_t PartEnd(Part part) const;
  uint64_t SlotBytes(Part part) const;
  Slot& SlotOf(Part part) { return units_[part.unit].slots[part.part]; }
  const Slot& SlotOf(Part part) const { return units_[part.unit].slots[part.part]; }
  std::vector<Part> OpenPartsOf(uint32_t unit) const;  // in their order
  absl::Status LandInParts(uint32_t parameter, const std::byte* gradient, DType dtype,
                           uint64_t step);
  void LandPart(uint32_t parameter, Part part, const std::byte* gradient, DType dtype);
  absl::Status PostSlot(Part part, bool last, uint64_t step);
  absl::Status OpenSlot(Part part, uint64_t step);
  std::optional<uint64_t> FindRoom(uint64_t bytes) const;
  absl::Status TakeAnswers();
  absl::Status AwaitAnswer();
  void Compact();

  const AttachPlan& plan_;
  std::byte* const file_;
  uint8_t* const touched_;
  Requests* const requests_;
  std::vector<Unit> units_;
  std::vector<uint32_t> place_;  // per parameter: its place among its unit's parameters
  std::vector<InFlight> in_flight_;
  std::vector<Part> open_;  // in order of opening
  absl::Status error_;  // of a scatter whose answer came later; sticky within the step
  uint64_t landed_bytes_ = 0;
  double wait_seconds_ = 0;
};

}  // namespace zerod::client
