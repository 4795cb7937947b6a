// SPDX-License-Identifier: Apache-2.0
//
// The table's keys at the top, of precision and of communication.
#include "base/config_keys.h"

namespace zerod {
namespace {

using C = Config;

// Small enough that the product of two and a world of 2^32 fits 128 bits.
constexpr double kBatchMax = 1099511627776.0;  // 2^40

const Gate* Bf16Gate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "bf16.enabled", {"bf16.enabled"}, [](const C& c) { return c.bf16; }};
  return &gate;
}

const Gate* Fp16Gate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "fp16.enabled", {"fp16.enabled"}, [](const C& c) { return c.fp16.enabled; }};
  return &gate;
}

const Gate* DynamicScaleGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "fp16.enabled with fp16.loss_scale 0", {"fp16.enabled", "fp16.loss_scale"},
      [](const C& c) { return c.fp16.enabled && c.fp16.loss_scale == 0; }};
  return &gate;
}

const Gate* AutocastGate() {
  static const Gate& gate = *new Gate{  // tidy: allow (never destroyed)
      "torch_autocast.enabled", {"torch_autocast.enabled"},
      [](const C& c) { return c.data_types.autocast; }};
  return &gate;
}

Words DataTypeNames() {
  return {"fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half"};
}

// The address of a member, as a function of the configuration.
#define SLOT(member) [](C& c) -> Slot { return &c.member; }

void AppendBatchKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> batch = {
      {.path = "train_batch_size",
       .note = "micro batch x accumulation steps x ranks; what is left out follows from the rest",
       .slot = SLOT(train_batch_size), .min = 1, .max = kBatchMax},
      {.path = "train_micro_batch_size_per_gpu", .note = "per rank, whatever the device",
       .slot = SLOT(micro_batch_size), .min = 1, .max = kBatchMax},
      {.path = "gradient_accumulation_steps", .note = "micro-steps per optimizer step",
       .slot = SLOT(gradient_accumulation_steps), .min = 1, .max = kBatchMax},
      {.path = "gradient_clipping",
       .note = "largest L2 norm of the mean gradient; 0 or less: none. 1.0 is DeepSpeed 0.19's "
               "default too",
       .slot = SLOT(gradient_clipping), .min = -kRealMax, .max = kRealMax},
  };
  keys->insert(keys->end(), batch.begin(), batch.end());
}

void AppendBf16Keys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> bf16 = {
      {.path = "bf16.enabled", .note = "bfloat16 parameters and gradients, fp32 master and moments",
       .slot = SLOT(bf16)},
      {.path = "bf16.immediate_grad_update", .served = Served::kNoMeaning,
       .note = "gradients are always handed over as they come, and kept in fp32",
       .slot = SLOT(bf16_options.immediate_grad_update), .gate = Bf16Gate()},
      {.path = "bf16.check_grad_overflow",
       .note = "a step whose gradients are not finite is skipped; at stage 3 always, as in "
               "DeepSpeed",
       .slot = SLOT(bf16_options.check_grad_overflow), .gate = Bf16Gate()},
      {.path = "bf16.bf16_master_weights_and_grads",
       .note = "there is no fp32 master: the bfloat16 weights are updated and rounded. Gradients "
               "are summed in fp32 all the same. Not with Lamb and Muon",
       .slot = SLOT(bf16_options.master_weights_and_grads), .gate = Bf16Gate()},
      {.path = "bf16.bf16_optimizer_states",
       .note = "the optimizer's state is kept in bfloat16; needs bf16_master_weights_and_grads. "
               "Not with Lamb and Muon",
       .slot = SLOT(bf16_options.optimizer_states), .gate = Bf16Gate()},
  };
  keys->insert(keys->end(), bf16.begin(), bf16.end());
}

void AppendFp16Keys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> fp16 = {
      {.path = "fp16.enabled",
       .note = "float16 parameters and gradients, fp32 master and moments, loss scaling",
       .slot = SLOT(fp16.enabled)},
      {.path = "fp16.auto_cast", .note = "floating-point inputs of the model are cast to float16",
       .slot = SLOT(fp16.auto_cast), .gate = Fp16Gate()},
      {.path = "fp16.loss_scale", .served = Served::kWorksBetter,
       .note = "0: dynamic. Gradients are divided by the scale that they were made with; DeepSpeed "
               "takes the new one on a step on which the scale grows",
       .slot = SLOT(fp16.loss_scale), .min = 0, .max = kRealMax, .gate = Fp16Gate()},
      {.path = "fp16.initial_scale_power", .note = "the first scale is 2 to this power",
       .slot = SLOT(fp16.initial_scale_power), .min = -126, .max = 127, .gate = DynamicScaleGate()},
      {.path = "fp16.loss_scale_window",
       .note = "steps without overflow after which the scale doubles",
       .slot = SLOT(fp16.loss_scale_window), .min = 1, .max = kCountMax,
       .gate = DynamicScaleGate()},
      // DeepSpeed takes 0 and then never lowers the scale: every step is skipped for ever.
      {.path = "fp16.hysteresis",
       .note = "the overflow of so many at which the scale is halved; 1 at stage 0, as in "
               "DeepSpeed",
       .slot = SLOT(fp16.hysteresis), .min = 1, .max = kCountMax, .gate = DynamicScaleGate()},
      {.path = "fp16.consecutive_hysteresis",
       .note = "any step without overflow restores the hysteresis",
       .slot = SLOT(fp16.consecutive_hysteresis), .gate = DynamicScaleGate()},
      {.path = "fp16.min_loss_scale",
       .note = "an overflow there fails step() on every rank, but at stage 0",
       .slot = SLOT(fp16.min_loss_scale), .min = 1, .max = kCountMax, .gate = DynamicScaleGate()},
      {.path = "fp16.fp16_master_weights_and_grads",
       .note = "there is no fp32 master: the float16 weights are updated and rounded. Gradients "
               "are summed in fp32 all the same. Not with Lamb and Muon",
       .slot = SLOT(fp16.master_weights_and_grads),
       .gate = Fp16Gate()},
  };
  keys->insert(keys->end(), fp16.begin(), fp16.end());
}

void AppendDataTypeKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> types = {
      {.path = "data_types.grad_accum_dtype", .served = Served::kWorksBetter,
       .note = "gradients are accumulated in fp32, whatever is asked for",
       .slot = SLOT(data_types.grad_accum_dtype), .choices = DataTypeNames(), .any_case = true,
       .torch_name = true},
      {.path = "data_types.param_dtype",
       .note = "must be what bf16.enabled and fp16.enabled say",
       .slot = SLOT(data_types.param_dtype), .choices = DataTypeNames(), .any_case = true,
       .torch_name = true},
      {.path = "data_types.buffer_dtype",
       .note = "what floating-point buffers become in initialize; null: they keep their type",
       .slot = SLOT(data_types.buffer_dtype),
       .choices = DataTypeNames(), .any_case = true,
       .torch_name = true},
      {.path = "data_types.keep_in_fp32_modules",
       .note = "of a job in 16 bits, buffers that are fp32 whatever else is said: a list of names, "
               "in which * stands for anything, found anywhere in a buffer's; auto: those that "
               "models of Transformers list themselves",
       .slot = SLOT(data_types.keep_in_fp32_modules), .choices = {"auto"}},
      {.path = "torch_autocast.enabled",
       .note = "the engine's forward runs in torch.autocast; parameters stay fp32",
       .slot = SLOT(data_types.autocast)},
      {.path = "torch_autocast.dtype", .note = "bfloat16, which is the default on CPUs",
       .slot = SLOT(data_types.autocast_dtype), .choices = {"bf16", "bfloat16"},
       .later = {"fp16", "float16", "half"}, .any_case = true, .torch_name = true,
       .gate = AutocastGate()},
      {.path = "torch_autocast.lower_precision_safe_modules", .served = Served::kNoMeaning,
       .note = "it lists whose gradients DeepSpeed sends in 16 bits; communication_data_type is "
               "for all",
       .slot = SLOT(data_types.lower_precision_safe_modules),
       .gate = AutocastGate()},
  };
  keys->insert(keys->end(), types.begin(), types.end());
}

void AppendCommunicationKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> communication = {
      {.path = "communication_data_type", .served = Served::kWorksBetter,
       .note = "of gradients between nodes; left out: the parameters' type. Sums are fp32's",
       .slot = SLOT(communication.data_type), .choices = {"fp32", "fp16", "bf16"},
       .any_case = true},
      {.path = "seq_parallel_communication_data_type", .served = Served::kNever,
       .note = "there is no sequence parallelism",
       .slot = SLOT(communication.seq_parallel_data_type),
       .choices = {"fp32", "fp16", "bf16"}, .any_case = true},
      {.path = "prescale_gradients", .served = Served::kNoMeaning,
       .note = "gradients are summed in fp32, where it does not matter when one divides",
       .slot = SLOT(communication.prescale_gradients)},
      {.path = "gradient_predivide_factor", .served = Served::kNoMeaning,
       .note = "gradients are summed in fp32, where it does not matter when one divides",
       .slot = SLOT(communication.gradient_predivide_factor), .min = 1e-30, .max = kRealMax},
      {.path = "gradient_allreduce_op", .served = Served::kWorksBetter,
       .note = "mean or sum over the ranks, at every stage",
       .slot = SLOT(communication.gradient_allreduce_op), .choices = {"mean", "sum"},
       .any_case = true},
      {.path = "managed_gradient_accumulation",
       .note = "false: every step() takes the optimizer's step",
       .slot = SLOT(communication.managed_gradient_accumulation)},
      {.path = "disable_allgather", .served = Served::kNoMeaning,
       .note = "shards go from their owner to those who want them, with no collective to disable",
       .slot = SLOT(communication.disable_allgather)},
  };
  keys->insert(keys->end(), communication.begin(), communication.end());
}

}  // namespace

void AppendTopKeys(std::vector<ConfigKey>* keys) {
  AppendBatchKeys(keys);
  AppendBf16Keys(keys);
  AppendFp16Keys(keys);
  AppendDataTypeKeys(keys);
  AppendCommunicationKeys(keys);
}

}  // namespace zerod
