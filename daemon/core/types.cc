// SPDX-License-Identifier: Apache-2.0
#include "daemon/core/types.h"

namespace zerod::core {

Hash128 HyperParameters::Hash() const {
  Hasher h;
  h.Add(max_norm).Add(loss_scale).Add(uint64_t{groups.size()});
  for (const Group& g : groups) {
    h.Add(g.lr).Add(g.beta1).Add(g.beta2).Add(g.eps).Add(g.weight_decay);
  }
  return h.Finish();
}

}  // namespace zerod::core
