// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/loss_scaler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace zerod::core {
namespace {

constexpr double kFactor = 2;

}  // namespace

LossScaler::LossScaler(const LossScaleSpec& spec) : spec_(spec) {
  CHECK(spec.window > 0 && spec.hysteresis > 0 && spec.min_scale > 0);
  state_.scale = spec.static_scale > 0 ? spec.static_scale : spec.initial_scale;
  state_.hysteresis = spec.hysteresis;
}

absl::Status LossScaler::CheckRestore(const LossScaleSpec& spec, const LossScalerState& state) {
  if (spec.static_scale <= 0 || state.scale == spec.static_scale) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "RESTORE of the loss scale ", state.scale, ", but fp16.loss_scale makes it a constant ",
      spec.static_scale, ". Leave the loss scale out, or set fp16.loss_scale to 0"));
}

absl::Status LossScaler::Update(bool overflow) {
  if (spec_.static_scale > 0) return absl::OkStatus();
  LossScalerState& s = state_;
  if (!overflow) {
    if (spec_.consecutive_hysteresis) s.hysteresis = spec_.hysteresis;
    // Steps since the last overflow, or the beginning, without this one. As in DeepSpeed the first
    // of a row of good steps does not count.
    const uint64_t good = s.iterations - static_cast<uint64_t>(s.last_overflow + 1);
    if (good > 0 && good % spec_.window == 0) {
      if (!spec_.consecutive_hysteresis) s.hysteresis = spec_.hysteresis;
      s.scale *= kFactor;
    }
    ++s.iterations;
    return absl::OkStatus();
  }
  s.last_overflow = static_cast<int64_t>(s.iterations++);
  if (s.hysteresis > 1) {
    --s.hysteresis;
    return absl::OkStatus();
  }
  if (s.scale <= spec_.min_scale && spec_.fails_at_min) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the gradients overflow at the smallest loss scale, ", spec_.min_scale,
        " (fp16.min_loss_scale): the training has diverged. Lower the learning rate, or use bf16"));
  }
  s.scale = std::max(s.scale / kFactor, spec_.min_scale);
  return absl::OkStatus();
}

}  // namespace zerod::core
