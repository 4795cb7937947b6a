// SPDX-License-Identifier: Apache-2.0
//
// The table's keys of files, checkpoints and logs, zerod's own, and what is not served at all.
#include "base/config_keys.h"

namespace zerod {
namespace {

using C = Config;

constexpr double kSecondsMax = 1e9;  // as nanoseconds it fits 63 bits

const Gate* NvmeGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "a device that is nvme",
      {"zero_optimization.offload_param.device", "zero_optimization.offload_optimizer.device"},
      [](const C& c) {
        return c.zero.offload_param.device == "nvme" || c.zero.offload_optimizer.device == "nvme";
      }};
  return &gate;
}

const Gate* WriterGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "checkpoint.writer.type", {"checkpoint.writer.type"},
      [](const C& c) { return c.checkpoint.writer_type.has_value(); }};
  return &gate;
}

const Gate* TensorboardGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "tensorboard.enabled", {"tensorboard.enabled"},
      [](const C& c) { return c.logging.tensorboard.enabled; }};
  return &gate;
}

const Gate* CsvGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "csv_monitor.enabled", {"csv_monitor.enabled"},
      [](const C& c) { return c.logging.csv_monitor.enabled; }};
  return &gate;
}

const Gate* WandbGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "wandb.enabled", {"wandb.enabled"}, [](const C& c) { return c.logging.wandb.enabled; }};
  return &gate;
}

#define SLOT(member) [](C& c) -> Slot { return &c.member; }

void AppendAioKeys(std::vector<ConfigKey>* keys) {
  const auto aio = [keys](ConfigKey key) {
    key.served = Served::kNotYet;
    key.note = "state on NVMe comes later";
    key.gate = NvmeGate();
    key.max = kCountMax;
    keys->push_back(std::move(key));
  };
  aio({.path = "aio.block_size", .slot = SLOT(aio.block_size), .min = 4096});
  aio({.path = "aio.queue_depth", .slot = SLOT(aio.queue_depth), .min = 1});
  aio({.path = "aio.intra_op_parallelism", .slot = SLOT(aio.intra_op_parallelism), .min = 1});
  aio({.path = "aio.single_submit", .slot = SLOT(aio.single_submit)});
  aio({.path = "aio.overlap_events", .slot = SLOT(aio.overlap_events)});
  aio({.path = "aio.use_gds", .slot = SLOT(aio.use_gds)});
}

void AppendCheckpointKeys(std::vector<ConfigKey>* keys) {
  const auto checkpoint = [keys](ConfigKey key) {
    if (key.served == Served::kWorks) key.served = Served::kNoMeaning;
    keys->push_back(std::move(key));
  };
  checkpoint({.path = "checkpoint.tag_validation",
              .note = "ranks that give different tags are refused always",
              .slot = SLOT(checkpoint.tag_validation), .choices = {"Warn", "Ignore", "Fail"},
              .any_case = true});
  checkpoint({.path = "checkpoint.load_universal",
              .note = "every checkpoint loads at any stage and on any number of ranks",
              .slot = SLOT(checkpoint.load_universal)});
  checkpoint({.path = "checkpoint.use_node_local_storage", .served = Served::kNotYet,
              .note = "the nodes write into one folder that they share",
              .slot = SLOT(checkpoint.use_node_local_storage)});
  checkpoint({.path = "checkpoint.parallel_write.pipeline_stage",
              .note = "every node writes its part always",
              .slot = SLOT(checkpoint.parallel_write_pipeline_stage)});
  checkpoint({.path = "checkpoint.checkpoint_serialization",
              .note = "files are safetensors: docs/formats/checkpoint.md",
              .slot = SLOT(checkpoint.serialization)});
  const char* const writer = "there is one writer";
  checkpoint({.path = "checkpoint.writer.type", .note = writer,
              .slot = SLOT(checkpoint.writer_type), .choices = {"mock", "python", "FAST"}});
  checkpoint({.path = "checkpoint.writer.io_buffer_size", .note = writer,
              .slot = SLOT(checkpoint.writer_io_buffer_size), .min = 1, .max = kCountMax,
              .gate = WriterGate()});
  checkpoint({.path = "checkpoint.writer.io_buffer_double", .note = writer,
              .slot = SLOT(checkpoint.writer_io_buffer_double), .gate = WriterGate()});
  checkpoint({.path = "checkpoint.writer.show_statistics", .note = writer,
              .slot = SLOT(checkpoint.writer_show_statistics), .gate = WriterGate()});
  checkpoint({.path = "checkpoint.writer.data_parallel", .note = writer,
              .slot = SLOT(checkpoint.writer_data_parallel),
              .choices = {"replica", "socket", "machine"}, .gate = WriterGate()});
  checkpoint({.path = "checkpoint.writer.decoupled", .note = writer,
              .slot = SLOT(checkpoint.writer_decoupled), .gate = WriterGate()});
  checkpoint({.path = "checkpoint.writer.io_multiplier", .note = writer,
              .slot = SLOT(checkpoint.writer_io_multiplier), .min = 1, .max = kCountMax,
              .gate = WriterGate()});
  checkpoint({.path = "datastates_ckpt", .served = Served::kNotYet,
              .note = "snapshots behind the training come later"});
}

void AppendLogKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> logs = {
      {.path = "steps_per_print",
       .note = "rank 0 logs step, skipped steps, rates and momenta every so many steps, through "
               "Python's logger \"zerod\"; null and Infinity: never",
       .slot = SLOT(logging.steps_per_print), .min = 1, .max = kCountMax, .or_never = true},
      {.path = "wall_clock_breakdown",
       .note = "the mean times of forward, backward and step beside it; where steps_per_print is "
               "null, of every step",
       .slot = SLOT(logging.wall_clock_breakdown)},
      {.path = "memory_breakdown",
       .note = "the memory of rank 0 and of its node beside it, and after initialize",
       .slot = SLOT(logging.memory_breakdown)},
      {.path = "dump_state", .note = "rank 0 logs the job's plan and configuration in initialize",
       .slot = SLOT(logging.dump_state)},
      {.path = "log_level", .note = "of Python's logger \"zerod\", on every rank",
       .slot = SLOT(logging.log_level),
       .choices = {"debug", "info", "warning", "error", "critical"}, .any_case = true},
      {.path = "timers.throughput.enabled",
       .note = "samples per second beside steps_per_print; the daemon's metrics count steps and "
               "their time always",
       .slot = SLOT(logging.throughput)},
      {.path = "timers.throughput.synchronized", .served = Served::kNoMeaning,
       .note = "step() returns when the step is done: there is no device to wait for",
       .slot = SLOT(logging.throughput_synchronized)},
      {.path = "flops_profiler", .served = Served::kNotYet,
       .note = "PyTorch's profiler counts operations; off is served"},
      {.path = "comms_logger", .served = Served::kNotYet,
       .note = "the daemon's metrics count the bytes; off is served"},
  };
  keys->insert(keys->end(), logs.begin(), logs.end());
}

void AppendMonitorKeys(std::vector<ConfigKey>* keys) {
  static constexpr char kNamed[] = "a folder of this name in output_path";
  const std::vector<ConfigKey> monitors = {
      {.path = "tensorboard.enabled",
       .note = "rank 0 writes loss, rate and, with wall_clock_breakdown, times of every step, by "
               "samples. Needs the package tensorboard",
       .slot = SLOT(logging.tensorboard.enabled)},
      {.path = "tensorboard.output_path", .note = "empty: the working directory",
       .slot = SLOT(logging.tensorboard.output_path), .form = TextForm::kText,
       .gate = TensorboardGate()},
      {.path = "tensorboard.job_name", .note = kNamed,
       .slot = SLOT(logging.tensorboard.job_name), .form = TextForm::kText,
       .gate = TensorboardGate()},
      {.path = "csv_monitor.enabled", .note = "the same values, a file for each",
       .slot = SLOT(logging.csv_monitor.enabled)},
      {.path = "csv_monitor.output_path", .note = "empty: the working directory",
       .slot = SLOT(logging.csv_monitor.output_path), .form = TextForm::kText, .gate = CsvGate()},
      {.path = "csv_monitor.job_name", .note = kNamed, .slot = SLOT(logging.csv_monitor.job_name),
       .form = TextForm::kText, .gate = CsvGate()},
      {.path = "wandb.enabled", .note = "the same values. Needs the package wandb",
       .slot = SLOT(logging.wandb.enabled)},
      {.path = "wandb.group", .slot = SLOT(logging.wandb.group), .form = TextForm::kText,
       .gate = WandbGate()},
      {.path = "wandb.team", .slot = SLOT(logging.wandb.team), .form = TextForm::kText,
       .gate = WandbGate()},
      {.path = "wandb.project", .slot = SLOT(logging.wandb.project), .form = TextForm::kText,
       .gate = WandbGate()},
      {.path = "comet", .served = Served::kNotYet,
       .note = "csv_monitor, tensorboard and wandb are"},
  };
  keys->insert(keys->end(), monitors.begin(), monitors.end());
}

void AppendLoaderKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> other = {
      {.path = "zero_allow_untested_optimizer", .served = Served::kNoMeaning,
       .note = "an optimizer is served or refused by its name",
       .slot = SLOT(other.zero_allow_untested_optimizer)},
      {.path = "zero_force_ds_cpu_optimizer", .served = Served::kNoMeaning,
       .note = "the daemon's kernels always take the step",
       .slot = SLOT(other.zero_force_ds_cpu_optimizer)},
      {.path = "dataloader_drop_last",
       .note = "of the loader of training_data: false hands out the smaller last batch too, and "
               "some elements twice, so that all ranks have the same number",
       .slot = SLOT(other.dataloader_drop_last)},
      {.path = "disable_python_gc",
       .note = "Python's cyclic garbage collector is off until the engine is destroyed",
       .slot = SLOT(other.disable_python_gc)},
      {.path = "vocabulary_size", .served = Served::kNoMeaning,
       .note = "DeepSpeed only warns where it is no multiple of 8",
       .slot = SLOT(other.vocabulary_size), .min = 1, .max = kCountMax},
  };
  keys->insert(keys->end(), other.begin(), other.end());
}

void AppendZerodKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> zerod = {
      {.path = "zerod.units",
       .note = "modules that are gathered as one: a list of paths, or an object path to unit name",
       .slot = SLOT(zerod.units)},
      {.path = "zerod.gradient_plan", .note = "docs/step.md", .slot = SLOT(zerod.gradient_plan),
       .choices = {"auto", "per_rank", "node_sum"}},
      {.path = "zerod.guard_pages", .note = "released units fault loudly",
       .slot = SLOT(zerod.guard_pages)},
      {.path = "zerod.master_remainder", .served = Served::kNotYet,
       .note = "the master copy is whole", .slot = SLOT(zerod.master_remainder)},
      {.path = "zerod.step_timeout_seconds",
       .note = "from a step's first step() to its end, and of a wait for room in the gradient "
               "staging memory; 0: none",
       .slot = SLOT(zerod.step_timeout_seconds), .min = 0, .max = kSecondsMax},
      {.path = "zerod.attach_timeout_seconds", .note = "how long a forming job waits for its ranks",
       .slot = SLOT(zerod.attach_timeout_seconds), .min = 0.001, .max = kSecondsMax},
      {.path = "zerod.linger_seconds", .note = "how long state waits for trainers that died",
       .slot = SLOT(zerod.linger_seconds), .min = 0, .max = kSecondsMax},
      {.path = "zerod.window_bytes_max", .note = "the window never grows beyond; 0: no bound",
       .slot = SLOT(zerod.window_bytes_max), .min = 0, .max = kCountMax},
      {.path = "zerod.client_state_bytes_max", .note = "bound on each rank's own state",
       .slot = SLOT(zerod.client_state_bytes_max), .min = 1, .max = 1 << 30},
      {.path = "zerod.staging_bytes", .note = "node_sum, per rank; 0: 64 MiB or less",
       .slot = SLOT(zerod.staging_bytes), .min = 0, .max = kCountMax},
      {.path = "zerod.job", .note = "the job's id; empty: ZEROD_JOB, or the launcher's",
       .slot = SLOT(zerod.job), .form = TextForm::kJob},
      {.path = "zerod.unused_parameters",
       .note = "without a gradient on any rank. torch: not updated; zero: as with a gradient of 0",
       .slot = SLOT(zerod.unused_parameters), .choices = {"torch", "zero"}},
      {.path = "zerod.restart",
       .note = "a job that is there already. replay: the script is let run up to where it stands; "
               "continue: it asks engine.resumed_step. null: replay for scripts that were written "
               "for DeepSpeed",
       .slot = SLOT(zerod.restart), .choices = {"replay", "continue"}},
      {.path = "zerod.strict",
       .note = "whether unknown keys at the top are errors; null: unless the file came through a "
               "door made for DeepSpeed's",
       .slot = SLOT(zerod.strict)},
  };
  keys->insert(keys->end(), zerod.begin(), zerod.end());
}

void AppendNeverKeys(std::vector<ConfigKey>* keys) {
  static constexpr char kGone[] = "it was removed from DeepSpeed";
  const std::pair<const char*, const char*> never[] = {
      {"pipeline", "there is no pipeline parallelism"},
      {"expert_parallel", "there is no expert parallelism"},
      {"use_data_before_expert_parallelism", "there is no expert parallelism"},
      {"activation_checkpointing", "torch.utils.checkpoint works"},
      {"hybrid_engine", "it is for generation within training"},
      {"compile", "torch.compile works; DeepCompile's passes rewrite DeepSpeed's own hooks"},
      {"data_efficiency", "the data are the script's"},
      {"autotuning", "nothing here launches trial runs"},
      {"weight_quantization", "parameters are not quantized"},
      {"amp", "it was removed from DeepSpeed; use bf16"},
      {"elasticity", kGone},
      {"sparse_gradients", kGone},
      {"sparse_attention", kGone},
      {"nebula", kGone},
      {"compression_training", kGone},
      {"quantize_training", kGone},
      {"eigenvalue", kGone},
      {"graph_harvesting", kGone},
      {"curriculum_learning", kGone},
      {"progressive_layer_drop", kGone},
  };
  for (const auto& [path, note] : never) {
    keys->push_back({.path = path, .served = Served::kNever, .note = note});
  }
  // What launchers write into every file, for a group of one.
  keys->push_back({.path = "tensor_parallel", .served = Served::kNever,
                   .note = "there is no tensor parallelism", .size = "autotp_size"});
  keys->push_back({.path = "sequence_parallel_size", .served = Served::kNever,
                   .note = "there is no sequence parallelism", .also = "1"});
}

}  // namespace

void AppendOtherKeys(std::vector<ConfigKey>* keys) {
  AppendAioKeys(keys);
  AppendCheckpointKeys(keys);
  AppendLogKeys(keys);
  AppendMonitorKeys(keys);
  AppendLoaderKeys(keys);
  AppendZerodKeys(keys);
  AppendNeverKeys(keys);
}

const std::vector<ConfigAlias>& ConfigAliases() {
  static const auto& aliases = *new std::vector<ConfigAlias>{  // tidy: allow (never destroyed)
      {"bfloat16", "bf16", true, nullptr},
      {"bf16.check_overflow", "bf16.check_grad_overflow", true, nullptr},
      {"zero_optimization.cpu_offload", "zero_optimization.offload_optimizer.device", true,
       "\"cpu\""},
      {"zero_optimization.cpu_offload_param", "zero_optimization.offload_param.device", true,
       "\"cpu\""},
      {"zero_optimization.cpu_offload_use_pin_memory",
       "zero_optimization.offload_optimizer.pin_memory", true, nullptr},
      {"zero_optimization.stage3_gather_fp16_weights_on_model_save",
       "zero_optimization.stage3_gather_16bit_weights_on_model_save", true, nullptr},
      {"aio.thread_count", "aio.intra_op_parallelism", true, nullptr},
      {"zero_optimization.prefetch_bucket_size", "zero_optimization.stage3_prefetch_bucket_size",
       false, nullptr},
      {"zero_optimization.param_persistence_threshold",
       "zero_optimization.stage3_param_persistence_threshold", false, nullptr},
      {"zero_optimization.model_persistence_threshold",
       "zero_optimization.stage3_model_persistence_threshold", false, nullptr},
      {"zero_optimization.max_live_parameters", "zero_optimization.stage3_max_live_parameters",
       false, nullptr},
      {"zero_optimization.max_reuse_distance", "zero_optimization.stage3_max_reuse_distance", false,
       nullptr},
      {"zero_optimization.gather_16bit_weights_on_model_save",
       "zero_optimization.stage3_gather_16bit_weights_on_model_save", false, nullptr},
      {"zero_optimization.module_granularity_threshold",
       "zero_optimization.stage3_module_granularity_threshold", false, nullptr},
      {"zero_optimization.use_all_reduce_for_fetch_params",
       "zero_optimization.stage3_use_all_reduce_for_fetch_params", false, nullptr},
      {"zero_optimization.allgather_sequential", "zero_optimization.stage3_allgather_sequential",
       false, nullptr},
  };
  return aliases;
}

}  // namespace zerod
