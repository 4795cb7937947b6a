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

// Where DeepSpeed skips a step whose gradients are not finite: in fp16, in bf16 where it is told to
// check, and wherever its ZeRO computes a norm (at stages 1 and 2 not in an unchecked bf16).
bool SkipsNonfinite(const Config& config) {
  if (config.fp16.enabled) return true;
  if (config.bf16 && config.bf16_options.check_grad_overflow) return true;
  if (!config.zero.compute_grad_norm) return false;
  return config.zero.stage == 3 || (config.zero.stage > 0 && !config.bf16);
}

}  // namespace

core::JobSpec MakeJobSpec(const JobRequest& request, const core::JobPlan& plan) {
  const Config& config = request.config;
  core::JobSpec spec;
  spec.id = request.id;
  spec.layout = request.layout;
  // The plan with it: "auto" may come out differently where the nodes' memory differs.
  spec.config_hash = Hasher()
                         .Add(config.ToJson())
                         .Add(absl::string_view(plan.node_sum ? "node_sum" : "per_rank"))
                         .Finish();
  spec.world = request.world;
  spec.members = request.members;
  spec.self = request.self;
  spec.local_world = request.local_world;
  spec.stage = config.zero.stage;
  spec.node_sum = plan.node_sum;
  if (plan.node_sum) spec.staged_part_elements = plan.staged_part_elements;
  spec.sum_gradients = config.communication.gradient_allreduce_op == "sum";
  spec.skip_nonfinite = SkipsNonfinite(config);
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

}  // namespace zerod::engine
