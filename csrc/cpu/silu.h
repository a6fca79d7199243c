// SiLU, written once over V (see ../numerics.h).
#pragma once

#include "../numerics.h"

namespace ddpm_fast {
namespace {

// exp(-x). The relative error is below 2^-20, or if not kExact 2^-12. Beyond |x| = 87 it is at
// most, or at least, exp(87)'s or exp(-87)'s.
template <class V, bool kExact>
DDPM_FAST_INLINE typename V::F exp_minus(typename V::F x) {
  using F = typename V::F;
  const F minus_log2e = V::set(-0x1.715476p0f);
  if constexpr (V::kHasScale && !kExact) {
    constexpr float kPower[] = {0x1.fff634p-1f, 0x1.644434p-1f, 0x1.cefd78p-3f, 0x1.3f950ep-4f};
    const F t = V::mul(x, minus_log2e);
    return V::scale(horner<V>(kPower, V::fraction(t)), t);
  } else {
    // (2^f - 1) / f for |f| <= 1/2, with relative errors of 2^f below 2^-26 and 2^-12.
    constexpr float kExact2[] = {0x1.62e430p-1f, 0x1.ebfbe0p-3f,  0x1.c6af6cp-5f,
                                 0x1.3b2a1cp-7f, 0x1.5f08a0p-10f, 0x1.44400ap-13f};
    constexpr float kShort2[] = {0x1.62e2d2p-1f, 0x1.efb0b2p-3f, 0x1.c96d94p-5f};
    const F rounder = V::set(0x1.8p23f);
    const F y = V::min(V::set(87.0f), V::max(V::set(-87.0f), x));
    const F shifted = V::fma(y, minus_log2e, rounder);  // exp(-x) is 2^(n + f): n, in its last bits
    const F f = V::fma(y, minus_log2e, V::sub(rounder, shifted));
    const F quotient = kExact ? horner<V>(kExact2, f) : horner<V>(kShort2, f);
    const F power = V::fma(quotient, f, V::set(1.0f));
    const auto n = V::template shift_left<23>(V::bits(shifted));
    return V::from_bits(V::add(V::bits(power), n));
  }
}

// x / (1 + exp(-x)); the relative error is below 2^-19, near 0 2^-21, or if not kExact 2^-11. Far
// from 0 the result is x, or nearly 0.
template <class V, bool kExact>
DDPM_FAST_INLINE typename V::F silu(typename V::F x) {
  const typename V::F divisor = V::add(V::set(1.0f), exp_minus<V, kExact>(x));
  typename V::F inverse = V::reciprocal(divisor);
  if constexpr (kExact) {  // one step of Newton's
    inverse = V::mul(inverse, V::fma(V::sub(V::set(0.0f), divisor), inverse, V::set(2.0f)));
  }
  return V::mul(x, inverse);
}

}  // namespace
}  // namespace ddpm_fast
