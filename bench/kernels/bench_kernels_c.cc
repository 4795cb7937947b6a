// SPDX-License-Identifier: Apache-2.0
//
// The contenders of compare.py, with C names: each works on [0, n) cut among `threads` threads,
// and returns the seconds that the slowest took.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <thread>
#include <vector>

#include "bench/kernels/traffic.h"
#include "kernels/cpu/optimizers.h"

namespace {

// n per thread is rounded to whole cache lines of the 16-bit copy.
template <class Work>
double Timed(int threads, size_t n, const Work& work) {
  using Clock = std::chrono::steady_clock;
  const size_t piece = (n / threads + 31) / 32 * 32;
  std::barrier ready(threads);
  std::vector<double> seconds(threads);
  const auto body = [&](int t) {
    const size_t begin = std::min(n, t * piece), end = std::min(n, begin + piece);
    ready.arrive_and_wait();
    const auto start = Clock::now();
    work(begin, end - begin);
    seconds[t] = std::chrono::duration<double>(Clock::now() - start).count();
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (std::thread& other : others) other.join();
  return *std::max_element(seconds.begin(), seconds.end());
}

}  // namespace

extern "C" {

const char* zerod_bench_target() { return zerod::kernels::TargetName(); }

bool zerod_bench_force_target(const char* name) { return zerod::kernels::ForceTarget(name); }

// copy: may be null.
double zerod_bench_adamw(int threads, const float* g, float* p, float* m, float* v,
                         uint16_t* copy, size_t n) {
  const auto s = zerod::kernels::MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {g + at};
    zerod::kernels::AdamW(s, grads, 1, p + at, m + at, v + at,
                          copy == nullptr ? nullptr : copy + at, size);
  });
}

double zerod_bench_adamw_split(int threads, const float* g, uint16_t* copy, uint16_t* remainder,
                               float* m, float* v, size_t n) {
  const auto s = zerod::kernels::MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {g + at};
    zerod::kernels::AdamWSplit(s, grads, 1, copy + at, remainder + at, m + at, v + at, size);
  });
}

double zerod_bench_traffic(int threads, bool stream_copy, size_t prefetch_bytes, const float* g,
                           float* p, float* m, float* v, uint16_t* copy, size_t n) {
  const zerod::bench::TrafficOptions options = {copy != nullptr, stream_copy, prefetch_bytes};
  return Timed(threads, n, [&](size_t at, size_t size) {
    zerod::bench::Traffic(options, g + at, p + at, m + at, v + at,
                          copy == nullptr ? nullptr : copy + at, size);
  });
}

}  // extern "C"
