// SPDX-License-Identifier: Apache-2.0
//
// The table's keys of "optimizer" and "scheduler".
#include "base/config_keys.h"

namespace zerod {
namespace {

using C = Config;

constexpr char kTakesFunction[] =
    "it takes a function, which no file can hold; pass the scheduler itself as lr_scheduler=";
constexpr char kTakesSchedulers[] =
    "it takes other schedulers, which no file can hold; pass it itself as lr_scheduler=";

const Words& Adams() {
  static const Words& types = *new Words{"AdamW", "Adam"};  // tidy: allow (never destroyed)
  return types;
}

// Served as torch.optim has them.
const Words& OthersOfTorch() {
  static const Words& types = *new Words{  // tidy: allow (never destroyed)
      "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"};
  return types;
}

Words With(Words types, const Words& more) {
  types.insert(types.end(), more.begin(), more.end());
  return types;
}

#define SLOT(member) [](C& c) -> Slot { return &c.member; }

void AppendAdamKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> adam = {
      {.path = "optimizer.type",
       .note = "or leave out \"optimizer\" and pass one of torch.optim. Adam is AdamW unless "
               "adam_w_mode is false",
       .slot = SLOT(optimizer.type),
       .choices = With({"AdamW", "Adam", "Lion", "Adagrad", "SGD", "Lamb", "Muon"},
                       OthersOfTorch()),
       .later = {"MuAdam", "MuAdamW", "MuSGD"},
       .any_case = true},
      {.path = "optimizer.legacy_fusion", .served = Served::kNoMeaning,
       .note = "it chooses among DeepSpeed's fp16 wrappers", .slot = SLOT(optimizer.legacy_fusion)},
      {.path = "optimizer.params.lr", .slot = SLOT(optimizer.lr), .min = 0, .max = kRealMax},
      {.path = "optimizer.params.betas",
       .slot = [](C& c) -> Slot { return Betas(&c.optimizer.beta1, &c.optimizer.beta2); },
       .min = 0, .max = 1, .max_excluded = true,
       .types = With(Adams(), {"Lion", "Lamb", "Muon", "Adamax", "NAdam", "RAdam"})},
      {.path = "optimizer.params.eps",
       .note = "outside of the square root, but for Adadelta, and Lamb with eps_inside_sqrt",
       .slot = SLOT(optimizer.eps), .min = 0, .max = kRealMax,
       .types = With(Adams(), {"Lamb", "Adagrad", "Muon", "RMSprop", "Adadelta", "Adamax", "NAdam",
                               "RAdam"})},
      {.path = "optimizer.params.weight_decay",
       .note = "0.01 for AdamW with torch_adam, which is torch's default",
       .slot = SLOT(optimizer.weight_decay), .min = 0, .max = kRealMax,
       .types = With(Adams(), {"Lion", "Adagrad", "SGD", "Lamb", "Muon", "RMSprop", "Adadelta",
                               "Adamax", "NAdam", "RAdam", "ASGD"})},
      {.path = "optimizer.params.adam_w_mode",
       .note = "of Adam: decoupled weight decay, else L2 regularization. AdamW's is always "
               "decoupled",
       .slot = SLOT(optimizer.adam_w_mode), .types = Adams()},
      {.path = "optimizer.params.bias_correction", .slot = SLOT(optimizer.bias_correction),
       .types = With(Adams(), {"Lamb"})},
      {.path = "optimizer.params.torch_adam", .served = Served::kNoMeaning,
       .note = "the daemon's kernel computes what torch's does; weight_decay's default is torch's",
       .slot = SLOT(optimizer.torch_adam), .types = Adams()},
      {.path = "optimizer.params.foreach", .served = Served::kNoMeaning,
       .note = "it chooses among implementations of the same arithmetic",
       .slot = SLOT(optimizer.foreach),
       .types = With(With(Adams(), {"Adagrad", "SGD"}), OthersOfTorch())},
      {.path = "optimizer.params.fused", .served = Served::kNoMeaning,
       .note = "it chooses among implementations of the same arithmetic",
       .slot = SLOT(optimizer.fused), .types = With(Adams(), {"Adagrad", "SGD"})},
      {.path = "optimizer.params.set_grad_none", .served = Served::kNoMeaning,
       .note = "gradients are handed over, so .grad is None always",
       .slot = SLOT(optimizer.set_grad_none), .types = With(Adams(), {"Lion"})},
      {.path = "optimizer.params.capturable", .served = Served::kNoMeaning,
       .note = "it is for CUDA graphs", .slot = SLOT(optimizer.capturable),
       .types = With(Adams(), OthersOfTorch())},
      {.path = "optimizer.params.fp32_optimizer_states",
       .note = "false: in a 16-bit job the state is kept in the parameters' type",
       .slot = SLOT(optimizer.fp32_optimizer_states),
       .types = With(Adams(), {"Lion", "Adagrad"})},
      {.path = "optimizer.params.amsgrad", .served = Served::kNever,
       .note = "DeepSpeed refuses it too", .slot = SLOT(optimizer.amsgrad), .types = Adams()},
      {.path = "optimizer.params.maximize", .served = Served::kNever,
       .note = "change the sign of the loss", .slot = SLOT(optimizer.maximize),
       .types = With(With(Adams(), {"Adagrad", "SGD"}), OthersOfTorch())},
      {.path = "optimizer.params.differentiable", .served = Served::kNever,
       .note = "the step is the daemon's, where autograd does not see it",
       .slot = SLOT(optimizer.differentiable),
       .types = With(With(Adams(), {"Adagrad", "SGD"}), OthersOfTorch())},
      {.path = "optimizer.params.max_grad_norm", .served = Served::kNever,
       .note = "gradient_clipping is what clips"},
  };
  keys->insert(keys->end(), adam.begin(), adam.end());
}

void AppendOtherOptimizerKeys(std::vector<ConfigKey>* keys) {
  const auto serve = [keys](ConfigKey key) { keys->push_back(std::move(key)); };
  serve({.path = "optimizer.params.lr_decay", .slot = SLOT(optimizer.lr_decay), .min = 0,
         .max = kRealMax, .types = {"Adagrad"}});
  serve({.path = "optimizer.params.initial_accumulator_value",
         .slot = SLOT(optimizer.initial_accumulator_value), .min = 0, .max = kRealMax,
         .types = {"Adagrad"}});
  serve({.path = "optimizer.params.momentum", .slot = SLOT(optimizer.momentum), .min = 0, .max = 1,
         .types = {"SGD", "Muon", "RMSprop"}});
  serve({.path = "optimizer.params.dampening", .slot = SLOT(optimizer.dampening), .min = 0,
         .max = 1, .types = {"SGD"}});
  serve({.path = "optimizer.params.nesterov", .slot = SLOT(optimizer.nesterov),
         .types = {"SGD"}});
  serve({.path = "optimizer.params.eps_inside_sqrt", .slot = SLOT(optimizer.eps_inside_sqrt),
         .types = {"Lamb"}});
  serve({.path = "optimizer.params.max_coeff",
         .note = "of the ratio of a parameter's norm to its update's; both of whole parameters at "
                 "every stage",
         .slot = SLOT(optimizer.max_coeff), .min = 0, .max = kRealMax, .types = {"Lamb"}});
  serve({.path = "optimizer.params.min_coeff", .note = "of the same ratio",
         .slot = SLOT(optimizer.min_coeff), .min = 0, .max = kRealMax, .types = {"Lamb"}});
  serve({.path = "optimizer.params.muon_lr",
         .note = "of what has two dimensions or more and no \"embed\" or \"lm_head\" in its name, "
                 "or as each parameter's use_muon says; left out: lr, else 0.02",
         .slot = SLOT(optimizer.muon_lr), .min = 0,
         .max = kRealMax, .types = {"Muon"}});
  serve({.path = "optimizer.params.adam_lr",
         .note = "of the other parameters, which AdamW updates; left out: lr, else 0.0003",
         .slot = SLOT(optimizer.adam_lr), .min = 0,
         .max = kRealMax, .types = {"Muon"}});
  serve({.path = "optimizer.params.ns_method",
         .note = "in fp32, of whole matrices at every stage: a matrix is kept by one node",
         .slot = SLOT(optimizer.ns_method),
         .choices = {"gram", "standard"}, .types = {"Muon"}});
}

void AppendTorchOptimizerKeys(std::vector<ConfigKey>* keys) {
  const std::vector<ConfigKey> own = {
      {.path = "optimizer.params.alpha",
       .note = "of RMSprop the share of the squares' average that stays, of ASGD the power of the "
               "rate's decay, 0.75 by default",
       .slot = SLOT(optimizer.alpha), .min = 0, .max = kRealMax, .types = {"RMSprop", "ASGD"}},
      {.path = "optimizer.params.centered", .slot = SLOT(optimizer.centered),
       .types = {"RMSprop"}},
      {.path = "optimizer.params.rho", .slot = SLOT(optimizer.rho), .min = 0, .max = 1,
       .types = {"Adadelta"}},
      {.path = "optimizer.params.momentum_decay", .slot = SLOT(optimizer.momentum_decay), .min = 0,
       .max = kRealMax, .types = {"NAdam"}},
      {.path = "optimizer.params.decoupled_weight_decay",
       .slot = SLOT(optimizer.decoupled_weight_decay), .types = {"NAdam", "RAdam"}},
      {.path = "optimizer.params.lambd", .note = "of the decay of weights and rate",
       .slot = SLOT(optimizer.lambd), .min = 0, .max = kRealMax, .types = {"ASGD"}},
      {.path = "optimizer.params.t0", .note = "weights are averaged from this step on",
       .slot = SLOT(optimizer.t0), .min = 0, .max = kRealMax, .types = {"ASGD"}},
      {.path = "optimizer.params.etas",
       .note = "of a step that turns back, and of one that does not",
       .slot = [](C& c) -> Slot { return Betas(&c.optimizer.eta_minus, &c.optimizer.eta_plus); },
       .min = 0, .max = kRealMax, .types = {"Rprop"}},
      {.path = "optimizer.params.step_sizes", .note = "the smallest and the largest",
       .slot = [](C& c) -> Slot { return Betas(&c.optimizer.step_min, &c.optimizer.step_max); },
       .min = 0, .max = kRealMax, .types = {"Rprop"}},
  };
  keys->insert(keys->end(), own.begin(), own.end());
}

void AppendWarmupKeys(std::vector<ConfigKey>* keys) {
  const Words decays = {"WarmupDecayLR", "WarmupCosineLR"};
  const Words rates = {"WarmupLR", "WarmupDecayLR"};
  const Words warmups = With({"WarmupLR"}, decays);
  const std::vector<ConfigKey> warmup = {
      {.path = "scheduler.type",
       .note = "DeepSpeed's five, and PyTorch's with its own arguments as params. Leave out "
               "\"scheduler\" for a constant rate, or to pass one",
       .slot = SLOT(scheduler.type), .choices = With(DeepSpeedSchedulers(), TorchSchedulers()),
       .refused = {{"LambdaLR", kTakesFunction},
                   {"MultiplicativeLR", kTakesFunction},
                   {"ReduceLROnPlateau",
                    "its step() takes a metric; pass the scheduler itself as lr_scheduler=, and "
                    "the metric as engine.step(lr_kwargs={\"metrics\": value})"},
                   {"SequentialLR", kTakesSchedulers},
                   {"ChainedScheduler", kTakesSchedulers}}},
      {.path = "scheduler.params.warmup_min_lr", .slot = SLOT(scheduler.warmup_min_lr), .min = 0,
       .max = kRealMax, .types = rates},
      {.path = "scheduler.params.warmup_max_lr",
       .note = "left out: of WarmupLR each group's own rate, of WarmupDecayLR 0.001",
       .slot = SLOT(scheduler.warmup_max_lr), .min = 0, .max = kRealMax, .types = rates},
      {.path = "scheduler.params.warmup_num_steps", .note = "0 and 1 count as 2",
       .slot = SLOT(scheduler.warmup_num_steps), .min = 0, .max = kCountMax, .types = warmups},
      {.path = "scheduler.params.warmup_type", .slot = SLOT(scheduler.warmup_type),
       .choices = {"log", "linear"}, .types = warmups},
      {.path = "scheduler.params.last_batch_iteration",
       .note = "the schedule goes on after so many steps, less one; as in DeepSpeed the first step "
               "still has the optimizer's own rate. A job's state brings back where it was without "
               "this",
       .slot = SLOT(scheduler.last_batch_iteration), .min = -1, .max = kCountMax,
       .types = DeepSpeedSchedulers()},
      {.path = "scheduler.params.total_num_steps", .note = "must be given",
       .slot = SLOT(scheduler.total_num_steps), .min = 1, .max = kCountMax, .types = decays},
      {.path = "scheduler.params.warmup_min_ratio", .note = "of each group's own rate",
       .slot = SLOT(scheduler.warmup_min_ratio), .min = 0, .max = 1, .types = {"WarmupCosineLR"}},
      {.path = "scheduler.params.cos_min_ratio", .note = "of each group's own rate",
       .slot = SLOT(scheduler.cos_min_ratio), .min = 0, .max = 1, .types = {"WarmupCosineLR"}},
  };
  keys->insert(keys->end(), warmup.begin(), warmup.end());
}

void AppendCycleKeys(std::vector<ConfigKey>* keys) {
  const auto of = [keys](const char* type, ConfigKey key) {
    key.types = {type};
    keys->push_back(std::move(key));
  };
  const char* const one = "OneCycle";
  of(one, {.path = "scheduler.params.cycle_min_lr", .note = "must be given",
           .slot = SLOT(scheduler.cycle_min_lr), .min = 0, .max = kRealMax});
  of(one, {.path = "scheduler.params.cycle_max_lr", .note = "must be given",
           .slot = SLOT(scheduler.cycle_max_lr), .min = 0, .max = kRealMax});
  of(one, {.path = "scheduler.params.decay_lr_rate", .slot = SLOT(scheduler.decay_lr_rate),
           .min = 0, .max = kRealMax});
  of(one, {.path = "scheduler.params.cycle_first_step_size",
           .slot = SLOT(scheduler.cycle_first_step_size), .min = 1, .max = kCountMax});
  of(one, {.path = "scheduler.params.cycle_second_step_size", .note = "left out: as the first",
           .slot = SLOT(scheduler.cycle_second_step_size), .min = 0, .max = kCountMax});
  of(one, {.path = "scheduler.params.cycle_first_stair_count", .note = "0: no stairs",
           .slot = SLOT(scheduler.cycle_first_stair_count), .min = 0, .max = kCountMax});
  of(one, {.path = "scheduler.params.cycle_second_stair_count", .note = "left out: as the first",
           .slot = SLOT(scheduler.cycle_second_stair_count), .min = 0, .max = kCountMax});
  of(one, {.path = "scheduler.params.decay_step_size", .note = "0: no decay after the cycle",
           .slot = SLOT(scheduler.decay_step_size), .min = 0, .max = kCountMax});
  of(one, {.path = "scheduler.params.cycle_momentum",
           .note = "the first beta of an optimizer that has them, against the rate; as in "
                   "DeepSpeed the second is 0.99 then",
           .slot = SLOT(scheduler.cycle_momentum)});
  of(one, {.path = "scheduler.params.cycle_min_mom", .slot = SLOT(scheduler.cycle_min_mom),
           .min = 0, .max = 1, .max_excluded = true});
  of(one, {.path = "scheduler.params.cycle_max_mom", .slot = SLOT(scheduler.cycle_max_mom),
           .min = 0, .max = 1, .max_excluded = true});
  of(one, {.path = "scheduler.params.decay_mom_rate", .slot = SLOT(scheduler.decay_mom_rate),
           .min = 0, .max = kRealMax});
  const char* const range = "LRRangeTest";
  of(range, {.path = "scheduler.params.lr_range_test_min_lr",
             .slot = SLOT(scheduler.lr_range_test_min_lr), .min = 0, .max = kRealMax});
  of(range, {.path = "scheduler.params.lr_range_test_step_size",
             .slot = SLOT(scheduler.lr_range_test_step_size), .min = 1, .max = kCountMax});
  of(range, {.path = "scheduler.params.lr_range_test_step_rate",
             .slot = SLOT(scheduler.lr_range_test_step_rate), .min = 0, .max = kRealMax});
  of(range, {.path = "scheduler.params.lr_range_test_staircase",
             .slot = SLOT(scheduler.lr_range_test_staircase)});
}

}  // namespace

const Words& TorchSchedulers() {
  static const Words& types = *new Words{  // tidy: allow (never destroyed)
      "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR",
      "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"};
  return types;
}

const Words& DeepSpeedSchedulers() {
  static const Words& types = *new Words{  // tidy: allow (never destroyed)
      "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"};
  return types;
}

void AppendOptimizerKeys(std::vector<ConfigKey>* keys) {
  AppendAdamKeys(keys);
  AppendOtherOptimizerKeys(keys);
  AppendTorchOptimizerKeys(keys);
  AppendWarmupKeys(keys);
  AppendCycleKeys(keys);
}

}  // namespace zerod
