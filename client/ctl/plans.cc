// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/plans.h"

#include <cstdio>
#include <utility>

#include "base/config_parse.h"
#include "base/status.h"
#include "client/ctl/models.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "client/ctl/tables.h"

namespace zerod::ctl {
namespace {

// Where the script passes its optimizer: an Adam, of which only a centered RMSprop with momentum
// takes more memory.
v1::OptimizerKind OptimizerOf(const Config::Optimizer& optimizer) {
  if (optimizer.type == "Lion") return v1::OPTIMIZER_KIND_LION;
  if (optimizer.type == "Adagrad") return v1::OPTIMIZER_KIND_ADAGRAD;
  if (optimizer.type == "Lamb") return v1::OPTIMIZER_KIND_LAMB;
  if (optimizer.type == "ASGD") return v1::OPTIMIZER_KIND_ASGD;
  if (optimizer.type == "SGD") {
    return optimizer.momentum != 0 ? v1::OPTIMIZER_KIND_SGD_MOMENTUM : v1::OPTIMIZER_KIND_SGD;
  }
  if (optimizer.type == "RMSprop") {
    if (optimizer.momentum == 0) {
      return optimizer.centered ? v1::OPTIMIZER_KIND_RMS_PROP_CENTERED
                                : v1::OPTIMIZER_KIND_RMS_PROP;
    }
    return optimizer.centered ? v1::OPTIMIZER_KIND_RMS_PROP_CENTERED_MOMENTUM
                              : v1::OPTIMIZER_KIND_RMS_PROP_MOMENTUM;
  }
  if (optimizer.type == "Adadelta") return v1::OPTIMIZER_KIND_ADADELTA;
  if (optimizer.type == "Adamax") return v1::OPTIMIZER_KIND_ADAMAX;
  if (optimizer.type == "NAdam") return v1::OPTIMIZER_KIND_NADAM;
  if (optimizer.type == "RAdam") return v1::OPTIMIZER_KIND_RADAM;
  if (optimizer.type == "Rprop") return v1::OPTIMIZER_KIND_RPROP;
  return v1::OPTIMIZER_KIND_ADAM;
}

// The groups of the model's parameters, as the client makes them
// (client/python/zerod/optimizer.py).
void SetGroups(const Config::Optimizer& optimizer, v1::Model* model) {
  if (optimizer.type != "Muon") return model->add_groups(OptimizerOf(optimizer));
  model->add_groups(v1::OPTIMIZER_KIND_MUON);
  model->add_groups(v1::OPTIMIZER_KIND_ADAM);
  for (v1::Parameter& p : *model->mutable_parameters()) {
    const std::string name = absl::AsciiStrToLower(p.name());
    const bool hidden =
        !absl::StrContains(name, "embed") && !absl::StrContains(name, "lm_head");
    p.set_group(p.shape_size() >= 2 && hidden ? 0 : 1);
  }
}

// What the model's modules would decide, and a plan's do not have.
void NoteWhatIsNotPlanned(const Config& config) {
  const Config::LeafModule& leaf = config.zero.leaf_module;
  if (config.zero.module_granularity_threshold == 0 && leaf == Config::LeafModule()) return;
  std::fputs("zerodctl: leaf_module and stage3_module_granularity_threshold are about the classes "
             "of a model's modules, which a plan does not know: it is made without them\n",
             stderr);
}

}  // namespace

absl::Status Plan(Daemon* daemon, const PlanArguments& arguments, bool json) {
  KnownModel known;
  if (arguments.parameters != 0) {
    known = UniformModel(arguments.parameters);
  } else {
    ASSIGN_OR_RETURN(known, ModelByName(arguments.model));
  }
  CheckConfigArguments source = arguments.config;
  if (source.hidden_sizes.empty()) source.hidden_sizes.push_back(known.hidden_size);
  ASSIGN_OR_RETURN(const ParsedConfig parsed, ReadConfig(source));
  NoteWhatIsNotPlanned(parsed.config);
  v1::PlanRequest request;
  request.set_config(parsed.config.ToJson());
  *request.mutable_model() = std::move(known.model);
  request.mutable_model()->set_dtype(parsed.config.fp16.enabled ? v1::DATA_TYPE_FLOAT16
                                     : parsed.config.bf16       ? v1::DATA_TYPE_BFLOAT16
                                                                : v1::DATA_TYPE_FLOAT32);
  SetGroups(parsed.config.optimizer, request.mutable_model());
  request.set_nodes(arguments.nodes);
  request.set_world(source.world);
  request.set_node_memory_bytes(arguments.node_memory_bytes);
  ASSIGN_OR_RETURN(const v1::PlanResponse plan, daemon->Plan(request));
  std::fputs((json ? ToJson(plan) : PlanText(known.name, plan)).c_str(), stdout);
  return absl::OkStatus();
}

}  // namespace zerod::ctl
