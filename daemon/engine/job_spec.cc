// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/job_spec.h"

#include <cmath>
#include <string>

#include "base/hash.h"

namespace zerod::engine {
namespace {

// DeepSpeed's scaler without ZeRO bears no overflow and gives up at no scale.
core::LossScaleSpec LossScaleOf(const Config& config) {
  const Config::Fp16& fp16 = config.fp16;
  const bool zero = config.zero.stage > 0;
  core::LossScaleSpec spec;
  spec.static_scale = fp16.loss_scale;
  spec.initial_scale = std::ldexp(1.0, static_cast<int>(fp16.initial_scale_power));
  spec.window = fp16.loss_scale_window;
  spec.hysteresis = zero ? fp16.hysteresis : 1;
  spec.consecutive_hysteresis = fp16.consecutive_hysteresis;
  spec.min_scale = static_cast<double>(fp16.min_loss_scale);
  spec.fails_at_min = zero;
  return spec;
}

}  // namespace

core::JobSpec MakeJobSpec(const JobRequest& request, const core::JobPlan& plan) {
  const Config& config = request.config;
  core::JobSpec spec;
  spec.id = request.id;
  spec.layout = request.layout;
  spec.config_hash = Hasher().Add(config.ToJson()).Finish();
  spec.world = request.world;
  spec.members = request.members;
  spec.self = request.self;
  spec.local_world = request.local_world;
  spec.stage = config.zero.stage;
  spec.node_sum = plan.node_sum;
  spec.sum_gradients = config.communication.gradient_allreduce_op == "sum";
  spec.skip_nonfinite = config.SkipsNonfinite();
  if (config.fp16.enabled) spec.loss_scale = LossScaleOf(config);
  spec.untouched_as_zero = config.zerod.unused_parameters == "zero";
  // As in DeepSpeed, at the two stages alone.
  spec.refuse_untouched = !config.zero.ignore_unused_parameters &&
                          (config.zero.stage == 1 || config.zero.stage == 2);
  spec.prefetch_elements = config.zero.prefetch_bucket_size;
  spec.in_flight_elements = plan.in_flight_elements;
  spec.window = plan.window;
  return spec;
}

core::DType WireType(const Config& config, core::DType parameters) {
  const std::string name = config.communication.data_type.value_or("");
  if (name == "fp32") return core::DType::kFloat32;
  if (name == "fp16") return core::DType::kFloat16;
  if (name == "bf16") return core::DType::kBFloat16;
  return parameters;
}

}  // namespace zerod::engine
