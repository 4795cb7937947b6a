// SPDX-License-Identifier: Apache-2.0
//
// Numbers whose every operation leaves a trace: weights and gradients of the simulation are 64-bit
// hashes, so that a gradient added twice, left out, taken from another step or added in another
// order gives another value.
#pragma once

#include <cstdint>

namespace zerod::sim {

// Neither commutative nor associative.
constexpr uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ 0x9e3779b97f4a7c15) * 0xff51afd7ed558ccd + b;
  x ^= x >> 32;
  x *= 0xc4ceb9fe1a85ec53;
  x ^= x >> 29;
  return x;
}

template <typename... Rest>
constexpr uint64_t Hash(uint64_t first, Rest... rest) {
  uint64_t h = Mix(0, first);
  ((h = Mix(h, static_cast<uint64_t>(rest))), ...);
  return h;
}

// A (partial) sum of gradients. `any` false: nothing was added, a zero.
struct Gradient {
  bool any = false;
  bool nonfinite = false;
  uint64_t sum = 0;    // what was added, in whatever order
  uint64_t order = 0;  // in which order
  friend bool operator==(const Gradient&, const Gradient&) = default;
};

inline Gradient Add(const Gradient& a, const Gradient& b) {
  if (!a.any) return b;
  if (!b.any) return a;
  return {true, a.nonfinite || b.nonfinite, a.sum + b.sum, Mix(a.order, b.order)};
}

// What one parameter's gradient is, of its fragments in order.
inline Gradient Join(const Gradient& a, const Gradient& b) {
  return {a.any || b.any, a.nonfinite || b.nonfinite, Mix(a.sum, b.sum), Mix(a.order, b.order)};
}

// As a script reads it.
inline uint64_t Read(const Gradient& g) { return g.any ? Hash(g.sum, g.order) : 0; }

// Its share of the squared norm: a small integer, so that sums of them are exact in any order.
inline double Square(const Gradient& g) {
  return g.any ? static_cast<double>(1 + (g.order & 1023)) : 0.0;
}

// The optimizer, of weights and of its state. The weight's is computed first.
constexpr uint64_t Apply(uint64_t weight, const Gradient& g, uint64_t state,
                         uint64_t parameter_steps) {
  return Hash(weight, g.sum, g.order, state, parameter_steps);
}
constexpr uint64_t ApplyState(uint64_t state, const Gradient& g, uint64_t step) {
  return Hash(state, g.sum, g.order, step);
}

// An optimizer by tensor. The first pass gives its state, and a piece's squares, small integers as
// above.
constexpr double WeightSquare(uint64_t weight, uint64_t begin) {
  return static_cast<double>(1 + (Hash(weight, begin) & 1023));
}
constexpr double UpdateSquare(uint64_t state, uint64_t begin) {
  return static_cast<double>(1 + (Hash(state, begin, 1) & 1023));
}
// The second, from the sums of the tensor's pieces.
constexpr uint64_t ApplyByTensor(uint64_t weight, uint64_t state, double weight_square,
                                 double update_square, uint64_t parameter_steps) {
  return Hash(weight, state, static_cast<uint64_t>(weight_square),
              static_cast<uint64_t>(update_square), parameter_steps);
}

// One generator per purpose, each a function of the seed: changing how one is used leaves the
// others as they were.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // [0, n), n > 0.
  uint64_t Below(uint64_t n) { return Next() % n; }
  // [low, high].
  uint64_t Between(uint64_t low, uint64_t high) { return low + Below(high - low + 1); }
  bool Percent(uint64_t p) { return Below(100) < p; }

 private:
  uint64_t state_;
};

}  // namespace zerod::sim
