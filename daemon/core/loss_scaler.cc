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
  scale_ = spec.static_scale > 0 ? spec.static_scale : spec.initial_scale;
  hysteresis_ = spec.hysteresis;
}

absl::Status LossScaler::Update(bool overflow) {
  if (spec_.static_scale > 0) return absl::OkStatus();
  if (!overflow) {
    if (spec_.consecutive_hysteresis) hysteresis_ = spec_.hysteresis;
    // As in DeepSpeed the first of a row of good steps does not count.
    if (good_ > 0 && good_ % spec_.window == 0) {
      if (!spec_.consecutive_hysteresis) hysteresis_ = spec_.hysteresis;
      scale_ *= kFactor;
    }
    ++good_;
    return absl::OkStatus();
  }
  good_ = 0;
  if (hysteresis_ > 1) {
    --hysteresis_;
    return absl::OkStatus();
  }
  if (scale_ <= spec_.min_scale && spec_.fails_at_min) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the gradients overflow at the smallest loss scale, ", spec_.min_scale,
        " (fp16.min_loss_scale): the training has diverged. Lower the learning rate, or use bf16"));
  }
  scale_ = std::max(scale_ / kFactor, spec_.min_scale);
  return absl::OkStatus();
}

}  // namespace zerod::core
