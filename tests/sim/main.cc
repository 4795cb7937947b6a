// SPDX-License-Identifier: Apache-2.0
//
// sim_test [--seed N] [--schedules N] [--first N] [--trace]
// Runs schedules of consecutive seeds (ZEROD_SIM_SCHEDULES, else 10,000) and stops at the first
// that breaks an invariant. `--seed N --trace` runs that one again and tells what happens.
#include <csignal>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/sim/world.h"

#ifndef ZEROD_GIT_SHA
#define ZEROD_GIT_SHA "unknown"
#endif

namespace {

unsigned long long g_seed = 0;

void OnAbort(int) {
  // A CHECK of core has said what is wrong.
  std::fprintf(stderr, "VIOLATION seed=%llu git=%s: a CHECK of daemon/core failed\n", g_seed,
               ZEROD_GIT_SHA);
  std::fflush(stderr);
  std::_Exit(1);
}

// False: an invariant is broken.
bool RunOne(uint64_t seed, bool trace, uint64_t* events) {
  g_seed = seed;
  const zerod::sim::Scenario scenario = zerod::sim::Scenario::FromSeed(seed);
  if (trace) std::printf("%s\n", scenario.Text().c_str());
  zerod::sim::World world(scenario, trace);
  try {
    world.Run();
  } catch (const zerod::sim::Violation& v) {
    std::fprintf(stderr,
                 "VIOLATION seed=%llu git=%s: %s\n  %s\n  again: sim_test --seed %llu --trace\n",
                 g_seed, ZEROD_GIT_SHA, v.text.c_str(), scenario.Text().c_str(), g_seed);
    return false;
  }
  *events += world.events();
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t first = 1;
  uint64_t schedules = 10000;
  bool trace = false;
  if (const char* text = std::getenv("ZEROD_SIM_SCHEDULES")) {
    schedules = std::strtoull(text, nullptr, 10);
  }
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const uint64_t value = i + 1 < argc ? std::strtoull(argv[i + 1], nullptr, 10) : 0;
    if (arg == "--trace") {
      trace = true;
    } else if (arg == "--seed" && i + 1 < argc) {
      first = value;
      schedules = 1;
      ++i;
    } else if (arg == "--first" && i + 1 < argc) {
      first = value;
      ++i;
    } else if (arg == "--schedules" && i + 1 < argc) {
      schedules = value;
      ++i;
    } else {
      std::fprintf(stderr, "usage: sim_test [--seed N] [--first N] [--schedules N] [--trace]\n");
      return 2;
    }
  }
  std::signal(SIGABRT, OnAbort);
  const auto start = std::chrono::steady_clock::now();
  uint64_t events = 0;
  for (uint64_t i = 0; i < schedules; ++i) {
    if (!RunOne(first + i, trace, &events)) return 1;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("seed=%llu..%llu git=%s: %llu schedules, %llu events, %.1f s, %.0f schedules/s\n",
              static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(first + schedules - 1), ZEROD_GIT_SHA,
              static_cast<unsigned long long>(schedules), static_cast<unsigned long long>(events),
              seconds, static_cast<double>(schedules) / seconds);
  return 0;
}
