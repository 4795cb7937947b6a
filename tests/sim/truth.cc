// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "tests/sim/process.h"
#include "tests/sim/world.h"

namespace zerod::sim {

void Violate(const std::string& text) { throw Violation{text}; }

Truth::Truth(const Scenario* scenario) : s_(*scenario) {
  Weights& zeros = after_[0];
  for (const std::vector<Cell>& cells : s_.cells) zeros.emplace_back(cells.size(), 0);
  state_after_[0] = zeros;
  core::OptimizerProgress& progress = progress_after_[0];
  progress.parameter_steps.assign(s_.layout().parameters().size(), 0);
  if (s_.spec.loss_scale.has_value()) {
    progress.loss_scaler = core::LossScaler(*s_.spec.loss_scale).state();
  }
  PrepareBefore(1);
}

void Truth::PrepareBefore(Step step) {
  Weights w = after_.at(step - 1);
  Weights state = state_after_.at(step - 1);
  if (const std::optional<PutOfStep> puts = PutsOf(s_, step)) {
    const bool master = puts->state == core::StateKind::kMaster;
    for (UnitIndex u : puts->units) {
      for (size_t c = 0; c < w[u].size(); ++c) {
        if (!master && !s_.cells[u][c].trainable) continue;
        (master ? w : state)[u][c] = PutValue(s_, step, u, c);
      }
    }
  }
  before_[step] = std::move(w);
  state_before_[step] = std::move(state);
  core::OptimizerProgress progress = progress_after_.at(step - 1);
  if (const std::optional<core::OptimizerProgress> restored = RestoreOf(s_, step)) {
    progress.parameter_steps = restored->parameter_steps;
    if (restored->loss_scaler.has_value()) progress.loss_scaler = restored->loss_scaler;
  }
  progress_before_[step] = std::move(progress);
}

// The gradient of one fragment in the order of sums of docs/step.md: per_rank adds
// micro-steps within a client, then ranks; node_sum adds ranks within each place of a micro-step,
// or of what lies between two barriers within one; then nodes; rounds one after the other.
Gradient Truth::Sum(const std::vector<std::shared_ptr<Process>>& processes, UnitIndex unit,
                    size_t fragment) const {
  struct Part {
    uint32_t round, node;
    uint64_t scalars;
    uint32_t micro_step, index, slot;
    Gradient gradient;
  };
  std::vector<Part> parts;
  const bool one_member = s_.spec.members == 1;
  uint32_t rounds = 0;
  for (const auto& p : processes) {
    uint32_t index = 0;
    for (const Process::Handed& h : p->handed()) {
      if (h.unit != unit || h.part != s_.fragments[unit][fragment].part) continue;
      rounds = std::max(rounds, h.round);
      // With one member nothing is consumed between rounds under per_rank: all of a client's come
      // before the next client's.
      const uint32_t round = one_member && !s_.spec.node_sum ? 1 : h.round;
      const bool in_order = one_member && !s_.spec.node_sum;
      parts.push_back({round, p->member(), h.scalars, in_order ? 0 : h.micro_step,
                       in_order ? index++ : h.index, p->slot(), h.gradients[fragment]});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) {
    auto key = [&](const Part& x) {
      using Key = std::tuple<uint32_t, uint32_t, uint64_t, uint32_t, uint32_t, uint32_t>;
      return s_.spec.node_sum
                 ? Key(x.round, x.node, x.scalars, x.micro_step, x.index, x.slot)
                 : Key(x.round, x.node, 0, x.slot, x.micro_step, x.index);
    };
    return key(a) < key(b);
  });
  // Innermost sums first. Under per_rank a client's own sum is a term of its node's, and with
  // several rounds or nodes each node's sum is a term of the round's.
  Gradient total;
  for (size_t i = 0; i < parts.size();) {
    const uint32_t round = parts[i].round;
    Gradient of_round;
    while (i < parts.size() && parts[i].round == round) {
      const uint32_t node = parts[i].node;
      Gradient of_node;
      while (i < parts.size() && parts[i].round == round && parts[i].node == node) {
        if (s_.spec.node_sum) {
          // One member's accumulator runs through all rounds.
          Gradient* into = one_member ? &total : &of_node;
          *into = Add(*into, parts[i++].gradient);
          continue;
        }
        const uint32_t slot = parts[i].slot;
        Gradient of_client;
        while (i < parts.size() && parts[i].round == round && parts[i].node == node &&
               parts[i].slot == slot) {
          of_client = Add(of_client, parts[i++].gradient);
        }
        of_node = Add(of_node, of_client);
      }
      of_round = Add(of_round, of_node);
    }
    total = Add(total, of_round);
  }
  return total;
}

std::vector<Gradient> Truth::Gradients(const std::vector<std::shared_ptr<Process>>& processes,
                                       UnitIndex unit, std::optional<Step> set) const {
  std::vector<Gradient> fragments;
  for (size_t f = 0; f < s_.fragments[unit].size(); ++f) {
    fragments.push_back(Sum(processes, unit, f));
    if (set.has_value() && fragments[f].any) {
      fragments[f] = SetGradient(PutValue(s_, *set, unit, 0), f);
    }
  }
  return s_.JoinFragments(unit, fragments);
}

// An optimizer by tensor has its state of this step before its weights.
void Truth::ApplyStep(const Outcome& outcome, const std::vector<Gradient>& gradients, Step step,
                      const core::OptimizerProgress& before, Weights* weights,
                      Weights* states) const {
  std::vector<double> weight_squares(gradients.size(), 0.0);
  std::vector<double> update_squares(gradients.size(), 0.0);
  const auto for_each = [&](const auto& visit) {
    for (UnitIndex u = 0; u < s_.cells.size(); ++u) {
      for (size_t c = 0; c < s_.cells[u].size(); ++c) {
        const Cell& cell = s_.cells[u][c];
        if (!cell.trainable || !outcome.touched[cell.parameter]) continue;
        visit(cell, &(*weights)[u][c], &(*states)[u][c]);
      }
    }
  };
  for_each([&](const Cell& cell, const uint64_t* weight, uint64_t* state) {
    if (!s_.ByTensor(cell)) return;
    *state = ApplyState(*state, gradients[cell.parameter], step);
    const uint64_t block = s_.layout().block_elements();
    for (uint64_t at = cell.elements.begin; at < cell.elements.end; at = (at / block + 1) * block) {
      weight_squares[cell.parameter] += WeightSquare(*weight, at);
      update_squares[cell.parameter] += UpdateSquare(*state, at);
    }
  });
  for_each([&](const Cell& cell, uint64_t* weight, uint64_t* state) {
    const uint64_t steps = before.parameter_steps[cell.parameter] + 1;
    const Gradient& g = gradients[cell.parameter];
    if (s_.ByTensor(cell)) {
      *weight = ApplyByTensor(*weight, *state, weight_squares[cell.parameter],
                              update_squares[cell.parameter], steps);
      return;
    }
    *weight = Apply(*weight, g, *state, steps);
    *state = ApplyState(*state, g, step);
  });
}

void Truth::CheckCommit(Step step,
                        const std::vector<std::shared_ptr<Process>>& processes) const {
  if (step != committed_ + 1) {
    Violate(absl::StrCat("step ", step, " is committed after step ", committed_));
  }
  for (const auto& p : processes) {
    if (p == nullptr || !p->step_sent() || p->step() != step ||
        p->generation() != processes[0]->generation()) {
      Violate(absl::StrCat("step ", step, " is committed, but not every client of one generation "
                           "has sent it"));
    }
    if (Disagrees(s_, p->rank(), step, p->attempt())) {
      Violate(absl::StrCat("step ", step, " is committed though rank ", p->rank(), " disagrees"));
    }
  }
  if (s_.spec.refuse_untouched && LacksGradients(s_, step, processes[0]->attempt())) {
    Violate(absl::StrCat("step ", step, " is committed without every gradient"));
  }
}

void Truth::Commit(Step step, const std::vector<std::shared_ptr<Process>>& processes) {
  CheckCommit(step, processes);
  Outcome& outcome = outcomes_[step];
  Weights w = before_.at(step);
  Weights state = state_before_.at(step);
  core::OptimizerProgress progress = progress_before_.at(step);
  const auto& parameters = s_.layout().parameters();
  outcome.touched.assign(parameters.size(), false);
  std::vector<Gradient> gradients(parameters.size());
  bool nonfinite = false;
  std::vector<std::vector<Gradient>> sums;  // per unit and place
  const std::optional<GradientOfStep> given = GradientOf(s_, step);
  for (UnitIndex u = 0; u < s_.fragments.size(); ++u) {
    const bool set = given.has_value() && given->set && given->unit == u;
    sums.push_back(Gradients(processes, u, set ? std::optional(step) : std::nullopt));
  }
  for (uint32_t p = 0; p < parameters.size(); ++p) {
    if (!parameters[p].trainable) continue;
    const UnitIndex u = parameters[p].unit;
    const auto& list = s_.layout().units()[u].parameters;
    const auto place =
        static_cast<uint32_t>(std::find(list.begin(), list.end(), p) - list.begin());
    gradients[p] = sums[u][place];
    outcome.touched[p] = gradients[p].any || s_.spec.untouched_as_zero;
    nonfinite |= gradients[p].nonfinite;
  }
  double squares = 0;
  for (const std::vector<Cell>& cells : s_.cells) {
    for (const Cell& c : cells) {
      if (c.trainable) squares += Square(gradients[c.parameter]);
    }
  }
  outcome.skip = nonfinite && s_.spec.skip_nonfinite;
  if (progress.loss_scaler.has_value()) {
    core::LossScaler scaler(*s_.spec.loss_scale);
    scaler.Restore(*progress.loss_scaler);
    outcome.loss_scale = scaler.scale();
    if (!scaler.Update(outcome.skip).ok()) Violate("a scale that never fails did");
    outcome.next_loss_scale = scaler.scale();
    progress.loss_scaler = scaler.state();
  }
  outcome.grad_norm =
      std::sqrt(squares) / (static_cast<double>(s_.world()) * outcome.loss_scale);
  if (!outcome.skip) ApplyStep(outcome, gradients, step, progress, &w, &state);
  for (size_t p = 0; p < parameters.size() && !outcome.skip; ++p) {
    if (outcome.touched[p]) ++progress.parameter_steps[p];
  }
  outcome.progress = progress;
  progress_after_[step] = std::move(progress);
  state_after_[step] = std::move(state);
  after_[step] = std::move(w);
  committed_ = step;
  PrepareBefore(step + 1);
}

}  // namespace zerod::sim
