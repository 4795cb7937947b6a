// SPDX-License-Identifier: Apache-2.0
//
// What one step does to the elements of one parameter: its group's hyper-parameters as the scalars
// of the kernel that computes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>

#include "daemon/core/types.h"
#include "kernels/cpu/adaptive.h"
#include "kernels/cpu/asgd_rprop.h"
#include "kernels/cpu/lamb.h"
#include "kernels/cpu/optimizers.h"

namespace zerod::engine {

// The same in both of LAMB's passes.
kernels::LambScalars LambScalarsOf(const core::Group& group, uint64_t t, double grad_scale);

// `n` elements of one parameter: gradients, weights, and the states that its kind has.
struct Elements {
  const float* const* gradients;
  size_t count;  // of gradients
  float* p;
  float* states[core::kStateTensorsMax];  // null where the kind has fewer
  kernels::Copy copy;
  size_t n;
};

class UpdateRule {
 public:
  // `t`: the parameter's own count of steps, this one included. `squares` is LAMB's alone.
  // REQUIRES: not by matrix; CheckGroup passed.
  UpdateRule(core::OptimizerKind kind, const core::Group& group, uint64_t t, double grad_scale,
             const core::TensorSquares& squares);
  // States that do not begin as zeros are begun in a parameter's first step.
  void Run(const Elements& elements) const;

  // LAMB's second pass.
  struct Lamb {
    kernels::LambScalars scalars;
    float trust_ratio;
  };
  struct RmsProp {
    kernels::RmsPropScalars scalars;
    bool momentum;
    bool centered;
  };
  using Scalars =
      std::variant<kernels::AdamWScalars, kernels::LionScalars, kernels::AdagradScalars,
                   kernels::SgdScalars, Lamb, RmsProp, kernels::AdadeltaScalars,
                   kernels::AdamaxScalars, kernels::NAdamScalars, kernels::RAdamScalars,
                   kernels::AsgdScalars, kernels::RpropScalars>;

 private:
  // What a state begins with, where that is not 0.
  struct Beginning {
    int state = 0;
    float value = 0;
  };

  const Scalars scalars_;
  Beginning beginning_;
};

}  // namespace zerod::engine
