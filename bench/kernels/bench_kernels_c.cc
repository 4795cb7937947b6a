// SPDX-License-Identifier: Apache-2.0
//
// The contenders of compare.py, with C names: each works on [0, n) cut among `threads` threads,
// and returns the seconds that the slowest took.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "bench/kernels/traffic.h"
#include "kernels/cpu/lamb.h"
#include "kernels/cpu/muon.h"
#include "kernels/cpu/optimizers.h"

namespace {

using zerod::kernels::Copy;

constexpr size_t kBlock = 64 * 1024;  // of a layout: what one call of LAMB's first pass gets

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

// The arrays that a step goes over; a and b are the states, where there are any.
struct Arrays {
  const float* g;
  float* p;
  float* a;
  float* b;
  Copy copy;
};

double Adam(int threads, const Arrays& in, size_t n, bool decoupled) {
  const auto s =
      zerod::kernels::MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0, decoupled);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {in.g + at};
    zerod::kernels::AdamW(s, grads, 1, in.p + at, in.a + at, in.b + at, in.copy.At(at), size);
  });
}

double Lion(int threads, const Arrays& in, size_t n) {
  const auto s = zerod::kernels::MakeLionScalars(1e-4, 0.9, 0.99, 0.01, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {in.g + at};
    zerod::kernels::Lion(s, grads, 1, in.p + at, in.a + at, in.copy.At(at), size);
  });
}

double Adagrad(int threads, const Arrays& in, size_t n) {
  const auto s = zerod::kernels::MakeAdagradScalars(1e-4, 0, 1e-10, 0, 1000, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {in.g + at};
    zerod::kernels::Adagrad(s, grads, 1, in.p + at, in.a + at, in.copy.At(at), size);
  });
}

double Sgd(int threads, const Arrays& in, size_t n) {
  const double momentum = in.a == nullptr ? 0.0 : 0.9;
  const auto s = zerod::kernels::MakeSgdScalars(1e-6, momentum, 0, 0, false, 1000, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {in.g + at};
    zerod::kernels::Sgd(s, grads, 1, in.p + at, in.a == nullptr ? nullptr : in.a + at,
                        in.copy.At(at), size);
  });
}

double Lamb(int threads, const Arrays& in, size_t n) {
  const auto s = zerod::kernels::MakeLambScalars({.lr = 1e-6, .weight_decay = 0.01}, 1000, 1.0);
  std::vector<zerod::kernels::LambSquares> squares((n + kBlock - 1) / kBlock);
  // Threads' pieces are cut at blocks.
  const double first = Timed(threads, squares.size() * 32, [&](size_t at, size_t size) {
    for (size_t k = at / 32; k < (at + size) / 32; ++k) {
      const size_t begin = k * kBlock;
      const float* grads[] = {in.g + begin};
      squares[k] = zerod::kernels::LambMoments(s, grads, 1, in.p + begin, in.a + begin,
                                               in.b + begin, std::min(kBlock, n - begin));
    }
  });
  zerod::kernels::LambSquares tensor{0, 0};
  for (const auto& part : squares) {
    tensor.p += part.p;
    tensor.u += part.u;
  }
  const float ratio = zerod::kernels::LambTrustRatio(tensor, 0.01, 10.0);
  return first + Timed(threads, n, [&](size_t at, size_t size) {
           zerod::kernels::LambApply(s, ratio, in.p + at, in.a + at, in.b + at, in.copy.At(at),
                                     size);
         });
}

}  // namespace

extern "C" {

const char* zerod_bench_target() { return zerod::kernels::TargetName(); }

bool zerod_bench_force_target(const char* name) { return zerod::kernels::ForceTarget(name); }

// a, b: the optimizer's states, or null. copy: bfloat16, may be null. Negative where the name is
// none of ours.
double zerod_bench_step(const char* optimizer, int threads, const float* g, float* p, float* a,
                        float* b, uint16_t* copy, size_t n) {
  const Arrays in{g, p, a, b, copy};
  if (std::strcmp(optimizer, "AdamW") == 0) return Adam(threads, in, n, /*decoupled=*/true);
  if (std::strcmp(optimizer, "Adam") == 0) return Adam(threads, in, n, /*decoupled=*/false);
  if (std::strcmp(optimizer, "Lion") == 0) return Lion(threads, in, n);
  if (std::strcmp(optimizer, "Adagrad") == 0) return Adagrad(threads, in, n);
  if (std::strcmp(optimizer, "SGD") == 0) return Sgd(threads, in, n);
  if (std::strcmp(optimizer, "LAMB") == 0) return Lamb(threads, in, n);
  return -1;
}

double zerod_bench_adamw_split(int threads, const float* g, uint16_t* copy, uint16_t* remainder,
                               float* m, float* v, size_t n) {
  const auto s = zerod::kernels::MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0);
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* grads[] = {g + at};
    zerod::kernels::AdamWSplit(s, grads, 1, copy + at, remainder + at, m + at, v + at, size);
  });
}

double zerod_bench_traffic(int threads, size_t reads, size_t updates, bool stream_copy,
                           size_t prefetch_bytes, const float* const* read, float* const* update,
                           uint16_t* copy, size_t n) {
  const zerod::bench::TrafficOptions options = {reads, updates, stream_copy, prefetch_bytes};
  return Timed(threads, n, [&](size_t at, size_t size) {
    const float* read_at[zerod::bench::kReadsMax];
    float* update_at[zerod::bench::kUpdatesMax];
    for (size_t k = 0; k < reads; ++k) read_at[k] = read[k] + at;
    for (size_t k = 0; k < updates; ++k) update_at[k] = update[k] + at;
    zerod::bench::Traffic(options, read_at, update_at, copy == nullptr ? nullptr : copy + at,
                          size);
  });
}

// One thread; u is overwritten.
double zerod_bench_orthogonalize(bool gram, float* u, size_t rows, size_t columns) {
  const auto method =
      gram ? zerod::kernels::NewtonSchulz::kGram : zerod::kernels::NewtonSchulz::kStandard;
  std::vector<float> scratch(zerod::kernels::OrthogonalizeScratch(method, rows, columns));
  return Timed(1, rows * columns, [&](size_t, size_t) {
    zerod::kernels::Orthogonalize(method, u, rows, columns, scratch.data());
  });
}

}  // extern "C"
