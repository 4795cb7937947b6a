// SPDX-License-Identifier: Apache-2.0
//
// One figure per kernel, over arrays that no cache holds. compare.py sets the optimizers beside
// torch.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "bench/kernels/traffic.h"
#include "kernels/cpu/muon.h"
#include "kernels/cpu/optimizers.h"

namespace zerod::kernels {
namespace {

constexpr size_t kSize = size_t{16} << 20;

template <class T>
struct Array {
  explicit Array(T value)
      : data(static_cast<T*>(std::aligned_alloc(2 << 20, kSize * sizeof(T))), &std::free) {
    for (size_t i = 0; i < kSize; ++i) data.get()[i] = value;
  }
  T* get() const { return data.get(); }
  std::unique_ptr<T, void (*)(void*)> data;
};

void Report(benchmark::State& state, size_t bytes_per_element) {
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * kSize * bytes_per_element));
  state.SetItemsProcessed(static_cast<int64_t>(state.iterations() * kSize));
  state.SetLabel(TargetName());
}

// Arguments: gradients, with the 16-bit copy or without.
void BM_AdamW(benchmark::State& state) {
  const size_t count = static_cast<size_t>(state.range(0));
  const bool with_copy = state.range(1) != 0;
  std::vector<Array<float>> arrays;
  for (size_t k = 0; k < count; ++k) arrays.emplace_back(0.01f);
  std::vector<const float*> grads;
  for (const auto& array : arrays) grads.push_back(array.get());
  const Array<float> p(1.0f), m(0.01f), v(0.0001f);
  const Array<bfloat16> copy(0);
  const AdamWScalars s = MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0);
  for (auto _ : state) {
    AdamW(s, grads.data(), count, p.get(), m.get(), v.get(), with_copy ? copy.get() : nullptr,
          kSize);
  }
  Report(state, 4 * count + 24 + (with_copy ? 2 : 0));
}
BENCHMARK(BM_AdamW)->ArgsProduct({{1, 2, 3, 4, 8}, {0, 1}})->Unit(benchmark::kMillisecond);

void BM_AdamWSplit(benchmark::State& state) {
  const Array<float> g(0.01f), m(0.01f), v(0.0001f);
  const Array<bfloat16> copy(0x3f80);
  const Array<uint16_t> remainder(0);
  const AdamWScalars s = MakeAdamWScalars(1e-4, 0.9, 0.999, 1e-8, 0.01, 1000, 1.0);
  const float* grads[] = {g.get()};
  for (auto _ : state) {
    AdamWSplit(s, grads, 1, copy.get(), remainder.get(), m.get(), v.get(), kSize);
  }
  Report(state, 28);
}
BENCHMARK(BM_AdamWSplit)->Unit(benchmark::kMillisecond);

void BM_Traffic(benchmark::State& state) {
  const Array<float> g(0.01f), p(1.0f), m(0.01f), v(0.0001f);
  const Array<uint16_t> copy(0);
  const bench::TrafficOptions options = {1, 3, state.range(0) != 0,
                                         static_cast<size_t>(state.range(1))};
  const float* read[] = {g.get()};
  float* update[] = {p.get(), m.get(), v.get()};
  for (auto _ : state) bench::Traffic(options, read, update, copy.get(), kSize);
  Report(state, 30);
}
BENCHMARK(BM_Traffic)->ArgsProduct({{0, 1}, {0, 512, 1024, 2048}})->Unit(benchmark::kMillisecond);

void BM_SquaredNorm(benchmark::State& state) {
  const size_t count = static_cast<size_t>(state.range(0));
  std::vector<Array<float>> arrays;
  for (size_t k = 0; k < count; ++k) arrays.emplace_back(0.01f);
  std::vector<const float*> in;
  for (const auto& array : arrays) in.push_back(array.get());
  bool nonfinite = false;
  for (auto _ : state) {
    benchmark::DoNotOptimize(SquaredNorm(in.data(), count, kSize, &nonfinite));
  }
  Report(state, 4 * count);
}
BENCHMARK(BM_SquaredNorm)->Arg(1)->Arg(2)->Arg(4)->Unit(benchmark::kMillisecond);

template <class T>
void BM_Sum(benchmark::State& state) {
  const size_t count = static_cast<size_t>(state.range(0));
  std::vector<Array<T>> arrays;
  for (size_t k = 0; k < count; ++k) arrays.emplace_back(T{});
  std::vector<const T*> in;
  for (const auto& array : arrays) in.push_back(array.get());
  const Array<float> out(0.0f);
  for (auto _ : state) Sum(in.data(), count, out.get(), kSize);
  Report(state, sizeof(T) * count + 4);
}
BENCHMARK_TEMPLATE(BM_Sum, float)->Arg(2)->Arg(4)->Arg(8)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(BM_Sum, bfloat16)->Arg(2)->Arg(4)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(BM_Sum, float16)->Arg(2)->Arg(4)->Unit(benchmark::kMillisecond);

template <class T>
void BM_Accumulate(benchmark::State& state) {
  const Array<T> in(T{});
  const Array<float> out(1.0f);
  for (auto _ : state) Accumulate(in.get(), out.get(), kSize);
  Report(state, sizeof(T) + 8);
}
BENCHMARK_TEMPLATE(BM_Accumulate, float)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(BM_Accumulate, bfloat16)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(BM_Accumulate, float16)->Unit(benchmark::kMillisecond);

void BM_CastToBf16(benchmark::State& state) {
  const Array<float> in(1.0f);
  const Array<bfloat16> out(0);
  for (auto _ : state) CastToBf16(in.get(), out.get(), kSize);
  Report(state, 6);
}
BENCHMARK(BM_CastToBf16)->Unit(benchmark::kMillisecond);

void BM_CastToFp16(benchmark::State& state) {
  const Array<float> in(1.0f);
  const Array<float16> out(float16{});
  for (auto _ : state) CastToFp16(in.get(), out.get(), kSize);
  Report(state, 6);
}
BENCHMARK(BM_CastToFp16)->Unit(benchmark::kMillisecond);

// One square matrix; the rate is that of the operations which a product without symmetry has.
void BM_Orthogonalize(benchmark::State& state) {
  const size_t side = static_cast<size_t>(state.range(0));
  const NewtonSchulz method = NewtonSchulz::kStandard;
  std::vector<float> u(side * side), scratch(OrthogonalizeScratch(method, side, side));
  for (size_t i = 0; i < u.size(); ++i) u[i] = static_cast<float>(i % 1009) - 504.0f;
  for (auto _ : state) Orthogonalize(method, u.data(), side, side, scratch.data());
  const double operations = 30.0 * static_cast<double>(side * side * side);
  state.counters["flops"] =
      benchmark::Counter(operations, benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel(TargetName());
}
BENCHMARK(BM_Orthogonalize)->Arg(256)->Arg(1024)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace zerod::kernels
