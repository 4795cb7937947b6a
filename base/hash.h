// SPDX-License-Identifier: Apache-2.0
//
// A 128-bit hash whose value is the same in every process and on every machine (XXH3 over
// explicitly sized little-endian values), for layouts, configurations and hyper-parameters.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace zerod {

struct Hash128 {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const Hash128&, const Hash128&) = default;
  // 32 lower-case hex digits, most significant first.
  std::string Hex() const;
  // 16 bytes, low first, little-endian.
  std::string Bytes() const;
};

// Feeds values in order; a string is preceded by its length, so ("ab","c") != ("a","bc").
// Not thread-safe.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  Hasher& Add(absl::string_view s);
  Hasher& Add(uint64_t v);
  Hasher& Add(double v);  // by its bits; -0.0 and 0.0 differ, all NaNs are one
  Hash128 Finish() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace zerod
