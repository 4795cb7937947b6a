// SPDX-License-Identifier: Apache-2.0
//
// The job's configuration: DeepSpeed's JSON as typed, validated values. One parser for the daemon,
// the tools and (through the extension module) Python. base/config_parse.h has the parser with all
// that it can say; docs/config.md lists every key. Nothing is accepted and ignored: a key that has
// no effect yet must have its default.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace zerod {

enum class GradientPlanChoice { kAuto, kPerRank, kNodeSum };

// A learning rate, or a momentum: one for every parameter group, or one for each of them.
struct Rates {
  Rates() = default;
  Rates(double rate) : values{rate} {}  // NOLINT: a number is the usual case
  std::vector<double> values = {0.0};   // never empty; one where !per_group
  bool per_group = false;               // written as a list
  friend bool operator==(const Rates&, const Rates&) = default;
};

struct Config {
  // The batch triangle; after Parse all three are positive and
  // train_batch_size == micro_batch_size * gradient_accumulation_steps * world.
  uint64_t train_batch_size = 0;
  uint64_t micro_batch_size = 0;  // train_micro_batch_size_per_gpu
  uint64_t gradient_accumulation_steps = 0;

  // Maximum L2 norm; 0: none (Parse makes 0 of a negative one). DeepSpeed 0.19's default is 1.0.
  double gradient_clipping = 1.0;
  bool bf16 = false;               // bf16.enabled

  // The rest of the block "bf16".
  struct Bf16 {
    bool immediate_grad_update = false;
    bool check_grad_overflow = true;
    bool master_weights_and_grads = false;  // bf16_master_weights_and_grads
    bool optimizer_states = false;          // bf16_optimizer_states
    friend bool operator==(const Bf16&, const Bf16&) = default;
  } bf16_options;

  struct Fp16 {
    bool enabled = false;
    bool auto_cast = false;
    double loss_scale = 0;  // 0: dynamic
    int64_t initial_scale_power = 16;
    uint64_t loss_scale_window = 1000;
    uint64_t hysteresis = 2;
    bool consecutive_hysteresis = false;
    uint64_t min_loss_scale = 1;
    bool master_weights_and_grads = false;  // fp16_master_weights_and_grads
    friend bool operator==(const Fp16&, const Fp16&) = default;
  } fp16;

  // data_types and torch_autocast; "fp32", "fp16", "bf16", or nothing: the model's.
  struct DataTypes {
    std::optional<std::string> grad_accum_dtype;
    std::optional<std::string> param_dtype;
    std::optional<std::string> buffer_dtype;
    std::optional<std::vector<std::string>> keep_in_fp32_modules;  // nothing: "auto"
    bool autocast = false;  // torch_autocast.enabled
    std::optional<std::string> autocast_dtype;
    std::vector<std::string> lower_precision_safe_modules;
    friend bool operator==(const DataTypes&, const DataTypes&) = default;
  } data_types;

  // How gradients are summed, and in what type.
  struct Communication {
    std::optional<std::string> data_type;  // communication_data_type; nothing: the model's
    std::string seq_parallel_data_type = "fp32";
    bool prescale_gradients = false;
    double gradient_predivide_factor = 1.0;
    std::string gradient_allreduce_op = "mean";  // "mean" or "sum"
    bool managed_gradient_accumulation = true;
    bool disable_allgather = false;
    friend bool operator==(const Communication&, const Communication&) = default;
  } communication;

  struct OffloadOptimizer {
    std::string device = "none";  // "none", "cpu", "nvme"
    std::optional<std::string> nvme_path;
    uint64_t buffer_count = 4;
    bool pin_memory = true;
    bool pipeline_read = false;
    bool pipeline_write = false;
    bool fast_init = false;
    double ratio = 1.0;
    bool super_offload = false;
    double cpuadam_cores_perc = 0.8;
    friend bool operator==(const OffloadOptimizer&, const OffloadOptimizer&) = default;
  };

  struct OffloadParam {
    std::string device = "none";
    std::optional<std::string> nvme_path;
    uint64_t buffer_count = 5;
    uint64_t buffer_size = 100000000;
    uint64_t max_in_cpu = 1000000000;
    bool pin_memory = true;
    friend bool operator==(const OffloadParam&, const OffloadParam&) = default;
  };

  struct LeafModule {
    std::vector<std::string> classes = {
        "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock"};
    std::vector<std::string> names;
    std::vector<std::string> name_suffixes;
    friend bool operator==(const LeafModule&, const LeafModule&) = default;
  };

  struct ZeroOptimization {
    uint32_t stage = 0;                              // 0..3
    uint64_t max_live_parameters = 1000000000;       // stage3_max_live_parameters, elements
    uint64_t param_persistence_threshold = 100000;   // stage3_param_persistence_threshold, elements
    uint64_t prefetch_bucket_size = 50000000;        // stage3_prefetch_bucket_size, elements

    bool contiguous_gradients = true;
    bool reduce_scatter = true;
    uint64_t reduce_bucket_size = 500000000;  // elements
    bool use_multi_rank_bucket_allreduce = true;
    bool allgather_partitions = true;
    uint64_t allgather_bucket_size = 500000000;  // elements
    std::optional<bool> overlap_comm;            // nothing: at stage 3
    bool compute_grad_norm = true;
    bool load_from_fp32_weights = true;
    bool elastic_checkpoint = false;
    uint64_t sub_group_size = 1000000000;                         // elements
    uint64_t model_persistence_threshold = 9223372036854775807u;  // stage3_..., elements
    uint64_t max_reuse_distance = 1000000000;                     // stage3_..., elements
    bool gather_16bit_weights_on_model_save = false;              // stage3_...
    uint64_t module_granularity_threshold = 0;                    // stage3_...
    bool use_all_reduce_for_fetch_params = false;                 // stage3_...
    bool allgather_sequential = false;                            // stage3_...
    bool ignore_unused_parameters = true;
    bool round_robin_gradients = false;
    bool parameter_alignment = false;
    uint64_t hpz_partition_size = 1;  // zero_hpz_partition_size; 0 and 1: off
    bool quantized_weights = false;   // zero_quantized_...
    bool quantized_nontrainable_weights = false;
    bool quantized_gradients = false;
    bool memory_efficient_linear = true;
    bool pipeline_loading_checkpoint = false;
    bool override_module_apply = true;
    bool log_trace_cache_warnings = false;
    bool enable_sanity_checks = false;
    bool save_muon_momentum_buffer_in_memory = false;
    OffloadOptimizer offload_optimizer;
    OffloadParam offload_param;
    LeafModule leaf_module;
    friend bool operator==(const ZeroOptimization&, const ZeroOptimization&) = default;
  } zero;

  struct Optimizer {
    std::string type;  // one of optimizer.type's choices; empty: the caller passes one
    double lr = 1e-3;  // after Parse this and the next are the type's defaults where left out
    double beta1 = 0.9;
    double beta2 = 0.999;
    double eps = 1e-8;
    double weight_decay = 0;

    bool legacy_fusion = false;
    bool adam_w_mode = true;
    bool torch_adam = false;
    bool bias_correction = true;
    bool amsgrad = false;
    bool maximize = false;
    bool differentiable = false;
    bool capturable = false;
    bool set_grad_none = true;
    bool fp32_optimizer_states = true;
    std::optional<bool> foreach;
    std::optional<bool> fused;
    bool decoupled_weight_decay = false;    // NAdam, RAdam
    double lr_decay = 0;                    // Adagrad
    double initial_accumulator_value = 0;   // Adagrad
    double momentum = 0;                    // SGD, RMSprop; Muon: 0.95
    double dampening = 0;                   // SGD
    bool nesterov = false;                  // SGD
    bool eps_inside_sqrt = false;           // Lamb
    double max_coeff = 10;                  // Lamb
    double min_coeff = 0.01;                // Lamb
    std::optional<double> muon_lr;          // Muon
    std::optional<double> adam_lr;          // Muon
    std::string ns_method = "gram";         // Muon: "gram" or "standard"
    double alpha = 0.99;                    // RMSprop; ASGD: 0.75
    bool centered = false;                  // RMSprop
    double rho = 0.9;                       // Adadelta
    double momentum_decay = 4e-3;           // NAdam
    double lambd = 1e-4;                    // ASGD
    double t0 = 1e6;                        // ASGD
    double eta_minus = 0.5;                 // Rprop's etas
    double eta_plus = 1.2;
    double step_min = 1e-6;                 // Rprop's step_sizes
    double step_max = 50;
    friend bool operator==(const Optimizer&, const Optimizer&) = default;
  } optimizer;

  struct Scheduler {
    // One of DeepSpeed's five, a class of torch.optim.lr_scheduler, or empty: a constant rate.
    std::string type;
    Rates warmup_min_lr = 0.0;
    // Nothing: each group's own rate. After Parse a WarmupDecayLR has one: 0.001.
    std::optional<Rates> warmup_max_lr;
    uint64_t warmup_num_steps = 1000;
    std::string warmup_type = "log";  // "log" or "linear"

    int64_t last_batch_iteration = -1;
    std::optional<uint64_t> total_num_steps;  // WarmupDecayLR, WarmupCosineLR
    double warmup_min_ratio = 0;              // WarmupCosineLR
    double cos_min_ratio = 0.0001;            // WarmupCosineLR
    // OneCycle
    std::optional<Rates> cycle_min_lr;
    std::optional<Rates> cycle_max_lr;
    double decay_lr_rate = 0;
    uint64_t cycle_first_step_size = 2000;
    std::optional<uint64_t> cycle_second_step_size;  // nothing: as the first
    uint64_t cycle_first_stair_count = 0;
    std::optional<uint64_t> cycle_second_stair_count;  // nothing: as the first
    uint64_t decay_step_size = 0;
    bool cycle_momentum = true;
    Rates cycle_min_mom = 0.8;
    Rates cycle_max_mom = 0.9;
    double decay_mom_rate = 0;
    // LRRangeTest
    Rates lr_range_test_min_lr = 1e-3;
    uint64_t lr_range_test_step_size = 2000;
    double lr_range_test_step_rate = 1.0;
    bool lr_range_test_staircase = false;
    // Of PyTorch's classes: arguments of the constructor by name, as JSON text. What they mean is
    // PyTorch's to say.
    std::map<std::string, std::string> torch_params;
    friend bool operator==(const Scheduler&, const Scheduler&) = default;
  } scheduler;

  struct Aio {
    uint64_t block_size = 1048576;  // bytes
    uint64_t queue_depth = 8;
    uint64_t intra_op_parallelism = 1;
    bool single_submit = false;
    bool overlap_events = true;
    bool use_gds = false;
    friend bool operator==(const Aio&, const Aio&) = default;
  } aio;

  struct Checkpoint {
    std::string tag_validation = "Warn";  // "Warn", "Ignore", "Fail"
    bool load_universal = false;
    bool use_node_local_storage = false;
    bool parallel_write_pipeline_stage = false;  // parallel_write.pipeline_stage
    bool serialization = true;                   // checkpoint_serialization
    // checkpoint.writer; nothing: none
    std::optional<std::string> writer_type;  // "mock", "python", "FAST"
    uint64_t writer_io_buffer_size = 64 << 20;
    bool writer_io_buffer_double = true;
    bool writer_show_statistics = false;
    std::optional<std::string> writer_data_parallel;  // "replica", "socket", "machine"
    bool writer_decoupled = false;
    uint64_t writer_io_multiplier = 1;
    friend bool operator==(const Checkpoint&, const Checkpoint&) = default;
  } checkpoint;

  struct Monitor {  // tensorboard, csv_monitor
    bool enabled = false;
    std::string output_path;
    std::string job_name = "DeepSpeedJobName";
    friend bool operator==(const Monitor&, const Monitor&) = default;
  };
  struct Wandb {
    bool enabled = false;
    std::optional<std::string> group;
    std::optional<std::string> team;
    std::string project = "deepspeed";
    friend bool operator==(const Wandb&, const Wandb&) = default;
  };

  // What is logged and measured.
  struct Logging {
    std::optional<uint64_t> steps_per_print;  // nothing, and what Infinity becomes: never
    bool wall_clock_breakdown = false;
    bool memory_breakdown = false;
    bool dump_state = false;
    std::optional<std::string> log_level;
    bool throughput = true;               // timers.throughput.enabled
    bool throughput_synchronized = true;  // timers.throughput.synchronized
    Monitor tensorboard;
    Monitor csv_monitor;
    Wandb wandb;
    friend bool operator==(const Logging&, const Logging&) = default;
  } logging;

  struct Other {
    bool zero_allow_untested_optimizer = false;
    bool zero_force_ds_cpu_optimizer = true;
    bool dataloader_drop_last = false;
    bool disable_python_gc = false;
    std::optional<uint64_t> vocabulary_size;
    friend bool operator==(const Other&, const Other&) = default;
  } other;

  // The block "zerod": what DeepSpeed has no word for.
  struct Zerod {
    std::map<std::string, std::string> units;  // module path -> unit name ("zerod.units": a list of
                                               // module paths, or an object path -> unit name)
    GradientPlanChoice gradient_plan = GradientPlanChoice::kAuto;  // "auto", "per_rank", "node_sum"
    bool guard_pages = true;                   // released units fault loudly
    bool master_remainder = false;             // bf16: fp32 master as window + 16-bit remainder
    double step_timeout_seconds = 0;           // 0: none
    double attach_timeout_seconds = 600;       // how long a forming job waits for its ranks
    double linger_seconds = 600;               // how long state waits for trainers that died
    uint64_t window_bytes_max = 0;  // the window never grows beyond; 0: the whole layout's size
    uint64_t client_state_bytes_max = 8 << 20;  // bound on each client's state blob, 1..2^30
    uint64_t staging_bytes = 0;                 // node_sum, per client; 0: JobPlan decides
    std::string job;  // job id, [A-Za-z0-9._-]{1,128}; empty: ZEROD_JOB and so on
    std::string unused_parameters = "torch";   // "torch": not updated; "zero": DeepSpeed's
    std::optional<std::string> restart;  // "replay", "continue"; nothing: as the door says
    std::optional<bool> strict;  // unknown keys at the top are errors; nothing: as the door says

    friend bool operator==(const Zerod&, const Zerod&) = default;
  } zerod;

  friend bool operator==(const Config&, const Config&) = default;

  // ParseConfig (base/config_parse.h) with the default options, for a job of `world` ranks, less
  // what it says beside the configuration.
  static absl::StatusOr<Config> Parse(absl::string_view json, uint32_t world);

  // Every key that has a value here, as JSON text with sorted keys: equal configurations give
  // equal texts, and Parse of it for the same world gives this configuration back. "optimizer" and
  // "scheduler" are null where their type is empty, and without keys of other types.
  std::string ToJson() const;
};

// The element of `known` with the smallest edit distance to `word` (the first of equals), or empty
// where none is near enough (distance > 1/2 of the word's length) to be what the user meant.
std::string NearestWord(absl::string_view word, const std::vector<std::string>& known);

}  // namespace zerod
