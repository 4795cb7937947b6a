// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/process.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace zerod::metrics {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily Family(const std::string& name, const std::string& help, MetricType type,
                    double value) {
  MetricFamily family{name, help, type, {}};
  prometheus::ClientMetric metric;
  if (type == MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(metric);
  return family;
}

double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  double size = 0;
  double resident = 0;
  statm >> size >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

double OpenFds() {
  DIR* const dir = opendir("/proc/self/fd");
  if (dir == nullptr) return 0;
  double entries = 0;
  while (readdir(dir) != nullptr) ++entries;
  closedir(dir);
  return entries - 3;  // ".", ".." and the directory itself
}

double CpuSeconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

}  // namespace

std::vector<MetricFamily> ProcessCollectable::Collect() const {
  const double uptime =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  return {
      Family("zerod_uptime_seconds", "Seconds since the daemon started.", MetricType::Gauge,
             uptime),
      Family("process_resident_memory_bytes", "Resident memory of the daemon, shared included.",
             MetricType::Gauge, ResidentBytes()),
      Family("process_open_fds", "Open file descriptors of the daemon.", MetricType::Gauge,
             OpenFds()),
      Family("process_cpu_seconds_total", "User and system CPU time of the daemon.",
             MetricType::Counter, CpuSeconds()),
  };
}

}  // namespace zerod::metrics
