// SPDX-License-Identifier: Apache-2.0
#include "base/hash.h"

#include <xxhash.h>

#include <bit>
#include <cmath>

#include "base/check.h"

namespace zerod {
namespace {

constexpr uint64_t kNanBits = 0x7ff8000000000000;  // what every NaN is hashed as

std::array<char, 8> LittleEndian(uint64_t v) {
  std::array<char, 8> bytes;
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(v >> (8 * i));
  return bytes;
}

}  // namespace

std::string Hash128::Hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex(32, '0');
  for (int i = 0; i < 16; ++i) {
    hex[i] = kDigits[(high >> (60 - 4 * i)) & 15];
    hex[16 + i] = kDigits[(low >> (60 - 4 * i)) & 15];
  }
  return hex;
}

std::string Hash128::Bytes() const {
  std::string bytes;
  for (uint64_t half : {low, high}) {
    const std::array<char, 8> le = LittleEndian(half);
    bytes.append(le.data(), le.size());
  }
  return bytes;
}

struct Hasher::State {
  // Allocated by the library: its type wants 64-byte alignment.
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
  void Update(const void* data, size_t bytes) {
    CHECK(XXH3_128bits_update(xxh, data, bytes) == XXH_OK);
  }
};

Hasher::Hasher() : state_(std::make_unique<State>()) {
  CHECK(state_->xxh != nullptr) << "out of memory";
  CHECK(XXH3_128bits_reset(state_->xxh) == XXH_OK);
}

Hasher::~Hasher() = default;

Hasher& Hasher::Add(absl::string_view s) {
  Add(static_cast<uint64_t>(s.size()));
  if (!s.empty()) state_->Update(s.data(), s.size());
  return *this;
}

Hasher& Hasher::Add(uint64_t v) {
  const std::array<char, 8> bytes = LittleEndian(v);
  state_->Update(bytes.data(), bytes.size());
  return *this;
}

Hasher& Hasher::Add(double v) {
  return Add(std::isnan(v) ? kNanBits : std::bit_cast<uint64_t>(v));
}

Hash128 Hasher::Finish() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_->xxh);
  return Hash128{.low = hash.low64, .high = hash.high64};
}

}  // namespace zerod
