// SPDX-License-Identifier: Apache-2.0
//
// What is updated by matrix (core::ByMatrix): a matrix at a time on one thread, a few of them at
// once, because each needs scratch of several times its size, which was reserved for the job.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "daemon/engine/apply.h"
#include "daemon/engine/workers.h"

namespace zerod::engine {

// Floats of scratch that one parameter's update needs.
size_t MatrixScratch(const core::Parameter& p);
// The step of the unit's `place`-th parameter, which this member keeps all of. `scratch` has
// MatrixScratch floats.
void ApplyMatrix(const ApplyTask& task, size_t place, float* scratch);

// The loop only.
class MatrixQueue {
 public:
  struct Options {
    size_t at_once = 0;
    size_t scratch_elements = 0;  // of each
    float* scratch = nullptr;     // at_once of them
  };
  MatrixQueue(Options options, Workers* workers, std::function<void(absl::Status)> failed);

  // Runs `update` on a worker, first in, first out, then `done` on the loop.
  void Push(std::function<void(float* scratch)> update, std::function<void()> done);

 private:
  struct Work {
    std::function<void(float*)> update;
    std::function<void()> done;
  };
  void Pump();

  const Options options_;
  Workers* const workers_;
  const std::function<void(absl::Status)> failed_;
  std::vector<float*> free_;
  std::deque<Work> waiting_;
};

}  // namespace zerod::engine
