// SPDX-License-Identifier: Apache-2.0
#include "tests/engine/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/status.h"
#include "kernels/cpu/lamb.h"
#include "kernels/cpu/muon.h"
#include "kernels/cpu/reference.h"

namespace zerod::engine::testing {

using core::UnitIndex;

bool Touches(const Workload& workload, uint64_t step, uint32_t rank, uint32_t parameter) {
  if (!workload.skip_some) return true;
  if (parameter == 3) return step % 2 == 0;        // nobody in odd steps
  if (parameter == 4) return (rank + step) % 2 == 0;  // some ranks only
  return true;
}

std::vector<float> Gradient(const core::Layout& layout, uint32_t parameter,
                            const std::vector<float>& unit_values, uint64_t step, uint32_t rank,
                            uint32_t micro) {
  const core::Parameter& p = layout.parameters()[parameter];
  std::vector<float> gradient(p.elements);
  for (uint64_t i = 0; i < p.elements; ++i) {
    const uint64_t noise = (i * 31 + rank * 7 + step * 13 + micro * 5 + parameter) % 23;
    gradient[i] = 0.11f * unit_values[p.offset + i] + 0.013f * (static_cast<float>(noise) - 11.0f);
  }
  return gradient;
}

std::vector<float> InitialValues(const core::Layout& layout, UnitIndex u) {
  std::vector<float> values(layout.units()[u].elements, 0.0f);
  for (uint32_t index : layout.units()[u].parameters) {
    const core::Parameter& p = layout.parameters()[index];
    for (uint64_t i = 0; i < p.elements; ++i) {
      values[p.offset + i] = 0.37f * static_cast<float>((i * 17 + index * 5) % 19) - 3.1f;
    }
  }
  return values;
}

Workload DefaultWorkload() {
  Workload workload;
  workload.hyper.groups = {{0.01, 0.9, 0.95, 1e-8, 0.1}, {0.02, 0.8, 0.99, 1e-6, 0.0}};
  return workload;
}

Reference::Reference(const core::Layout* layout, uint32_t members, uint32_t local_world,
                     bool node_sum, const core::StateForm& form)
    : form_(form),
      layout_(layout),
      partition_(*layout, members),
      members_(members),
      local_world_(local_world),
      node_sum_(node_sum) {
  for (UnitIndex u = 0; u < layout_->units().size(); ++u) {
    master_.push_back(InitialValues(*layout_, u));
    const uint64_t trainable = form_.masters ? layout_->units()[u].trainable_elements : 0;
    for (uint64_t i = trainable; i < master_.back().size(); ++i) {  // these have no master
      master_.back()[i] = Rounded(master_.back()[i]);
    }
    for (auto& moments : moments_) {
      moments.emplace_back(layout_->units()[u].trainable_elements, 0.0f);
    }
  }
  parameter_steps_.resize(layout_->parameters().size());
}

std::vector<float> Reference::Seen(UnitIndex u) const {
  std::vector<float> seen = master_[u];
  for (float& value : seen) value = Rounded(value);
  return seen;
}

float Reference::Rounded(float value) const {
  if (layout_->dtype() == core::DType::kBFloat16) {
    kernels::bfloat16 narrow;
    kernels::reference::CastToBf16(&value, &narrow, 1);
    kernels::reference::CastFromBf16(&narrow, &value, 1);
  } else if (layout_->dtype() == core::DType::kFloat16) {
    kernels::float16 narrow;
    kernels::reference::CastToFp16(&value, &narrow, 1);
    kernels::reference::CastFromFp16(&narrow, &value, 1);
  }
  return value;
}

// Each owner gets the others' sums in the type of the wire, and has its own as it is.
void Reference::Send(core::MemberIndex from, const core::Parameter& p,
                     std::vector<float>* sum) const {
  const core::Range own = partition_.Shard(p.unit, from);
  for (uint64_t i = 0; i < sum->size(); ++i) {
    const uint64_t element = p.offset + i;
    if (element < own.begin || element >= own.end) (*sum)[i] = Rounded((*sum)[i]);
  }
}

bool Reference::SumOf(const Workload& workload, uint32_t parameter, std::vector<float>* sum) const {
  const core::Parameter& p = layout_->parameters()[parameter];
  const std::vector<float> seen = Seen(p.unit);
  const auto add = [](const std::vector<float>& from, bool* first, std::vector<float>* to) {
    if (*first) *to = from;
    for (size_t i = 0; !*first && i < from.size(); ++i) (*to)[i] += from[i];
    *first = false;
  };
  bool any = false;
  bool first_node = true;
  for (uint32_t member = 0; member < members_; ++member) {
    std::vector<float> node(p.elements, 0.0f);
    bool first = true;
    const auto gradient = [&](uint32_t local, uint32_t micro) {
      return Gradient(*layout_, parameter, seen, step_, member * local_world_ + local, micro);
    };
    const auto touches = [&](uint32_t local) {
      return Touches(workload, step_, member * local_world_ + local, parameter);
    };
    if (node_sum_) {
      for (uint32_t micro = 0; micro < workload.micro_steps; ++micro) {
        for (uint32_t local = 0; local < local_world_; ++local) {
          if (touches(local)) add(gradient(local, micro), &first, &node);
        }
      }
    } else {
      for (uint32_t local = 0; local < local_world_; ++local) {
        if (!touches(local)) continue;
        std::vector<float> own;
        bool first_micro = true;
        for (uint32_t micro = 0; micro < workload.micro_steps; ++micro) {
          add(gradient(local, micro), &first_micro, &own);
        }
        add(own, &first, &node);
      }
    }
    any = any || !first;
    if (members_ > 1) Send(member, p, &node);
    add(node, &first_node, sum);
  }
  return any;
}

void Reference::Step(const Workload& workload) {
  const core::HyperParameters& hyper = workload.hyper;
  std::vector<std::vector<float>> sums(layout_->parameters().size());
  std::vector<bool> touched(sums.size());
  for (uint32_t i = 0; i < sums.size(); ++i) {
    if (layout_->parameters()[i].trainable) touched[i] = SumOf(workload, i, &sums[i]);
  }
  // The norm: blocks of the layout, in layout order.
  double squares = 0;
  for (UnitIndex u = 0; u < layout_->units().size(); ++u) {
    const core::Unit& unit = layout_->units()[u];
    std::vector<float> gradient(unit.trainable_elements, 0.0f);
    for (uint32_t i : unit.parameters) {
      if (!touched[i]) continue;
      std::copy(sums[i].begin(), sums[i].end(),
                gradient.begin() + static_cast<int64_t>(layout_->parameters()[i].offset));
    }
    for (uint64_t b = 0; b < gradient.size(); b += layout_->block_elements()) {
      const float* in = gradient.data() + b;
      bool nonfinite = false;
      squares += kernels::reference::SquaredNorm(
          &in, 1, std::min<uint64_t>(layout_->block_elements(), gradient.size() - b), &nonfinite);
    }
  }
  double scale = 1.0 / (static_cast<double>(members_ * local_world_) * hyper.loss_scale);
  grad_norm_ = std::sqrt(squares) * scale;
  if (hyper.max_norm > 0) scale *= std::min(1.0, hyper.max_norm / (grad_norm_ + 1e-6));
  for (uint32_t i = 0; i < sums.size(); ++i) {
    if (!touched[i]) continue;
    Update(layout_->parameters()[i], hyper, ++parameter_steps_[i], scale, sums[i].data());
    Keep(layout_->parameters()[i]);
  }
  ++step_;
}

void Reference::Update(const core::Parameter& p, const core::HyperParameters& hyper, uint64_t t,
                       double scale, const float* gradient) {
  const core::Group& g = hyper.groups[p.group];
  float* const master = master_[p.unit].data() + p.offset;
  float* const m = moments_[0][p.unit].data() + p.offset;
  float* const v = moments_[1][p.unit].data() + p.offset;
  switch (layout_->optimizer(p.group)) {
    case core::OptimizerKind::kAdam:
      return kernels::reference::AdamW(
          kernels::MakeAdamWScalars(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, t, scale,
                                    g.decoupled, g.bias_correction),
          &gradient, 1, master, m, v, nullptr, p.elements);
    case core::OptimizerKind::kLion:
      return kernels::reference::Lion(
          kernels::MakeLionScalars(g.lr, g.beta1, g.beta2, g.weight_decay, scale), &gradient, 1,
          master, m, nullptr, p.elements);
    case core::OptimizerKind::kAdagrad:
      if (t == 1) std::fill_n(m, p.elements, static_cast<float>(g.initial_accumulator_value));
      return kernels::reference::Adagrad(
          kernels::MakeAdagradScalars(g.lr, g.lr_decay, g.eps, g.weight_decay, t, scale),
          &gradient, 1, master, m, nullptr, p.elements);
    case core::OptimizerKind::kSgd:
    case core::OptimizerKind::kSgdMomentum: {
      const bool momentum = layout_->optimizer(p.group) == core::OptimizerKind::kSgdMomentum;
      return kernels::reference::Sgd(
          kernels::MakeSgdScalars(g.lr, g.momentum, g.dampening, g.weight_decay, g.nesterov, t,
                                  scale),
          &gradient, 1, master, momentum ? m : nullptr, nullptr, p.elements);
    }
    case core::OptimizerKind::kLamb:
      return UpdateByLamb(p, g, t, scale, gradient);
    case core::OptimizerKind::kMuon:
      return UpdateByMuon(p, g, scale, gradient);
    default:
      return UpdateAdaptively(p, g, t, scale, gradient);
  }
}

void Reference::Keep(const core::Parameter& p) {
  const auto round = [&](std::vector<float>* values) {
    for (uint64_t i = 0; i < p.elements; ++i) {
      (*values)[p.offset + i] = Rounded((*values)[p.offset + i]);
    }
  };
  if (!form_.masters) round(&master_[p.unit]);
  if (form_.state_bytes == 4) return;
  for (auto& moments : moments_) round(&moments[p.unit]);
}

void Reference::UpdateAdaptively(const core::Parameter& p, const core::Group& g, uint64_t t,
                                 double scale, const float* gradient) {
  namespace reference = kernels::reference;
  const core::OptimizerKind kind = layout_->optimizer(p.group);
  const auto state = [&](int which) { return moments_[which][p.unit].data() + p.offset; };
  float* const master = master_[p.unit].data() + p.offset;
  const auto run = [&](auto function, const auto& scalars, auto*... states) {
    function(scalars, &gradient, 1, master, states..., nullptr, p.elements);
  };
  switch (kind) {
    case core::OptimizerKind::kAdadelta:
      return run(reference::Adadelta,
                 kernels::MakeAdadeltaScalars(g.lr, g.rho, g.eps, g.weight_decay, scale), state(0),
                 state(1));
    case core::OptimizerKind::kAdamax:
      return run(reference::Adamax,
                 kernels::MakeAdamaxScalars(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, t,
                                            scale),
                 state(0), state(1));
    case core::OptimizerKind::kNAdam:
      return run(reference::NAdam,
                 kernels::MakeNAdamScalars({g.lr, g.beta1, g.beta2, g.eps, g.weight_decay,
                                            g.momentum_decay, g.decoupled},
                                           t, scale),
                 state(0), state(1));
    case core::OptimizerKind::kRAdam:
      return run(reference::RAdam,
                 kernels::MakeRAdamScalars(
                     {g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.decoupled}, t, scale),
                 state(0), state(1));
    case core::OptimizerKind::kAsgd:
      return run(reference::Asgd,
                 kernels::MakeAsgdScalars(
                     {g.lr, g.lr_before, g.lambd, g.alpha, g.t0, g.weight_decay}, t, scale),
                 state(0));
    case core::OptimizerKind::kRprop:
      if (t == 1) std::fill_n(state(1), p.elements, static_cast<float>(g.lr));
      return run(reference::Rprop,
                 kernels::MakeRpropScalars(g.eta_minus, g.eta_plus, g.step_min, g.step_max, scale),
                 state(0), state(1));
    default: {
      float* const b = core::HasMomentum(kind) ? state(1) : nullptr;
      float* const a =
          !core::IsCentered(kind) ? nullptr : state(core::HasMomentum(kind) ? 2 : 1);
      return run(reference::RmsProp,
                 kernels::MakeRmsPropScalars({g.lr, g.alpha, g.eps, g.weight_decay, g.momentum},
                                             scale),
                 state(0), b, a);
    }
  }
}

void Reference::UpdateByMuon(const core::Parameter& p, const core::Group& g, double scale,
                             const float* gradient) {
  const kernels::MuonScalars scalars =
      kernels::MakeMuonScalars(g.lr, g.momentum, g.nesterov, g.weight_decay, scale);
  const kernels::NewtonSchulz method = g.standard_newton_schulz ? kernels::NewtonSchulz::kStandard
                                                                : kernels::NewtonSchulz::kGram;
  const auto rows = static_cast<size_t>(p.shape[0]);
  const size_t columns = p.elements / rows;
  std::vector<float> update(p.elements);
  std::vector<float> scratch(kernels::OrthogonalizeScratch(method, rows, columns));
  kernels::reference::MuonMomentum(scalars, &gradient, 1, moments_[0][p.unit].data() + p.offset,
                                   update.data(), p.elements);
  kernels::Orthogonalize(method, update.data(), rows, columns, scratch.data());
  kernels::reference::MuonApply(scalars, update.data(), master_[p.unit].data() + p.offset, nullptr,
                                p.elements);
}

// Both passes; the squares block by block of the unit.
void Reference::UpdateByLamb(const core::Parameter& p, const core::Group& g, uint64_t t,
                             double scale, const float* gradient) {
  float* const master = master_[p.unit].data() + p.offset;
  float* const m = moments_[0][p.unit].data() + p.offset;
  float* const v = moments_[1][p.unit].data() + p.offset;
  const kernels::LambScalars scalars = kernels::MakeLambScalars(
      {g.lr, g.beta1, g.beta2, g.eps, g.eps_inside_sqrt, g.weight_decay, g.bias_correction}, t,
      scale);
  const uint64_t block = layout_->block_elements();
  kernels::LambSquares squares{0, 0};
  for (uint64_t begin = 0; begin < p.elements;) {
    const uint64_t block_end = ((p.offset + begin) / block + 1) * block - p.offset;
    const uint64_t end = std::min(p.elements, block_end);
    const float* const in = gradient + begin;
    const kernels::LambSquares piece = kernels::reference::LambMoments(
        scalars, &in, 1, master + begin, m + begin, v + begin, end - begin);
    squares.p += piece.p;
    squares.u += piece.u;
    begin = end;
  }
  kernels::reference::LambApply(scalars,
                                kernels::LambTrustRatio(squares, g.min_coeff, g.max_coeff),
                                master, m, v, nullptr, p.elements);
}

void PutInitial(const core::Layout& layout, FakeClient& client) {
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    const std::vector<float> values = InitialValues(layout, u);
    // In odd pieces, as a state dict comes.
    const size_t piece = values.size() / 3 + 1;
    for (size_t begin = 0; begin < values.size(); begin += piece) {
      const size_t end = std::min(begin + piece, values.size());
      const absl::Status status = client.Put(
          u, begin, {values.begin() + static_cast<int64_t>(begin),
                     values.begin() + static_cast<int64_t>(end)});
      CHECK(status.ok()) << status.ToString();
    }
  }
}

absl::Status Backward(const core::Layout& layout, uint32_t rank, FakeClient& client,
                      const Workload& workload) {
  const uint64_t step = workload.steps_before + client.step();
  for (uint32_t micro = 0; micro < workload.micro_steps; ++micro) {
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      RETURN_IF_ERROR(client.Gather(u));
      const std::vector<float> values = client.Values(u);
      bool any = false;
      for (uint32_t p : layout.units()[u].parameters) {
        if (!layout.parameters()[p].trainable ||
            !Touches(workload, step, rank, p)) {
          continue;
        }
        client.Land(p, Gradient(layout, p, values, step, rank, micro));
        any = true;
      }
      client.Release(u);
      if (any) RETURN_IF_ERROR(client.Scatter(u, micro + 1 == workload.micro_steps));
    }
    RETURN_IF_ERROR(client.EndMicroStep());
  }
  return absl::OkStatus();
}

void Train(const core::Layout& layout, uint32_t rank, FakeClient& client, const Workload& workload,
           uint64_t steps, bool fresh, std::vector<double>* norms) {
  absl::Status status = client.Barrier();
  CHECK(status.ok()) << status.ToString();
  if (fresh && rank == 0) PutInitial(layout, client);
  status = client.Barrier();
  CHECK(status.ok()) << status.ToString();
  for (uint64_t i = 0; i < steps; ++i) {
    status = Backward(layout, rank, client, workload);
    CHECK(status.ok()) << "rank " << rank << ": " << status.ToString();
    const absl::StatusOr<StepAnswer> answer = client.Step({workload.hyper, "rank state"});
    CHECK(answer.ok()) << "rank " << rank << ": " << answer.status().ToString();
    CHECK(!answer->skipped);
    if (norms != nullptr) norms->push_back(answer->grad_norm);
  }
}

void PutState(const core::Layout& layout, FakeClient& client, const JobState& state) {
  for (uint32_t kind = 0; kind <= layout.state_tensors(); ++kind) {
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      const core::Unit& unit = layout.units()[u];
      const std::vector<float>& values = state.arrays[kind][u];
      const size_t count = kind == 0 ? unit.elements : unit.trainable_elements;
      const size_t piece = count / 3 + 1;
      for (size_t begin = 0; begin < count; begin += piece) {
        const size_t end = std::min(begin + piece, count);
        const absl::Status status = client.Put(
            u, begin, {values.begin() + static_cast<int64_t>(begin),
                       values.begin() + static_cast<int64_t>(end)},
            static_cast<shm::StateKind>(kind));
        CHECK(status.ok()) << status.ToString();
      }
    }
  }
}

JobState ReadState(const core::Layout& layout, FakeClient& client) {
  JobState state;
  for (uint32_t kind = 0; kind <= layout.state_tensors(); ++kind) {
    for (UnitIndex u = 0; u < layout.units().size(); ++u) {
      const core::Unit& unit = layout.units()[u];
      absl::StatusOr<std::vector<float>> values =
          client.Read(u, 0, unit.elements, static_cast<shm::StateKind>(kind));
      CHECK(values.ok()) << values.status().ToString();
      state.arrays[kind].push_back(*std::move(values));
    }
  }
  return state;
}

JobState StateOf(const core::Layout& layout, const Reference& reference) {
  JobState state;
  for (UnitIndex u = 0; u < layout.units().size(); ++u) {
    state.arrays[0].push_back(reference.master(u));
    for (uint32_t which = 0; which < layout.state_tensors(); ++which) {
      std::vector<float> moment = reference.moment(which, u);
      moment.resize(layout.units()[u].elements);
      state.arrays[1 + which].push_back(std::move(moment));
    }
  }
  return state;
}

}  // namespace zerod::engine::testing
