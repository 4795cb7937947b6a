// SPDX-License-Identifier: Apache-2.0
#include "bench/kernels/traffic.h"

#include <type_traits>

#include "base/check.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/kernels/traffic.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace zerod::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <size_t kReads, size_t kUpdates>
struct Arrays {
  const uint32_t* read[kReads];
  uint32_t* update[kUpdates];
  uint16_t* copy;
};

template <size_t kReads, size_t kUpdates, bool kCopy, bool kStream, bool kPrefetch>
struct Way {};

// `nothing` is 0, which the compiler does not know.
template <size_t kReads, size_t kUpdates, bool kCopy, bool kStream, bool kPrefetch>
void Loop(Way<kReads, kUpdates, kCopy, kStream, kPrefetch>, uint32_t nothing, size_t ahead,
          const Arrays<kReads, kUpdates>& in, size_t n) {
  const hn::ScalableTag<uint32_t> d;
  const hn::Rebind<uint16_t, decltype(d)> dh;
  const size_t lanes = hn::Lanes(d);
  const auto mask = hn::Set(d, nothing);
  const Arrays<kReads, kUpdates> at = in;
  // All but the first array that is updated, whose new value is returned.
  const auto element = [&](size_t i) HWY_ATTR {
    auto value = hn::LoadU(d, at.read[0] + i);
    if constexpr (kReads > 1) value = hn::Or(value, hn::LoadU(d, at.read[1] + i));
    const auto zero = hn::And(value, mask);
    for (size_t k = 1; k < kUpdates; ++k) {
      hn::StoreU(hn::Or(hn::LoadU(d, at.update[k] + i), zero), d, at.update[k] + i);
    }
    return hn::Or(hn::LoadU(d, at.update[0] + i), zero);
  };
  for (size_t i = 0; i < n; i += 2 * lanes) {
    if constexpr (kPrefetch) {
      for (size_t j = i; j < i + 2 * lanes; j += 16) {
        for (const uint32_t* array : at.read) hwy::Prefetch(array + j + ahead / 4);
        for (const uint32_t* array : at.update) hwy::Prefetch(array + j + ahead / 4);
      }
    }
    const auto low = element(i);
    const auto high = element(i + lanes);
    hn::StoreU(low, d, at.update[0] + i);
    hn::StoreU(high, d, at.update[0] + i + lanes);
#if HWY_TARGET == HWY_SCALAR
    if constexpr (kCopy) {
      at.copy[i] = static_cast<uint16_t>(hn::GetLane(low) >> 16);
      at.copy[i + 1] = static_cast<uint16_t>(hn::GetLane(high) >> 16);
    }
    (void)dh;
#else
    const hn::Twice<decltype(dh)> dh2;
    if constexpr (kCopy) {
      const auto both = hn::Combine(dh2, hn::TruncateTo(dh, hn::ShiftRight<16>(high)),
                                    hn::TruncateTo(dh, hn::ShiftRight<16>(low)));
      if constexpr (kStream) {
        hn::Stream(both, dh2, at.copy + i);
      } else {
        hn::StoreU(both, dh2, at.copy + i);
      }
    }
#endif
  }
  if constexpr (kStream) hwy::FlushStream();
}

template <size_t kReads, size_t kUpdates>
void Run(const TrafficOptions& o, uint32_t nothing, const float* const* read,
         float* const* update, uint16_t* copy, size_t n) {
  Arrays<kReads, kUpdates> arrays;
  for (size_t k = 0; k < kReads; ++k) {
    arrays.read[k] = reinterpret_cast<const uint32_t*>(read[k]);
  }
  for (size_t k = 0; k < kUpdates; ++k) {
    arrays.update[k] = reinterpret_cast<uint32_t*>(update[k]);
  }
  arrays.copy = copy;
  const size_t ahead = o.prefetch_bytes;
  const auto run = [&](auto has_copy, auto stream) {
    constexpr bool kCopy = decltype(has_copy)::value, kStream = decltype(stream)::value;
    if (ahead == 0) {
      Loop(Way<kReads, kUpdates, kCopy, kStream, false>(), nothing, 0, arrays, n);
    } else {
      Loop(Way<kReads, kUpdates, kCopy, kStream, true>(), nothing, ahead, arrays, n);
    }
  };
  if (copy == nullptr) return run(std::false_type(), std::false_type());
  if (!o.stream_copy) return run(std::true_type(), std::false_type());
  return run(std::true_type(), std::true_type());
}

void TrafficImpl(const TrafficOptions& o, uint32_t nothing, const float* const* read,
                 float* const* update, uint16_t* copy, size_t n) {
  switch (10 * o.reads + o.updates) {
    case 11: return Run<1, 1>(o, nothing, read, update, copy, n);
    case 12: return Run<1, 2>(o, nothing, read, update, copy, n);
    case 13: return Run<1, 3>(o, nothing, read, update, copy, n);
    case 21: return Run<2, 1>(o, nothing, read, update, copy, n);
    case 22: return Run<2, 2>(o, nothing, read, update, copy, n);
    case 23: return Run<2, 3>(o, nothing, read, update, copy, n);
    default: CHECK(false) << o.reads << " reads, " << o.updates << " updates";
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace zerod::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::bench {

HWY_EXPORT(TrafficImpl);

void Traffic(const TrafficOptions& options, const float* const* read, float* const* update,
             uint16_t* copy, size_t n) {
  static volatile uint32_t nothing = 0;
  HWY_DYNAMIC_DISPATCH(TrafficImpl)(options, nothing, read, update, copy, n);
}

}  // namespace zerod::bench
#endif  // HWY_ONCE
