// SPDX-License-Identifier: Apache-2.0
//
// A master weight kept as bf16 copy plus remainder must come back exactly. There are 2^32
// patterns, so all are tried, on each target, beside the reference and the rule for the copy.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/reference.h"

namespace zerod::kernels {
namespace {

constexpr uint64_t kPatterns = uint64_t{1} << 32;
constexpr uint64_t kBlock = uint64_t{1} << 14;  // all arrays stay in the second-level cache
constexpr int kThreads = 2;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// Sanitizers look for bad accesses, which do not depend on the values.
constexpr uint64_t kStride = 64 * kBlock;
#else
constexpr uint64_t kStride = kBlock;
#endif

struct Arrays {
  std::vector<uint32_t> bits = std::vector<uint32_t>(kBlock);
  std::vector<float> p = std::vector<float>(kBlock), joined = std::vector<float>(kBlock);
  std::vector<uint16_t> copy = std::vector<uint16_t>(kBlock), remainder = copy;
  std::vector<uint16_t> copy2 = copy, remainder2 = copy, rounded = copy;
};

// Returns a description of the first pattern from `first` on that is wrong, or "".
std::string CheckBlock(uint64_t first, Arrays* a) {
  for (uint64_t i = 0; i < kBlock; ++i) a->bits[i] = static_cast<uint32_t>(first + i);
  std::memcpy(a->p.data(), a->bits.data(), kBlock * sizeof(float));
  SplitMaster(a->p.data(), a->copy.data(), a->remainder.data(), kBlock);
  JoinMaster(a->copy.data(), a->remainder.data(), a->joined.data(), kBlock);
  if (std::memcmp(a->joined.data(), a->bits.data(), kBlock * sizeof(float)) != 0) {
    return "Join(Split) is not exact from pattern " + std::to_string(first);
  }
  // An exact Join of the same Split is the same Join: every pair of halves has been seen.
  reference::SplitMaster(a->p.data(), a->copy2.data(), a->remainder2.data(), kBlock);
  if (a->copy != a->copy2 || a->remainder != a->remainder2) {
    return "Split is not the reference's from pattern " + std::to_string(first);
  }
  // The copy is the rounded value but in ties, and NaN where the master is a quiet NaN.
  CastToBf16(a->p.data(), a->rounded.data(), kBlock);
  const uint32_t magnitude_first = static_cast<uint32_t>(first) & 0x7fffffff;
  if (magnitude_first >= 0x7f800000) {
    for (uint64_t i = 0; i < kBlock; ++i) {
      const bool quiet = (a->bits[i] & 0x7fffffff) >= 0x7fc00000;
      if (quiet && a->copy[i] != a->rounded[i]) return "the copy of a quiet NaN is another";
    }
    return "";
  }
  uint32_t wrong = 0;
  for (uint64_t i = 0; i < kBlock; ++i) {
    const uint32_t tie = (a->bits[i] & 0xffff) == 0x8000 ? 1 : 0;
    const uint32_t away = a->copy[i] - a->rounded[i];  // of a tie to even: 0 or 1
    wrong |= away > tie ? 1 : 0;
  }
  return wrong == 0 ? "" : "a copy is not the nearest bf16 from pattern " + std::to_string(first);
}

class SplitTest : public testing::TestWithParam<const char*> {};

TEST_P(SplitTest, ExactForEveryPattern) {
  if (!ForceTarget(GetParam())) GTEST_SKIP() << GetParam() << " is not on this CPU";
  std::vector<std::string> failures(kThreads);
  std::vector<std::thread> threads;
  std::atomic<uint64_t> next{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Arrays arrays;
      while (failures[t].empty()) {
        const uint64_t first = next.fetch_add(kStride);
        if (first >= kPatterns) break;
        failures[t] = CheckBlock(first, &arrays);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  ForceTarget("");
}

// What cannot be kept: 2^32 codes for 2^32 patterns leave no NaN copy for 65535 NaNs of either
// sign. They are signalling ones, which arithmetic never gives.
TEST_P(SplitTest, OnlySignallingNansLoseTheirCopy) {
  if (!ForceTarget(GetParam())) GTEST_SKIP() << GetParam() << " is not on this CPU";
  for (uint32_t sign : {0u, 0x80000000u}) {
    std::vector<uint32_t> bits;
    for (uint32_t b = 0x7f800001; b <= 0x7f820000; ++b) bits.push_back(b | sign);
    for (uint32_t b = 0x7ffe0000; b <= 0x7fffffff; ++b) bits.push_back(b | sign);
    std::vector<float> p(bits.size());
    std::memcpy(p.data(), bits.data(), bits.size() * sizeof(float));
    std::vector<uint16_t> copy(bits.size()), remainder(bits.size());
    SplitMaster(p.data(), copy.data(), remainder.data(), bits.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      const bool lost = (bits[i] & 0x7fffffff) < 0x7f810000;
      ASSERT_EQ((copy[i] & 0x7fff) > 0x7f80, !lost) << std::hex << bits[i];
    }
  }
  ForceTarget("");
}

std::string ParamName(const testing::TestParamInfo<const char*>& info) { return info.param; }
INSTANTIATE_TEST_SUITE_P(Targets, SplitTest, testing::Values("SCALAR", "NEON", "AVX2", "AVX3"),
                         ParamName);

}  // namespace
}  // namespace zerod::kernels
