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

const Gate* UnusedGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "zero_optimization.stage 1 or 2", {"zero_optimization.stage"},
      [](const C& c) { return c.zero.stage == 1 || c.zero.stage == 2; }};
  return &gate;
}

constexpr char kNvmeLater[] = "state on NVMe comes later";
constexpr char kLoads[] =
    "it is for load_checkpoint(), which comes later; training has no use for it";
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
      {.path = "zero_optimization.stage3_model_persistence_threshold",
       .note = "the sum of the units that stay gathered, the smallest first, is at most so many "
               "elements",
       .slot = SLOT(model_persistence_threshold), .min = 0, .max = 9223372036854775807.0},
      {.path = "zero_optimization.stage3_max_reuse_distance", .served = Served::kNoMeaning,
       .note = "a released unit stays as long as the window has room, and what is used again last "
               "makes room first",
       .slot = SLOT(max_reuse_distance), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_module_granularity_threshold",
       .note = "modules of at most so many elements per module within are gathered as one, at "
               "every stage; 0: none",
       .slot = SLOT(module_granularity_threshold), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.stage3_gather_16bit_weights_on_model_save",
       .note = "whether Accelerate and the Trainer save whole weights at stage 3, which they ask; "
               "engine.state_dict() and save_16bit_model() are complete always",
       .slot = SLOT(gather_16bit_weights_on_model_save)},
      {.path = "zero_optimization.stage3_use_all_reduce_for_fetch_params",
       .served = Served::kNoMeaning,
       .note = "shards go from their owner to those who want them, with no collective to choose",
       .slot = SLOT(use_all_reduce_for_fetch_params)},
      {.path = "zero_optimization.stage3_allgather_sequential",
       .note = "one unit is gathered at a time",
       .slot = SLOT(allgather_sequential)},
      {.path = "zero_optimization.memory_efficient_linear", .served = Served::kNoMeaning,
       .note = "a parameter has one address for life, so autograd saves no copy of it",
       .slot = SLOT(memory_efficient_linear)},
      {.path = "zero_optimization.override_module_apply", .served = Served::kNoMeaning,
       .note = "a model is whole until initialize(), so its apply() works as it is",
       .slot = SLOT(override_module_apply)},
      {.path = "zero_optimization.log_trace_cache_warnings",
       .note = "a warning where a step gathers in another order than the one before",
       .slot = SLOT(log_trace_cache_warnings)},
      {.path = "zero_optimization.enable_sanity_checks", .served = Served::kNoMeaning,
       .note = "the checks are always on", .slot = SLOT(enable_sanity_checks)},
      {.path = "zero_optimization.leaf_module.classes",
       .note = "modules of these classes are gathered as one; names with or without the module's; "
               "also zerod.set_z3_leaf_modules",
       .slot = SLOT(leaf_module.classes)},
      {.path = "zero_optimization.leaf_module.names",
       .note = "the modules of these paths likewise; zerod.units comes first",
       .slot = SLOT(leaf_module.names)},
      {.path = "zero_optimization.leaf_module.name_suffixes",
       .note = "the modules whose paths end so likewise",
       .slot = SLOT(leaf_module.name_suffixes)},
  };
  keys->insert(keys->end(), stage3.begin(), stage3.end());
}

void AppendGradientKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> gradients = {
      {.path = "zero_optimization.reduce_bucket_size",
       .note = "elements of gradients that are in flight between nodes at once, 262144 at least "
               "and in 32 MiB of buffers at most",
       .slot = SLOT(reduce_bucket_size), .min = 1, .max = kCountMax},
      {.path = "zero_optimization.allgather_bucket_size",
       .note = "elements of parameters that are in flight between nodes at once, 262144 at least "
               "and in 32 MiB of buffers at most",
       .slot = SLOT(allgather_bucket_size), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.overlap_comm", .served = Served::kWorksBetter,
       .note = "at every stage, and null means true; false: nothing is reduced before the backward "
               "pass has ended",
       .slot = SLOT(overlap_comm)},
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
      {.path = "zero_optimization.compute_grad_norm", .served = Served::kWorksBetter,
       .note = "at every stage; false: the norm is computed where gradient_clipping needs it",
       .slot = SLOT(compute_grad_norm)},
      {.path = "zero_optimization.ignore_unused_parameters",
       .note = "false: a step in which a parameter has no gradient on any rank fails and names it; "
               "true: see zerod.unused_parameters",
       .slot = SLOT(ignore_unused_parameters), .gate = UnusedGate()},
      {.path = "zero_optimization.sub_group_size", .served = Served::kNoMeaning,
       .note = "the optimizer works in place, with no memory that a tile would bound",
       .slot = SLOT(sub_group_size), .min = 0, .max = kCountMax},
      {.path = "zero_optimization.save_muon_momentum_buffer_in_memory",
       .served = Served::kNoMeaning, .note = "all state is in memory",
       .slot = SLOT(save_muon_momentum_buffer_in_memory)},
      {.path = "zero_optimization.load_from_fp32_weights", .served = Served::kNoMeaning,
       .note = kLoads, .slot = SLOT(load_from_fp32_weights)},
      {.path = "zero_optimization.elastic_checkpoint", .served = Served::kNoMeaning,
       .note = "it is for save_checkpoint(), which comes later; training has no use for it",
       .slot = SLOT(elastic_checkpoint)},
      {.path = "zero_optimization.pipeline_loading_checkpoint", .served = Served::kNoMeaning,
       .note = kLoads, .slot = SLOT(pipeline_loading_checkpoint)},
  };
  keys->insert(keys->end(), gradients.begin(), gradients.end());
}

void AppendUnservedKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> unserved = {
      {.path = "zero_optimization.legacy_stage1", .served = Served::kNever,
       .note = "DeepSpeed refuses it too"},
      {.path = "zero_optimization.zenflow", .served = Served::kNever,
       .note = "every step uses every gradient"},
      {.path = "zero_optimization.mics_shard_size", .served = Served::kNever,
       .note = "it was removed from DeepSpeed", .also = "-1"},
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
  keys->insert(keys->end(), unserved.begin(), unserved.end());
}

void AppendOffloadParamKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> offload = {
      {.path = "zero_optimization.offload_param.device",
       .note = "cpu: the node's memory, where the state of a CPU node is at every stage. nvme: "
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
       .note = "cpu: the node's memory, where the state of a CPU node is at every stage. "
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
  AppendUnservedKeys(keys);
  AppendOffloadParamKeys(keys);
  AppendOffloadOptimizerKeys(keys);
}

}  // namespace zerod
