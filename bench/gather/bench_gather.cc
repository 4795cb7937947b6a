// SPDX-License-Identifier: Apache-2.0
//
// What a valid Gather and its Release cost in libzerod_client, for a resident unit and for one
// that is guarded, and how fast gradients land. The daemon's side is in this process and idle.
#include <cstdlib>
#include <vector>

#include "base/check.h"
#include "benchmark/benchmark.h"
#include "client/cpp/land.h"
#include "tests/client/fake_daemon.h"

namespace zerod::client {
namespace {

void GatherRelease(benchmark::State& state, uint32_t unit, bool guard_pages) {
  AttachPlan plan = FakeDaemon::MakePlan();
  plan.guard_pages = guard_pages;
  FakeDaemon daemon(plan);
  daemon.SetHandler([](const shm::SubmitEntry&) { return FakeDaemon::Reply{}; });
  for (uint32_t u = 0; u < plan.units.size(); ++u) {
    daemon.Publish(u, 0, static_cast<uint32_t>(plan.units[u].first_chunk), 1.0f);
  }
  auto client = daemon.Attach();
  for (auto _ : state) {
    const absl::Status status = client->Gather(unit);
    CHECK(status.ok()) << status;
    client->Release(unit);
  }
  CHECK(client->counters().gather_waits == 0) << "a request was made";
}
BENCHMARK_CAPTURE(GatherRelease, resident, 0u, true);
// With a RELEASE hint to the daemon, whose thread shares the machine.
BENCHMARK_CAPTURE(GatherRelease, evictable, 1u, false);
BENCHMARK_CAPTURE(GatherRelease, evictable_guarded, 1u, true);

void GatherHeld(benchmark::State& state) {
  FakeDaemon daemon;
  daemon.Publish(0, 0, 0, 1.0f);
  auto client = daemon.Attach();
  for (auto _ : state) benchmark::DoNotOptimize(client->TryGather(0));
}
BENCHMARK(GatherHeld);

template <bool kAdd, DType kType>
void Land(benchmark::State& state) {
  const auto count = static_cast<uint64_t>(state.range(0));
  auto* to = static_cast<float*>(aligned_alloc(64, count * sizeof(float)));
  std::fill_n(to, count, 0.0f);
  std::vector<float> from(count, 1.0f);
  for (auto _ : state) {
    if (kAdd) {
      LandAdd(to, from.data(), kType, count);
    } else {
      LandCopy(to, from.data(), kType, count);
    }
    benchmark::ClobberMemory();
  }
  state.counters["ns/element"] = benchmark::Counter(
      static_cast<double>(count) * 1e-9 * static_cast<double>(state.iterations()),
      benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  free(to);
}
BENCHMARK(Land<false, DType::kFloat32>)->Name("LandCopy/float32")->Arg(1 << 14)->Arg(1 << 23);
BENCHMARK(Land<true, DType::kFloat32>)->Name("LandAdd/float32")->Arg(1 << 14)->Arg(1 << 23);
BENCHMARK(Land<false, DType::kBFloat16>)->Name("LandCopy/bfloat16")->Arg(1 << 14)->Arg(1 << 23);
BENCHMARK(Land<true, DType::kBFloat16>)->Name("LandAdd/bfloat16")->Arg(1 << 14)->Arg(1 << 23);

}  // namespace
}  // namespace zerod::client

BENCHMARK_MAIN();
