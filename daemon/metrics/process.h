// SPDX-License-Identifier: Apache-2.0
//
// What prometheus-cpp does not tell of the process itself: read from /proc at every scrape.
// Private to daemon/metrics.
#pragma once

#include <chrono>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace zerod::metrics {

class ProcessCollectable : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace zerod::metrics
