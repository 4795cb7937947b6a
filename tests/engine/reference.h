// SPDX-License-Identifier: Apache-2.0
//
// The same training without a daemon: plain loops over whole units, in the documented order of
// sums. What the engine's bits are compared with.
#pragma once

#include <vector>

#include "daemon/core/job.h"
#include "daemon/core/layout.h"
#include "tests/engine/cluster.h"

namespace zerod::engine::testing {

// What every rank does in a step: which gradients it makes, from the weights it sees.
struct Workload {
  uint32_t micro_steps = 1;
  uint64_t steps_before = 0;  // that an earlier job has made
  bool skip_some = true;  // some ranks leave out some parameters, all leave out some in odd steps
  core::HyperParameters hyper;
};
bool Touches(const Workload& workload, uint64_t step, uint32_t rank, uint32_t parameter);
std::vector<float> Gradient(const core::Layout& layout, uint32_t parameter,
                            const std::vector<float>& unit_values, uint64_t step, uint32_t rank,
                            uint32_t micro);
std::vector<float> InitialValues(const core::Layout& layout, core::UnitIndex u);
Workload DefaultWorkload();

class Reference {
 public:
  Reference(const core::Layout* layout, uint32_t members, uint32_t local_world, bool node_sum,
            const core::StateForm& form = {});
  void Step(const Workload& workload);

  // As a client sees them: rounded to the layout's dtype.
  std::vector<float> Seen(core::UnitIndex u) const;
  const std::vector<float>& master(core::UnitIndex u) const { return master_[u]; }
  const std::vector<float>& moment(int which, core::UnitIndex u) const {
    return moments_[which][u];
  }
  double grad_norm() const { return grad_norm_; }

 private:
  // What the form does not keep in fp32 is rounded after each step.
  void Keep(const core::Parameter& p);
  void Update(const core::Parameter& p, const core::HyperParameters& hyper, uint64_t t,
              double scale, const float* gradient);
  // By the kernels of adaptive.h and asgd_rprop.h.
  void UpdateAdaptively(const core::Parameter& p, const core::Group& group, uint64_t t,
                        double scale, const float* gradient);
  void UpdateByLamb(const core::Parameter& p, const core::Group& group, uint64_t t, double scale,
                    const float* gradient);
  void UpdateByMuon(const core::Parameter& p, const core::Group& group, double scale,
                    const float* gradient);
  const core::StateForm form_;
  // To the layout's dtype and back.
  float Rounded(float value) const;
  void Send(core::MemberIndex from, const core::Parameter& p, std::vector<float>* sum) const;
  // Sum over all ranks of the gradient of one parameter; false: nobody touched it.
  bool SumOf(const Workload& workload, uint32_t parameter, std::vector<float>* sum) const;

  const core::Layout* const layout_;
  const core::Partition partition_;
  const uint32_t members_;
  const uint32_t local_world_;
  const bool node_sum_;
  uint64_t step_ = 1;
  std::vector<std::vector<float>> master_;
  std::vector<std::vector<float>> moments_[core::kStateTensorsMax];
  std::vector<uint64_t> parameter_steps_;
  double grad_norm_ = 0;
};

// One rank's part of `steps` steps of `workload`; rank 0 PUTs the initial weights first where
// `fresh`. CHECKs that all goes well and that what is gathered is `reference`'s where given.
void Train(const core::Layout& layout, uint32_t rank, FakeClient& client, const Workload& workload,
           uint64_t steps, bool fresh, std::vector<double>* norms = nullptr);
void PutInitial(const core::Layout& layout, FakeClient& client);
// One step up to, but without, STEP.
absl::Status Backward(const core::Layout& layout, uint32_t rank, FakeClient& client,
                      const Workload& workload);

// Everything that the job keeps, read by one client: per unit master and the states.
struct JobState {
  std::vector<std::vector<float>> arrays[1 + core::kStateTensorsMax];
  friend bool operator==(const JobState&, const JobState&) = default;
};
// Puts all of `state` into a job that has trained nothing. Between two barriers.
void PutState(const core::Layout& layout, FakeClient& client, const JobState& state);
JobState ReadState(const core::Layout& layout, FakeClient& client);
JobState StateOf(const core::Layout& layout, const Reference& reference);

}  // namespace zerod::engine::testing
