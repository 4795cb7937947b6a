// SPDX-License-Identifier: Apache-2.0
#include "bench/kernels/traffic.h"

#include <type_traits>

#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_BROKEN_EMU128 1
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

// `nothing` is 0, which the compiler does not know.
template <bool kCopy, bool kStream, bool kPrefetch>
void Loop(uint32_t nothing, size_t ahead, const uint32_t* g, uint32_t* p, uint32_t* m, uint32_t* v,
          uint16_t* copy, size_t n) {
  const hn::ScalableTag<uint32_t> d;
  const hn::Rebind<uint16_t, decltype(d)> dh;
  const size_t lanes = hn::Lanes(d);
  const auto mask = hn::Set(d, nothing);
  const auto element = [&](size_t i) HWY_ATTR {
    const auto gradient = hn::And(hn::LoadU(d, g + i), mask);
    hn::StoreU(hn::Or(hn::LoadU(d, m + i), gradient), d, m + i);
    hn::StoreU(hn::Or(hn::LoadU(d, v + i), gradient), d, v + i);
    return hn::Or(hn::LoadU(d, p + i), gradient);
  };
  for (size_t i = 0; i < n; i += 2 * lanes) {
    if constexpr (kPrefetch) {
      for (size_t j = i; j < i + 2 * lanes; j += 16) {
        hwy::Prefetch(g + j + ahead / 4);
        hwy::Prefetch(p + j + ahead / 4);
        hwy::Prefetch(m + j + ahead / 4);
        hwy::Prefetch(v + j + ahead / 4);
      }
    }
    const auto low = element(i);
    const auto high = element(i + lanes);
    hn::StoreU(low, d, p + i);
    hn::StoreU(high, d, p + i + lanes);
#if HWY_TARGET == HWY_SCALAR
    if constexpr (kCopy) {
      copy[i] = static_cast<uint16_t>(hn::GetLane(low) >> 16);
      copy[i + 1] = static_cast<uint16_t>(hn::GetLane(high) >> 16);
    }
    (void)dh;
#else
    const hn::Twice<decltype(dh)> dh2;
    if constexpr (kCopy) {
      const auto both = hn::Combine(dh2, hn::TruncateTo(dh, hn::ShiftRight<16>(high)),
                                    hn::TruncateTo(dh, hn::ShiftRight<16>(low)));
      if constexpr (kStream) {
        hn::Stream(both, dh2, copy + i);
      } else {
        hn::StoreU(both, dh2, copy + i);
      }
    }
#endif
  }
  if constexpr (kStream) hwy::FlushStream();
}

void TrafficImpl(const TrafficOptions& o, uint32_t nothing, const uint32_t* g, uint32_t* p,
                 uint32_t* m, uint32_t* v, uint16_t* copy, size_t n) {
  const auto run = [&](auto has_copy, auto stream) {
    const size_t ahead = o.prefetch_bytes;
    if (ahead == 0) {
      Loop<decltype(has_copy)::value, decltype(stream)::value, false>(nothing, 0, g, p, m, v, copy,
                                                                      n);
    } else {
      Loop<decltype(has_copy)::value, decltype(stream)::value, true>(nothing, ahead, g, p, m, v,
                                                                     copy, n);
    }
  };
  if (!o.copy) return run(std::false_type(), std::false_type());
  if (!o.stream_copy) return run(std::true_type(), std::false_type());
  return run(std::true_type(), std::true_type());
}

}  // namespace HWY_NAMESPACE
}  // namespace zerod::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace zerod::bench {

HWY_EXPORT(TrafficImpl);

void Traffic(const TrafficOptions& options, const float* g, float* p, float* m, float* v,
             uint16_t* copy, size_t n) {
  static volatile uint32_t nothing = 0;
  HWY_DYNAMIC_DISPATCH(TrafficImpl)(
      options, nothing, reinterpret_cast<const uint32_t*>(g), reinterpret_cast<uint32_t*>(p),
      reinterpret_cast<uint32_t*>(m), reinterpret_cast<uint32_t*>(v), copy, n);
}

}  // namespace zerod::bench
#endif  // HWY_ONCE
