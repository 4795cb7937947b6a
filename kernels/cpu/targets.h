// SPDX-License-Identifier: Apache-2.0
//
// Highway's targets that the kernels are compiled for; included before anything of Highway.
// Only targets with fused multiply-add, and with vectors that divide the norm's 16 lanes. Where a
// CPU has none of them, the static target answers with the plain reference.
#pragma once

#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#define HWY_BROKEN_EMU128 1
