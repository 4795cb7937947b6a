// SPDX-License-Identifier: Apache-2.0
//
// DeepSpeed's keys beyond those that work: each is accepted without harm, mapped, or refused with a
// sentence; none is accepted and ignored. And docs/config.md shows the table of the code.
#include "base/config_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/config_parse.h"
#include "base/config_state.h"

namespace zerod {
namespace {

using ::testing::HasSubstr;

std::string With(absl::string_view members) {
  return absl::StrCat("{\"train_micro_batch_size_per_gpu\": 1, ", members, "}");
}

absl::StatusOr<ParsedConfig> Parse(absl::string_view members, uint32_t world = 1) {
  ParseOptions options;
  options.world = world;
  return ParseConfig(With(members), options);
}

std::vector<std::string> Problems(const absl::StatusOr<ParsedConfig>& parsed) {
  if (parsed.ok()) return {};
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  return absl::StrSplit(std::string(parsed.status().message()), '\n');
}

// Accepted, with this text in the resolved configuration and, where not empty, the one warning.
const struct {
  const char* members;
  const char* canonical;
  const char* warning;
} kAccepted[] = {
    // Defaults, and blocks that are off.
    {R"("fp16": {"enabled": false})", R"("fp16":{"auto_cast":false)", ""},
    {R"("fp16": null)", R"("fp16":{"auto_cast":false)", ""},
    {R"("fp16": {"enabled": false, "loss_scale": 128, "hysteresis": 3, "min_loss_scale": 4})",
     R"("hysteresis":3)", ""},
    {R"("fp16": {"enabled": false, "initial_scale_power": -3})", R"("initial_scale_power":-3)", ""},
    {R"("bf16": {"enabled": true, "check_grad_overflow": false})", R"("enabled":true)", ""},
    {R"("bf16": {"check_grad_overflow": true})", R"("check_grad_overflow":true)", ""},
    {R"("steps_per_print": null)", R"("steps_per_print":null)", ""},
    {R"("steps_per_print": Infinity)", R"("steps_per_print":null)", ""},
    {R"("steps_per_print": 2000)", R"("steps_per_print":2000)", ""},
    {R"("wall_clock_breakdown": true)", R"("wall_clock_breakdown":true)", ""},
    {R"("memory_breakdown": true, "dump_state": true)", R"("dump_state":true)", ""},
    {R"("log_level": "INFO")", R"("log_level":"info")", ""},
    {R"("dataloader_drop_last": true)", R"("dataloader_drop_last":true)", ""},
    {R"("disable_python_gc": true)", R"("disable_python_gc":true)", ""},
    {R"("tensorboard": {"enabled": true, "output_path": "runs", "job_name": "a"})",
     R"("job_name":"a")", ""},
    {R"("csv_monitor": {"enabled": true})", R"("csv_monitor":{"enabled":true)", ""},
    {R"("wandb": {"enabled": true, "team": null})", R"("team":null)", ""},
    {R"("communication_data_type": null)", R"("communication_data_type":null)", ""},
    {R"("gradient_allreduce_op": "mean")", R"("gradient_allreduce_op":"mean")", ""},
    {R"("fp16": {"enabled": true, "fp16_master_weights_and_grads": true})",
     R"("fp16_master_weights_and_grads":true)", ""},
    {R"("bf16": {"enabled": true, "bf16_master_weights_and_grads": true,
                  "bf16_optimizer_states": true})", R"("bf16_optimizer_states":true)", ""},
    {R"("fp16": {"enabled": true})", R"("enabled":true,"fp16_master_weights_and_grads":false)", ""},
    {R"("fp16": {"enabled": true, "loss_scale": 128, "auto_cast": true})", R"("loss_scale":128.0)",
     ""},
    {R"("bf16": {"enabled": true})", R"("check_grad_overflow":true)", ""},
    {R"("bf16": {"enabled": true, "immediate_grad_update": true})",
     R"("immediate_grad_update":true)", ""},
    {R"("bf16": {"enabled": true}, "data_types": {"param_dtype": "bfloat16"})",
     R"("param_dtype":"bfloat16")", ""},
    {R"("data_types": {"grad_accum_dtype": "FP32"})", R"("grad_accum_dtype":"fp32")", ""},
    {R"("torch_autocast": {"enabled": true, "dtype": "bfloat16"})", R"("dtype":"bfloat16")", ""},
    {R"("torch_autocast": {"enabled": true, "dtype": "torch.bfloat16"})", R"("dtype":"bfloat16")",
     ""},
    {R"("data_types": {"grad_accum_dtype": "torch.float32"})", R"("grad_accum_dtype":"float32")",
     ""},
    {R"("gradient_allreduce_op": "SUM")", R"("gradient_allreduce_op":"sum")", ""},
    {R"("communication_data_type": "BF16")", R"("communication_data_type":"bf16")", ""},
    {R"("prescale_gradients": true)", R"("prescale_gradients":true)", ""},
    {R"("gradient_predivide_factor": 2)", R"("gradient_predivide_factor":2.0)", ""},
    {R"("gradient_allreduce_op": "sum")", R"("gradient_allreduce_op":"sum")", ""},
    {R"("managed_gradient_accumulation": false)", R"("managed_gradient_accumulation":false)", ""},
    {R"("optimizer": {"type": "AdamW"})", R"("weight_decay":0.0)", ""},
    {R"("optimizer": {"type": "AdamW", "params": {"torch_adam": true}})",
     R"("weight_decay":0.01)", ""},
    {R"("optimizer": {"type": "adam", "params": {"adam_w_mode": false, "bias_correction": false}})",
     R"("adam_w_mode":false)", ""},
    {R"("optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.99]}})", R"("type":"Lion")", ""},
    {R"("optimizer": {"type": "Adagrad", "params": {"lr_decay": 0.1}})", R"("lr":0.01)", ""},
    {R"("optimizer": {"type": "SGD", "params": {"momentum": 0.9, "nesterov": true}})",
     R"("nesterov":true)", ""},
    {R"("optimizer": {"type": "rmsprop", "params": {"centered": true, "momentum": 0.9}})",
     R"("alpha":0.99)", ""},
    {R"("optimizer": {"type": "Adadelta", "params": {"rho": 0.8}})", R"("eps":1e-06)", ""},
    {R"("optimizer": {"type": "Adamax", "params": {"weight_decay": 0.1}})", R"("lr":0.002)", ""},
    {R"("optimizer": {"type": "NAdam", "params": {"momentum_decay": 0.01}})",
     R"("momentum_decay":0.01)", ""},
    {R"("optimizer": {"type": "RAdam", "params": {"decoupled_weight_decay": true}})",
     R"("decoupled_weight_decay":true)", ""},
    {R"("optimizer": {"type": "ASGD", "params": {"lambd": 0.01, "t0": 10}})", R"("alpha":0.75)",
     ""},
    {R"("optimizer": {"type": "Rprop", "params": {"etas": [0.3, 1.5], "step_sizes": [0, 1]}})",
     R"("etas":[0.3,1.5])", ""},
    {R"("optimizer": {"type": "lamb", "params": {"max_coeff": 0.3, "eps_inside_sqrt": true}})",
     R"("max_coeff":0.3)", ""},
    {R"("optimizer": {"type": "muon"})", R"("muon_lr":0.02)", ""},
    {R"("optimizer": {"type": "muon", "params": {"lr": 0.1, "adam_lr": 0.001}})",
     R"("muon_lr":0.1)", ""},
    {R"("optimizer": {"type": "Muon", "params": {"muon_lr": 0.1}})", R"("adam_lr":0.0003)", ""},
    {R"("prescale_gradients": false)", R"("prescale_gradients":false)", ""},
    {R"("data_types": {"keep_in_fp32_modules": "auto"})", R"("keep_in_fp32_modules":"auto")", ""},
    {R"("data_types": {})", R"("grad_accum_dtype":null)", ""},
    {R"("aio": null)", R"("block_size":1048576)", ""},
    {R"("aio": {"block_size": 8192, "queue_depth": 32})", R"("block_size":8192)", ""},
    {R"("checkpoint": {"tag_validation": "WARN"})", R"("tag_validation":"Warn")", ""},
    {R"("checkpoint": {"writer": null})", R"("io_multiplier":1)", ""},
    {R"("tensorboard": {"enabled": false, "output_path": "x"})", R"("output_path":"x")", ""},
    {R"("wandb": {"enabled": false, "project": "p"})", R"("project":"p")", ""},
    {R"("zero_optimization": {"sub_group_size": 1e9})", R"("sub_group_size":1000000000)", ""},
    {R"("zero_optimization": {"stage3_model_persistence_threshold": 9223372036854775807})",
     R"("stage3_model_persistence_threshold":9223372036854775807)", ""},
    {R"("zero_optimization": {"overlap_comm": true})", R"("overlap_comm":true)", ""},
    {R"("zero_optimization": {"overlap_comm": null})", R"("overlap_comm":null)", ""},
    {R"("zero_optimization": {"overlap_comm": false})", R"("overlap_comm":false)", ""},
    {R"("zero_optimization": {"reduce_bucket_size": 2e8, "allgather_bucket_size": 0})",
     R"("reduce_bucket_size":200000000)", ""},
    {R"("zero_optimization": {"stage3_model_persistence_threshold": 0})",
     R"("stage3_model_persistence_threshold":0)", ""},
    {R"("zero_optimization": {"stage3_module_granularity_threshold": 4096})",
     R"("stage3_module_granularity_threshold":4096)", ""},
    {R"("zero_optimization": {"leaf_module": {"classes": "Block", "names": ["h.0"]}})",
     R"("leaf_module":{"classes":["Block"],"name_suffixes":[],"names":["h.0"]})", ""},
    {R"("zero_optimization": {"compute_grad_norm": false})", R"("compute_grad_norm":false)", ""},
    {R"("zero_optimization": {"ignore_unused_parameters": false})",
     R"("ignore_unused_parameters":false)", ""},
    {R"("zero_optimization": {"stage3_allgather_sequential": true,
         "log_trace_cache_warnings": true})", R"("stage3_allgather_sequential":true)", ""},
    {R"("zero_optimization": {"zero_hpz_partition_size": 0})", R"("zero_hpz_partition_size":0)",
     ""},
    {R"("optimizer": {"type": "AdamW", "params": {"adam_w_mode": true, "torch_adam": true}})",
     R"("torch_adam":true)", ""},
    {R"("optimizer": {"type": "AdamW", "params": {"fused": null, "amsgrad": false}})",
     R"("fused":null)", ""},
    {R"("scheduler": {"type": "WarmupLR",
                      "params": {"warmup_max_lr": 1, "last_batch_iteration": -1}})",
     R"("last_batch_iteration":-1)", ""},
    // No meaning.
    {R"("zero_optimization": {"contiguous_gradients": false})", R"("contiguous_gradients":false)",
     ""},
    {R"("zero_optimization": {"reduce_scatter": false, "allgather_partitions": false})",
     R"("reduce_scatter":false)", ""},
    {R"("zero_optimization": {"round_robin_gradients": true})", R"("round_robin_gradients":true)",
     ""},
    {R"("zero_optimization": {"sub_group_size": 0, "stage3_max_reuse_distance": 0})",
     R"("sub_group_size":0)", ""},
    {R"("zero_optimization": {"stage3_gather_16bit_weights_on_model_save": true})",
     R"("stage3_gather_16bit_weights_on_model_save":true)", ""},
    {R"("zero_optimization": {"elastic_checkpoint": true, "load_from_fp32_weights": false,
         "pipeline_loading_checkpoint": true})", R"("elastic_checkpoint":true)", ""},
    {R"("zero_optimization": {"override_module_apply": false,
         "save_muon_momentum_buffer_in_memory": true})", R"("override_module_apply":false)", ""},
    {R"("zero_allow_untested_optimizer": true, "zero_force_ds_cpu_optimizer": false)",
     R"("zero_allow_untested_optimizer":true)", ""},
    {R"("timers": {"throughput": {"enabled": false}})", R"("throughput":{"enabled":false)", ""},
    // Offload to where the state is.
    {R"("zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": false},
         "offload_optimizer": {"device": "cpu", "ratio": 0.5}})", R"("device":"cpu")", ""},
    {R"("zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}})",
     R"("device":"cpu")", ""},
    {R"("zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}})",
     R"("device":"cpu")", R"(offload_param.device: "cpu" is so at every stage)"},
    {R"("zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}})",
     R"("device":"cpu")", R"(DeepSpeed does it at stage 1, 2 or 3 only, and this is 0)"},
    {R"("zero_optimization": {"offload_param": {"device": "none", "nvme_path": "/nowhere"}})",
     R"("nvme_path":"/nowhere")", ""},
    {R"("zero_optimization": {"offload_param": null, "offload_optimizer": {}})",
     R"("device":"none")", ""},
    {R"("zero_optimization": {"offload_param": {"buffer_size": 4e8, "max_in_cpu": 0}})",
     R"("buffer_size":400000000)", ""},
    {R"("zero_optimization": {"stage": 3, "offload_param":
           {"device": "cpu", "buffer_count": 9, "buffer_size": 1e8, "max_in_cpu": 1e9},
         "offload_optimizer": {"device": "cpu", "buffer_count": 6, "pipeline_read": true,
                               "pipeline_write": true, "fast_init": true, "pin_memory": true}})",
     R"("buffer_count":9)", ""},
    // Other names.
    {R"("zero_optimization": {"max_live_parameters": 7})", R"("stage3_max_live_parameters":7)", ""},
    {R"("zero_optimization": {"prefetch_bucket_size": 7})", R"("stage3_prefetch_bucket_size":7)",
     ""},
    {R"("bfloat16": {"enabled": true})", R"("enabled":true,"immediate_grad_update")",
     "bfloat16: is deprecated; its name is now bf16"},
    {R"("bf16": {"check_overflow": false})", R"("check_grad_overflow":false)",
     "bf16.check_overflow: is deprecated; its name is now bf16.check_grad_overflow"},
    {R"("zero_optimization": {"stage": 2, "cpu_offload": true})", R"("device":"cpu")",
     "zero_optimization.cpu_offload: is deprecated; its name is now "
     "zero_optimization.offload_optimizer.device"},
    {R"("zero_optimization": {"stage": 2, "cpu_offload": false})", R"("device":"none")",
     "zero_optimization.cpu_offload: is deprecated"},
    {R"("zero_optimization": {"stage": 3, "cpu_offload_param": true})", R"("device":"cpu")",
     "zero_optimization.cpu_offload_param: is deprecated"},
    {R"("zero_optimization": {"cpu_offload_use_pin_memory": false})", R"("pin_memory":false)",
     "zero_optimization.cpu_offload_use_pin_memory: is deprecated"},
    {R"("zero_optimization": {"stage3_gather_fp16_weights_on_model_save": false})",
     R"("stage3_gather_16bit_weights_on_model_save":false)", "fp16_weights_on_model_save: is dep"},
    {R"("zero_optimization": true)", R"("stage":1)",
     R"(zero_optimization: true is deprecated; write {"stage": 1})"},
    {R"("zero_optimization": false)", R"("stage":0)", "zero_optimization: false is deprecated"},
    {R"("aio": {"thread_count": 4})", R"("intra_op_parallelism":4)", "aio.thread_count: is dep"},
    // Not served, and off.
    {R"("amp": {"enabled": false})", "", "amp: is not served and is off here; leave it out"},
    {R"("flops_profiler": {"enabled": false, "profile_step": 1, "detailed": true})", "",
     "flops_profiler: is not served yet and is off here"},
    {R"("activation_checkpointing": {"partition_activations": false, "number_checkpoints": null})",
     "", "activation_checkpointing: is not served and is off here"},
    {R"("elasticity": {"enabled": false, "max_train_batch_size": 2000})", "", "elasticity: is not"},
    {R"("zero_optimization": {"legacy_stage1": false})", "", "zero_optimization.legacy_stage1: is"},
    {R"("pipeline": null)", "", ""},
    // A group of one is what there is anyway.
    {R"("sequence_parallel_size": 1)", "", ""},
    {R"("sequence_parallel_size": 0)", "", "sequence_parallel_size: is not served and is off here"},
    {R"("tensor_parallel": {"autotp_size": 1})", "", ""},
    {R"("tensor_parallel": {"autotp_size": 0})", "", ""},
    {R"("tensor_parallel": {})", "", "tensor_parallel: is not served and is off here"},
    {R"("tensor_parallel": {"autotp_size": 1, "preset_model": "llama"})", "",
     "tensor_parallel: is not served and is off here; leave it out"},
    {R"("zero_optimization": {"mics_shard_size": -1})", "", ""},
    {R"("data_types": {"buffer_dtype": "bf16", "keep_in_fp32_modules": ["router.*bias"]})",
     R"("buffer_dtype":"bf16","grad_accum_dtype":null,"keep_in_fp32_modules":["router.*bias"])",
     ""},
};

TEST(ConfigKeysTest, Accepted) {
  for (const auto& c : kAccepted) {
    const absl::StatusOr<ParsedConfig> parsed = Parse(c.members);
    ASSERT_TRUE(parsed.ok()) << c.members << "\n" << parsed.status();
    const std::string text = parsed->config.ToJson();
    EXPECT_THAT(text, HasSubstr(c.canonical)) << c.members;
    ASSERT_EQ(parsed->warnings.size(), *c.warning != 0 ? 1u : 0u)
        << c.members << testing::PrintToString(parsed->warnings);
    if (*c.warning != 0) {
      EXPECT_THAT(parsed->warnings[0], HasSubstr(c.warning));
    }
    const absl::StatusOr<Config> again = Config::Parse(text, 1);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, parsed->config) << c.members;
  }
}

// Each has this one problem.
const struct {
  const char* members;
  const char* says;
} kRefused[] = {
    // Not served yet.
    {R"("zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2})",
     "zero_hpz_partition_size: 2 is not served yet: ZeRO++ comes later"},
    {R"("zero_optimization": {"stage": 3, "zero_quantized_weights": true})", "ZeRO++ comes later"},
    {R"("zero_optimization": {"stage": 3, "zero_quantized_gradients": true})", "ZeRO++ comes"},
    {R"("zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": 1})", "ZeRO++"},
    {R"("bf16": {"enabled": true, "bf16_optimizer_states": true})",
     "bf16_optimizer_states: true needs bf16.bf16_master_weights_and_grads true"},
    {R"("steps_per_print": 0)", "steps_per_print: 0 is not allowed"},
    {R"("vocabulary_size": Infinity)", "vocabulary_size: Infinity is not allowed"},
    {R"("log_level": "loud")", R"(log_level: "loud" is not allowed; it must be "debug" or "info")"},
    {R"("checkpoint": {"use_node_local_storage": true})",
     "true is not served yet: the nodes write into one folder that they share"},
    {R"("checkpoint": {"writer": {"type": "slow"}})", R"(writer.type: "slow" is not allowed)"},
    {R"("datastates_ckpt": {"host_cache_size": 1})", "datastates_ckpt: is not served yet"},
    {R"("comet": {"enabled": true})", "comet: is not served yet: csv_monitor, tensorboard and"},
    {R"("flops_profiler": {"enabled": true})", "flops_profiler: is not served yet"},
    {R"("optimizer": {"type": "MuAdam", "params": {"lr": 1}})",
     R"(optimizer.type: "MuAdam" is not served yet)"},
    {R"("optimizer": {"type": "Muon", "params": {"momentum": 1}})", R"(must be below 1 for Muon)"},
    {R"("optimizer": {"type": "Muon", "params": {"ns_method": "exact"}})", R"("exact" is not all)"},
    {R"("optimizer": {"type": "Lamb", "params": {"min_coeff": 2, "max_coeff": 1}})",
     "optimizer.params.min_coeff: is above max_coeff"},
    {R"("optimizer": {"type": "SGD", "params": {"nesterov": true}})", "needs a momentum"},
    {R"("data_types": {"param_dtype": "half"})", R"("half" is not what bf16.enabled and fp16)"},
    {R"("torch_autocast": {"enabled": true, "dtype": "fp16"})", R"("fp16" is not served yet)"},
    {R"("torch_autocast": {"enabled": true, "dtype": "torch.float16"})",
     R"("float16" is not served yet)"},
    {R"("data_types": {"grad_accum_dtype": "torch.int8"})", R"("torch.int8")"},
    {R"("zerod": {"master_remainder": true}, "bf16": {"enabled": true})",
     "zerod.master_remainder: true is not served yet"},
    // Never.
    {R"("amp": {"enabled": true})", "amp: is not served: it was removed from DeepSpeed; use bf16"},
    {R"("pipeline": {"stages": 2})", "pipeline: is not served: there is no pipeline parallelism"},
    {R"("tensor_parallel": {"autotp_size": 4})", "tensor_parallel: is not served: there is no"},
    {R"("tensor_parallel": {"autotp_size": "1"})", "tensor_parallel: is not served: there is no"},
    {R"("tensor_parallel": {"preset_model": "llama"})", "tensor_parallel: is not served"},
    {R"("data_types": {"buffer_dtype": "int8"})", R"("int8" is not allowed; it must be "fp32")"},
    {R"("sequence_parallel_size": 2)", "sequence_parallel_size: is not served: there is no seq"},
    {R"("seq_parallel_communication_data_type": "bf16")", R"("bf16" is not served: there is no)"},
    {R"("activation_checkpointing": {"cpu_checkpointing": true})", "torch.utils.checkpoint works"},
    {R"("compile": {"deepcompile": true})", "compile: is not served: torch.compile works"},
    {R"("autotuning": {"enabled": true})", "autotuning: is not served"},
    {R"("hybrid_engine": {"enabled": true})", "hybrid_engine: is not served"},
    {R"("sparse_attention": {"mode": "fixed"})", "sparse_attention: is not served: it was removed"},
    {R"("zero_optimization": {"mics_shard_size": 1})", "mics_shard_size: is not served: it was"},
    {R"("zero_optimization": {"zenflow": {"topk_ratio": 0.1}})", "zenflow: is not served"},
    {R"("zero_optimization": {"legacy_stage1": true})", "legacy_stage1: is not served: DeepSpeed"},
    {R"("optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}})",
     "optimizer.params.max_grad_norm: is not served: gradient_clipping is what clips"},
    {R"("optimizer": {"type": "AdamW", "params": {"amsgrad": true}})", "amsgrad: true is not serv"},
    // Another type's parameter.
    {R"("optimizer": {"type": "AdamW", "params": {"momentum": 0.9}})",
     R"(optimizer.params.momentum: is not a parameter of AdamW; it is one of "SGD" or "Muon")"},
    {R"("scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1, "total_num_steps": 9}})",
     R"(is not a parameter of WarmupLR; it is one of "WarmupDecayLR" or "WarmupCosineLR")"},
    // DeepSpeed's traps.
    {R"("zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})",
     "offload_optimizer.ratio: 0.5 needs zero_optimization.stage 3, and it is 2"},
    {R"("zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}})",
     R"(offload_param.device: "disk" is not allowed; it must be "none" or "cpu")"},
    {R"("zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}})",
     R"(offload_param.device: "nvme" is not served yet; it must be "none" or "cpu")"},
    {R"("fp16": {"hysteresis": 0})",
     "fp16.hysteresis: 0 is not allowed; it must be a whole number from 1 to"},
    {R"("fp16": {"loss_scale": -1})", "fp16.loss_scale: -1 is not allowed"},
    {R"("fp16": {"loss_scale": NaN})", "fp16.loss_scale: NaN is not allowed"},
    {R"("fp16": {"loss_scale_window": 1.5})", "fp16.loss_scale_window: 1.5 is not allowed"},
    {R"("fp16": {"min_loss_scale": 0.5})", "fp16.min_loss_scale: 0.5 is not allowed"},
    {R"("fp16": {"initial_scale_power": 200})", "must be a whole number from -126 to 127"},
    {R"("zero_optimization": {"reduce_bucket_size": 0})", "reduce_bucket_size: 0 is not allowed"},
    {R"("gradient_clipping": Infinity)", "gradient_clipping: Infinity is not allowed"},
    {R"("aio": {"block_size": "x"})", R"(aio.block_size: "x" is not allowed)"},
    {R"("checkpoint": {"tag_validation": "Warm"})", R"(it must be "Warn" or "Ignore" or "Fail")"},
    {R"("communication_data_type": "none")", R"("none" is not allowed)"},
    {R"("zero_optimization": {"stage": 1, "cpu_offload": true,
                              "offload_optimizer": {"device": "cpu"}})",
     "cpu_offload: is another name for zero_optimization.offload_optimizer, which is given too"},
    {R"("zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 1})",
     "max_live_parameters: is another name for zero_optimization.stage3_max_live_parameters"},
    {R"("bfloat16": {"enabled": true}, "bf16": {"enabled": true})", "bfloat16: is another name"},
    {R"("zero_optimization": {"stage": 2, "cpu_offload": "cpu"})", R"("cpu" is not allowed; it)"},
    {R"("zero_optimization": {"stage": 3, "offload_param": "cpu"})", "it must be an object"},
};

TEST(ConfigKeysTest, Refused) {
  for (const auto& c : kRefused) {
    const std::vector<std::string> problems = Problems(Parse(c.members, 2));
    ASSERT_EQ(problems.size(), 1u) << c.members << "\n" << testing::PrintToString(problems);
    EXPECT_THAT(problems[0], HasSubstr(c.says)) << c.members;
  }
}

TEST(ConfigKeysTest, SeveralProblemsOfOneKind) {
  const struct {
    const char* members;
    std::vector<std::string> says;
  } cases[] = {
      {R"("fp16": {"enabled": true}, "bf16": {"enabled": true})",
       {"fp16.enabled: true is not allowed beside bf16.enabled; keep one"}},
      {R"("zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}})",
       {"offload_optimizer.device: \"nvme\" is not served yet",
        "offload_optimizer.nvme_path: is missing; device nvme needs"}},
      {R"("zero_optimization": {"stage": 3, "offload_param":
           {"device": "nvme", "nvme_path": "/nowhere/at/all"}})",
       {"offload_param.device: \"nvme\" is not served yet",
        "nvme_path: \"/nowhere/at/all\" is not there on this node, or is not a folder"}},
      {R"("zero_optimization": {"stage": 2, "offload_optimizer":
           {"device": "nvme", "nvme_path": "/"}})",
       {"\"nvme\" is not served yet",
        "\"nvme\" needs zero_optimization.stage 3, and it is 2"}},
      {R"("zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3})",
       {"zero_hpz_partition_size: 3 does not divide the 2 ranks"}},
      {R"("zero_optimization": {"stage": 2, "zero_quantized_weights": true})",
       {"zero_quantized_weights: needs zero_optimization.stage 3, and it is 2"}},
      {R"("scheduler": {"type": "OneCycle"})",
       {"cycle_min_lr: is missing; OneCycle needs it", "cycle_max_lr: is missing"}},
  };
  for (const auto& c : cases) {
    const absl::StatusOr<ParsedConfig> parsed = Parse(c.members, 2);
    ASSERT_FALSE(parsed.ok()) << c.members;
    for (const std::string& says : c.says) {
      EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(says)) << c.members;
    }
  }
}

// `value` at the dotted path, in a document that is otherwise fine for it.
std::string DocumentWith(const ConfigKey& key, const Json& value) {
  Json document = {{"train_micro_batch_size_per_gpu", 1}};
  if (absl::StartsWith(key.path, "optimizer.")) document["optimizer"]["type"] = "AdamW";
  if (absl::StartsWith(key.path, "scheduler.")) {
    document["scheduler"] = {{"type", "WarmupLR"}, {"params", {{"warmup_max_lr", 0.1}}}};
  }
  document[Pointer(key.path)] = value;
  return document.dump();
}

TEST(ConfigKeysTest, EveryDefaultIsAccepted) {
  for (const ConfigKey& key : ConfigKeys()) {
    const absl::string_view path = key.path;
    if (key.slot == nullptr || absl::EndsWith(path, ".type") || DefaultOf(key) == 0) continue;
    if (!key.types.empty() && !Contains(key.types, "AdamW") && !Contains(key.types, "WarmupLR")) {
      continue;
    }
    const absl::StatusOr<Config> config = Config::Parse(DocumentWith(key, DefaultOf(key)), 1);
    EXPECT_TRUE(config.ok()) << path << " " << config.status();
  }
}

// The rule that keeps the table honest: what has no effect yet can only have its default.
TEST(ConfigKeysTest, NothingIsAcceptedAndIgnored) {
  int refused = 0;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.served != Served::kNotYet && key.served != Served::kNever) continue;
    EXPECT_STRNE(key.note, "") << key.path;
    if (key.gate != nullptr) continue;
    Json other = key.slot == nullptr ? Json({{"enabled", true}}) : DefaultOf(key);
    if (other.is_boolean()) {
      other = !other.get<bool>();
    } else if (!key.choices.empty()) {
      other = key.choices.back() == "auto" ? Json::array({"x"}) : Json(key.choices.back());
      if (other == DefaultOf(key)) other = key.choices.front();
    } else if (key.max > 0) {
      other = key.min + 1 == DefaultOf(key) ? key.min + 2 : key.min + 1;
      if (other.get<double>() > key.max) other = key.max / 2;
    } else if (other.is_null()) {
      other = key.also == nullptr || Json::parse(key.also) == false;
    } else if (other.is_array()) {
      other = Json::array({"x"});
    }
    const absl::StatusOr<Config> config = Config::Parse(DocumentWith(key, other), 1);
    EXPECT_FALSE(config.ok()) << DocumentWith(key, other);
    if (!config.ok()) {
      EXPECT_THAT(std::string(config.status().message()), HasSubstr(key.path));
    }
    ++refused;
  }
  EXPECT_GT(refused, 40);
}

TEST(ConfigKeysTest, KeysAreThereOnceAndAliasesLeadToThem) {
  std::set<std::string> paths;
  for (const ConfigKey& key : ConfigKeys()) {
    EXPECT_TRUE(paths.insert(key.path).second) << key.path;
    EXPECT_FALSE(IsConfigBlock(key.path)) << key.path;
  }
  for (const ConfigAlias& alias : ConfigAliases()) {
    EXPECT_TRUE(paths.count(alias.target) == 1 || IsConfigBlock(alias.target)) << alias.target;
    EXPECT_EQ(paths.count(alias.path), 0u) << alias.path;
  }
}

TEST(ConfigKeysTest, UnknownKeysAtTheTop) {
  ParseOptions options;
  const char kText[] = R"({"train_batch_size": 1, "gradient_cliping": 1, "my_key": {"a": [1]}%s})";
  const auto parse = [&](const std::string& more) {
    std::string text = kText;
    text.replace(text.find("%s"), 2, more);
    return ParseConfig(text, options);
  };
  EXPECT_EQ(Problems(parse("")).size(), 2u);
  options.unknown_top_keys_are_warnings = true;
  const absl::StatusOr<ParsedConfig> lenient = parse("");
  ASSERT_TRUE(lenient.ok()) << lenient.status();
  EXPECT_THAT(lenient->warnings,
              testing::ElementsAre(
                  "gradient_cliping: is not a known key; did you mean \"gradient_clipping\"? It "
                  "has no effect",
                  HasSubstr("my_key: is not a known key")));
  EXPECT_EQ(Problems(parse(R"(, "zerod": {"strict": true})")).size(), 2u);
  EXPECT_EQ(Problems(parse(R"(, "zero_optimization": {"stge": 1})")).size(), 1u) << "not the top";
  options.unknown_top_keys_are_warnings = false;
  EXPECT_TRUE(parse(R"(, "zerod": {"strict": false})").ok());
}

TEST(ConfigKeysTest, SourcesOfValues) {
  ParseOptions options;
  options.world = 2;
  const absl::StatusOr<ParsedConfig> parsed = ParseConfig(R"({
      train_batch_size: 8, bfloat16: {enabled: true},
      optimizer: {type: "AdamW", params: {lr: 0.5}}, scheduler: {type: "WarmupLR"},
      zero_optimization: {stage: 3, max_live_parameters: 10, cpu_offload: true}})", options);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const auto kind = [&](const char* path) { return parsed->sources.at(path).kind; };
  EXPECT_EQ(kind("train_batch_size"), ValueSource::kFile);
  EXPECT_EQ(kind("train_micro_batch_size_per_gpu"), ValueSource::kDerived);
  EXPECT_EQ(kind("gradient_clipping"), ValueSource::kDefault);
  EXPECT_EQ(kind("bf16.enabled"), ValueSource::kDeprecated);
  EXPECT_EQ(kind("bf16.check_grad_overflow"), ValueSource::kDefault);
  EXPECT_EQ(parsed->sources.at("bf16.enabled").detail, "as bfloat16");
  EXPECT_EQ(kind("zero_optimization.stage3_max_live_parameters"), ValueSource::kFile);
  EXPECT_EQ(parsed->sources.at("zero_optimization.stage3_max_live_parameters").detail,
            "as zero_optimization.max_live_parameters");
  EXPECT_EQ(kind("zero_optimization.offload_optimizer.device"), ValueSource::kDeprecated);
  EXPECT_EQ(kind("scheduler.params.warmup_max_lr"), ValueSource::kDerived);
  EXPECT_EQ(parsed->config.scheduler.warmup_max_lr, std::nullopt);
  EXPECT_EQ(parsed->sources.at("scheduler.params.warmup_max_lr").detail, "each group's own rate");
  EXPECT_EQ(parsed->sources.count("optimizer.params.momentum"), 0u) << "not AdamW's";

  const std::string text = DescribeConfig(*parsed);
  EXPECT_THAT(text, HasSubstr("warning: bfloat16: is deprecated"));
  EXPECT_THAT(text, HasSubstr(" = 4  (derived: micro batch x accumulation steps x ranks)\n"));
  EXPECT_THAT(text, HasSubstr(" = 10  (file: as zero_optimization.max_live_parameters)\n"));
  const Json json = Json::parse(DescribeConfigAsJson(*parsed));
  EXPECT_EQ(json["config"]["train_micro_batch_size_per_gpu"], 4);
  EXPECT_EQ(json["sources"]["bf16.enabled"], "file, deprecated: as bfloat16");
  EXPECT_EQ(json["warnings"].size(), 2u);
}

// What people copy from DeepSpeed's documentation and from Hugging Face's.
TEST(ConfigKeysTest, FilesInTheWildLoad) {
  const char* const files[] = {
      R"({"stage": 2, "allgather_partitions": true, "allgather_bucket_size": 2e8,
          "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": 2e8,
          "contiguous_gradients": true, "round_robin_gradients": true,
          "offload_optimizer": {"device": "cpu", "pin_memory": true}})",
      R"({"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": true},
          "offload_param": {"device": "cpu", "pin_memory": true}, "overlap_comm": true,
          "contiguous_gradients": true, "sub_group_size": 1e9, "reduce_bucket_size": 5e8,
          "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5,
          "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
          "stage3_gather_16bit_weights_on_model_save": true})",
      R"({"stage": 3, "contiguous_gradients": true, "stage3_max_live_parameters": 2e10,
          "stage3_max_reuse_distance": 1e10, "stage3_prefetch_bucket_size": 1e7,
          "stage3_param_persistence_threshold": 1e5, "reduce_bucket_size": 1e7,
          "sub_group_size": 1e12, "elastic_checkpoint": true, "load_from_fp32_weights": true,
          "stage3_gather_fp16_weights_on_model_save": true, "ignore_unused_parameters": true})",
      R"({"stage": 1, "reduce_bucket_size": 5e8, "elastic_checkpoint": true,
          "cpu_offload": true, "cpu_offload_use_pin_memory": true})",
      R"({"stage": 3, "stage3_model_persistence_threshold": 1e6, "memory_efficient_linear": false,
          "stage3_module_granularity_threshold": 1e5, "override_module_apply": true,
          "leaf_module": {"classes": ["MixtralSparseMoeBlock"], "name_suffixes": "mlp"},
          "zero_hpz_partition_size": 1, "zero_quantized_weights": false})"};
  for (const char* const zero : files) {
    const auto parsed = Parse(absl::StrCat("\"zero_optimization\": ", zero), 8);
    EXPECT_TRUE(parsed.ok()) << zero << "\n" << parsed.status();
  }
}

TEST(ConfigKeysTest, UnusedParametersAreAnErrorAtTwoStages) {
  for (int stage : {0, 1, 2, 3}) {
    const auto parsed = Parse(absl::StrCat(
        R"("zero_optimization": {"ignore_unused_parameters": false, "stage": )", stage, "}"));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    const std::string text = DescribeConfig(*parsed);
    EXPECT_EQ(absl::StrContains(text, "no effect without zero_optimization.stage 1 or 2"),
              stage == 0 || stage == 3) << text;
  }
}

TEST(ConfigKeysTest, WhatHasNoEffectSaysWhy) {
  const absl::StatusOr<ParsedConfig> parsed =
      Parse(R"("zero_optimization": {"contiguous_gradients": true}, "fp16": {"hysteresis": 4})");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const std::string text = DescribeConfig(*parsed);
  EXPECT_THAT(text, HasSubstr("(file; no meaning here: gradients lie contiguous"));
  EXPECT_THAT(text, HasSubstr("= 4  (file; no effect without fp16.enabled with fp16.loss_scale "));
}

TEST(ConfigKeysTest, TheDocumentShowsTheTable) {
  std::ifstream in(ZEROD_CONFIG_DOC);
  ASSERT_TRUE(in.good()) << ZEROD_CONFIG_DOC;
  const std::string document((std::istreambuf_iterator<char>(in)), {});
  const size_t begin = document.find("| key | served |");
  ASSERT_NE(begin, std::string::npos);
  EXPECT_EQ(document.substr(begin), ConfigKeysAsMarkdown())
      << "run: zerodctl config-keys, and put what it prints at the end of docs/config.md";
}

}  // namespace
}  // namespace zerod
