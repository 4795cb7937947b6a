// SPDX-License-Identifier: Apache-2.0
//
// The loss scale of a job in fp16: what gradients were multiplied by, and are divided by before
// they are applied. DeepSpeed's DynamicLossScaler (deepspeed/runtime/fp16/loss_scaler.py), but for
// one thing: there a step on which the scale grows divides its gradients by the new scale, which
// halves them; here gradients are always divided by the scale that they were made with.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "daemon/core/types.h"

namespace zerod::core {

struct LossScaleSpec {
  double static_scale = 0;      // > 0: constant; an overflow skips the step all the same
  double initial_scale = 65536;  // fp16.initial_scale_power, as a power of two
  uint64_t window = 1000;       // steps without overflow after which the scale doubles
  uint64_t hysteresis = 2;      // overflows that are borne before the scale is halved
  bool consecutive_hysteresis = false;  // any step without overflow restores them
  double min_scale = 1;
  bool fails_at_min = true;  // an overflow there is an error; false: it only skips the step
};

// A pure function of the spec and the outcomes so far, the same on every member. Not thread-safe.
class LossScaler {
 public:
  // REQUIRES: window, hysteresis and min_scale are above 0 (Config checks them).
  explicit LossScaler(const LossScaleSpec& spec);

  // What the step under way is scaled by.
  double scale() const { return state_.scale; }
  const LossScalerState& state() const { return state_; }
  // Goes on as the scaler did that was in this state. INVALID_ARGUMENT where the spec's scale is
  // constant and another one is asked for. REQUIRES: CheckProgress found nothing wrong with it.
  static absl::Status CheckRestore(const LossScaleSpec& spec, const LossScalerState& state);
  void Restore(const LossScalerState& state) { state_ = state; }

  // A step was attempted. FAILED_PRECONDITION where it overflowed at the smallest scale, which
  // cannot be lowered any more: the training has diverged (LossScaleSpec::fails_at_min).
  absl::Status Update(bool overflow);

 private:
  LossScaleSpec spec_;
  LossScalerState state_;
};

}  // namespace zerod::core
