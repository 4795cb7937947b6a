// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/kernels.h"

#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/cpu/reference.h"

// Only targets with fused multiply-add and vectors that divide the norm's 16 lanes; the static
// target, where a CPU has none of them, is the plain reference.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | \
                              HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_EMU128)
#define HWY_BROKEN_EMU128 1
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kernels.cc"
#include "hwy/foreach_target.h"
//
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#if HWY_TARGET != HWY_SCALAR
#include "kernels/cpu/kernels-inl.h"
#endif

HWY_BEFORE_NAMESPACE();
namespace zerod::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR
using reference::Accumulate;
using reference::AdamW;
using reference::AdamWSplit;
using reference::CastFromBf16;
using reference::CastToBf16;
using reference::JoinMaster;
using reference::SplitMaster;
using reference::SquaredNorm;
using reference::Sum;
#endif

const char* Name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace zerod::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
