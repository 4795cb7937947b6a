// SPDX-License-Identifier: Apache-2.0
//
// The table's keys of "zero_optimization".
#include "base/config_keys.h"

namespace zerod {
namespace {

using C = Config;

const Gate* ParamNvme() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "offload_param.device nvme", {"zero_optimization.offload_param.device"},
      [](const C& c) { return c.zero.offload_param.device == "nvme"; }};
  return &gate;
}

const Gate* OptimizerNvme() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "offload_optimizer.device nvme", {"zero_optimization.offload_optimizer.device"},
      [](const C& c) { return c.zero.offload_optimizer.device == "nvme"; }};
  return &gate;
}

const Gate* SuperOffload() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "offload_optimizer.super_offload", {"zero_optimization.offload_optimizer.super_offload"},
      [](const C& c) { return c.zero.offload_optimizer.super_offload; }};
  return &gate;
}

constexpr char kNvmeLater[] = "state on NVMe comes later";
constexpr char kCheckpointsLater[] = "checkpoints come later";
constexpr char kZeroPlusPlus[] = "ZeRO++ comes later";

#define SLOT(member) [](C& c) -> Slot { return &c.zero.member; }

void AppendStage3Keys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> stage3 = {
      {.path = "zero_optimization.stage",
       .note = "0: nothing partitioned, 1: optimizer states, 2: gradients too, 3: parameters too",
       .slot = SLOT(stage), .min = 0, .max = 3},
      {.path = "zero_optimization.stage3_max_live_parameters", .served = Served::kWorksBetter,
       .note = "the window's size, elements; of a node, not of each rank, and it never exceeds it "
               "but for what is held at once",
       .slot = SLOT(max_live_parameters), .min = 1, .max = kCountMax},
      {.path = "zero_optimization.stage3_param_persistence_threshold",
       .note = "units of fewer elements stay gathered",
       .slot = SLOT(param_persistence_threshold), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_prefetch_bucket_size",
       .note = "elements that are gathered ahead along the last step's trace; 0: none",
       .slot = SLOT(prefetch_bucket_size), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_model_persistence_threshold", .served = Served::kNotYet,
       .note = "the sum of what stays gathered is not bounded yet",
       .slot = SLOT(model_persistence_threshold), .min = 0, .max = 9223372036854775807.0},
      {.path = "zero_optimization.stage3_max_reuse_distance", .served = Served::kNotYet,
       .note = "how soon a unit is used again does not choose yet what is kept",
       .slot = SLOT(max_reuse_distance), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_module_granularity_threshold", .served = Served::kNotYet,
       .note = "zerod.units names the modules that are gathered as one",
       .slot = SLOT(module_granularity_threshold), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_gather_16bit_weights_on_model_save",
       .served = Served::kNotYet, .note = "engine.state_dict() is complete at every stage",
       .slot = SLOT(gather_16bit_weights_on_model_save)},
      {.path = "zero_optimization.stage3_use_all_reduce_for_fetch_params",
       .served = Served::kNoMeaning,
       .note = "shards go from their owner to those who want them, with no collective to choose",
       .slot = SLOT(use_all_reduce_for_fetch_params)},
      {.path = "zero_optimization.stage3_allgather_sequential", .served = Served::kNotYet,
       .note = "stage3_prefetch_bucket_size bounds what is gathered ahead",
       .slot = SLOT(allgather_sequential)},
      {.path = "zero_optimization.memory_efficient_linear", .served = Served::kNoMeaning,
       .note = "a parameter has one address for life, so autograd saves no copy of it",
       .slot = SLOT(memory_efficient_linear)},
      {.path = "zero_optimization.override_module_apply", .served = Served::kNotYet,
       .note = "there is no zero.Init yet", .slot = SLOT(override_module_apply)},
      {.path = "zero_optimization.log_trace_cache_warnings", .served = Served::kNotYet,
       .note = "a changed trace is not logged", .slot = SLOT(log_trace_cache_warnings)},
      {.path = "zero_optimization.enable_sanity_checks", .served = Served::kNoMeaning,
       .note = "the checks are always on", .slot = SLOT(enable_sanity_checks)},
      {.path = "zero_optimization.leaf_module.classes", .served = Served::kNotYet,
       .note = "zerod.units names the modules that are gathered as one",
       .slot = SLOT(leaf_module.classes)},
      {.path = "zero_optimization.leaf_module.names", .served = Served::kNotYet,
       .note = "zerod.units names the modules that are gathered as one",
       .slot = SLOT(leaf_module.names)},
      {.path = "zero_optimization.leaf_module.name_suffixes", .served = Served::kNotYet,
       .note = "zerod.units names the modules that are gathered as one",
       .slot = SLOT(leaf_module.name_suffixes)},
  };
  keys->insert(keys->end(), stage3.begin(), stage3.end());
}

void AppendGradientKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> gradients = {
      {.path = "zero_optimization.reduce_bucket_size", .served = Served::kNotYet,
       .note = "a unit is what is reduced at once", .slot = SLOT(reduce_bucket_size), .min = 1,
       .max = kCountMax},
      {.path = "zero_optimization.allgather_bucket_size", .served = Served::kNotYet,
       .note = "a unit is what is gathered at once", .slot = SLOT(allgather_bucket_size), .min = 0,
       .max = kCountMax},
      {.path = "zero_optimization.overlap_comm", .served = Served::kNotYet,
       .note = "reducing beside the backward pass cannot be switched off; true is served at every "
               "stage",
       .slot = SLOT(overlap_comm), .also = "true"},
      {.path = "zero_optimization.contiguous_gradients", .served = Served::kNoMeaning,
       .note = "gradients lie contiguous in shared memory, unit by unit, always",
       .slot = SLOT(contiguous_gradients)},
      {.path = "zero_optimization.reduce_scatter", .served = Served::kNoMeaning,
       .note = "each owner gets its slice alone; an all-reduce would give the same values",
       .slot = SLOT(reduce_scatter)},
      {.path = "zero_optimization.use_multi_rank_bucket_allreduce", .served = Served::kNoMeaning,
       .note = "each owner gets its slice alone, with no collective to choose",
       .slot = SLOT(use_multi_rank_bucket_allreduce)},
      {.path = "zero_optimization.allgather_partitions", .served = Served::kNoMeaning,
       .note = "shards go from their owner to those who want them, with no collective to choose",
       .slot = SLOT(allgather_partitions)},
      {.path = "zero_optimization.round_robin_gradients", .served = Served::kNoMeaning,
       .note = "every member owns a part of every large unit, so the work is balanced already",
       .slot = SLOT(round_robin_gradients)},
      {.path = "zero_optimization.parameter_alignment", .served = Served::kNoMeaning,
       .note = "every parameter starts at a multiple of 32 elements",
       .slot = SLOT(parameter_alignment)},
      {.path = "zero_optimization.compute_grad_norm", .served = Served::kNotYet,
       .note = "the norm is computed where gradient_clipping needs it",
       .slot = SLOT(compute_grad_norm)},
      {.path = "zero_optimization.ignore_unused_parameters", .served = Served::kNotYet,
       .note = "a parameter without a gradient is not an error; see zerod.unused_parameters",
       .slot = SLOT(ignore_unused_parameters)},
      {.path = "zero_optimization.sub_group_size", .served = Served::kNotYet,
       .note = "the optimizer's tile cannot be chosen yet", .slot = SLOT(sub_group_size), .min = 0,
       .max = kCountMax},
      {.path = "zero_optimization.save_muon_momentum_buffer_in_memory", .served = Served::kNotYet,
       .note = "Muon comes later", .slot = SLOT(save_muon_momentum_buffer_in_memory)},
      {.path = "zero_optimization.load_from_fp32_weights", .served = Served::kNotYet,
       .note = kCheckpointsLater, .slot = SLOT(load_from_fp32_weights)},
      {.path = "zero_optimization.elastic_checkpoint", .served = Served::kNotYet,
       .note = kCheckpointsLater, .slot = SLOT(elastic_checkpoint)},
      {.path = "zero_optimization.pipeline_loading_checkpoint", .served = Served::kNotYet,
       .note = kCheckpointsLater, .slot = SLOT(pipeline_loading_checkpoint)},
      {.path = "zero_optimization.legacy_stage1", .served = Served::kNever,
       .note = "DeepSpeed refuses it too"},
      {.path = "zero_optimization.zenflow", .served = Served::kNever,
       .note = "every step uses every gradient"},
      {.path = "zero_optimization.mics_shard_size", .served = Served::kNever,
       .note = "it was removed from DeepSpeed"},
      {.path = "zero_optimization.mics_hierarchical_params_gather", .served = Served::kNever,
       .note = "it was removed from DeepSpeed"},
      {.path = "zero_optimization.zeropp_loco_param", .served = Served::kNever,
       .note = "it was removed from DeepSpeed"},
      {.path = "zero_optimization.zero_hpz_partition_size", .served = Served::kNotYet,
       .note = kZeroPlusPlus, .slot = SLOT(hpz_partition_size), .min = 0, .max = 4294967295.0,
       .also = "0"},
      {.path = "zero_optimization.zero_quantized_weights", .served = Served::kNotYet,
       .note = kZeroPlusPlus, .slot = SLOT(quantized_weights)},
      {.path = "zero_optimization.zero_quantized_nontrainable_weights", .served = Served::kNotYet,
       .note = kZeroPlusPlus, .slot = SLOT(quantized_nontrainable_weights)},
      {.path = "zero_optimization.zero_quantized_gradients", .served = Served::kNotYet,
       .note = kZeroPlusPlus, .slot = SLOT(quantized_gradients)},
  };
  keys->insert(keys->end(), gradients.begin(), gradients.end());
}

void AppendOffloadParamKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> offload = {
      {.path = "zero_optimization.offload_param.device",
       .note = "cpu: the node's memory, where the state of a CPU node is; needs stage 3. nvme: "
               "state on NVMe comes later",
       .slot = SLOT(offload_param.device), .choices = {"none", "cpu"}, .later = {"nvme"}},
      {.path = "zero_optimization.offload_param.nvme_path", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_param.nvme_path), .form = TextForm::kText,
       .gate = ParamNvme()},
      {.path = "zero_optimization.offload_param.buffer_count", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_param.buffer_count), .min = 0, .max = kCountMax,
       .gate = ParamNvme()},
      {.path = "zero_optimization.offload_param.buffer_size", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_param.buffer_size), .min = 0, .max = kCountMax,
       .gate = ParamNvme()},
      {.path = "zero_optimization.offload_param.max_in_cpu", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_param.max_in_cpu), .min = 0, .max = kCountMax,
       .gate = ParamNvme()},
      {.path = "zero_optimization.offload_param.pin_memory", .served = Served::kNoMeaning,
       .note = "pinning is for copies to a GPU, and a CPU node makes none",
       .slot = SLOT(offload_param.pin_memory)},
  };
  keys->insert(keys->end(), offload.begin(), offload.end());
}

void AppendOffloadOptimizerKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> offload = {
      {.path = "zero_optimization.offload_optimizer.device",
       .note = "cpu: the node's memory, where the state of a CPU node is; needs stage 1, 2 or 3. "
               "nvme: state on NVMe comes later",
       .slot = SLOT(offload_optimizer.device), .choices = {"none", "cpu"}, .later = {"nvme"}},
      {.path = "zero_optimization.offload_optimizer.nvme_path", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_optimizer.nvme_path), .form = TextForm::kText,
       .gate = OptimizerNvme()},
      {.path = "zero_optimization.offload_optimizer.buffer_count", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_optimizer.buffer_count), .min = 0,
       .max = kCountMax, .gate = OptimizerNvme()},
      {.path = "zero_optimization.offload_optimizer.pipeline_read", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_optimizer.pipeline_read), .gate = OptimizerNvme()},
      {.path = "zero_optimization.offload_optimizer.pipeline_write", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_optimizer.pipeline_write),
       .gate = OptimizerNvme()},
      {.path = "zero_optimization.offload_optimizer.fast_init", .served = Served::kNotYet,
       .note = kNvmeLater, .slot = SLOT(offload_optimizer.fast_init), .gate = OptimizerNvme()},
      {.path = "zero_optimization.offload_optimizer.pin_memory", .served = Served::kNoMeaning,
       .note = "pinning is for copies to a GPU, and a CPU node makes none",
       .slot = SLOT(offload_optimizer.pin_memory)},
      {.path = "zero_optimization.offload_optimizer.ratio", .served = Served::kNoMeaning,
       .note = "both parts would be in the same node's memory; less than 1 needs stage 3",
       .slot = SLOT(offload_optimizer.ratio), .min = 0, .max = 1},
      {.path = "zero_optimization.offload_optimizer.super_offload", .served = Served::kNotYet,
       .note = "it is for GPUs that share the CPU's memory",
       .slot = SLOT(offload_optimizer.super_offload)},
      {.path = "zero_optimization.offload_optimizer.cpuadam_cores_perc", .served = Served::kNotYet,
       .note = "it belongs to super_offload", .slot = SLOT(offload_optimizer.cpuadam_cores_perc),
       .min = 0, .max = 1, .gate = SuperOffload()},
  };
  keys->insert(keys->end(), offload.begin(), offload.end());
}

}  // namespace

void AppendZeroKeys(std::vector<ConfigKey>* keys) {
  AppendStage3Keys(keys);
  AppendGradientKeys(keys);
  AppendOffloadParamKeys(keys);
  AppendOffloadOptimizerKeys(keys);
}

}  // namespace zerod
