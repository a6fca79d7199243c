// One element as a vector of numerics.h: each operation rounds by itself, to nearest even.
#pragma once

#include "../numerics.h"

namespace ddpm_fast {
namespace {

struct Lane {
  using F = float;
  using U = uint32_t;
  using W = uint64_t;
  static constexpr int kParts = 1;

  static __device__ F set(float x) { return x; }
  static __device__ U set_u(uint32_t x) { return x; }
  static __device__ W set_w(uint32_t x) { return x; }
  static __device__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ F sub(F a, F b) { return __fsub_rn(a, b); }
  static __device__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ F sqrt(F x) { return __fsqrt_rn(x); }
  // NaN where either is; of zeros the positive is greater, elsewhere they are equal, which shows
  // only with a bound of -0.
  static __device__ F max(F a, F b) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
  }
  static __device__ F min(F a, F b) {
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
  }

  static __device__ U bits(F x) { return __float_as_uint(x); }
  static __device__ F from_bits(U u) { return __uint_as_float(u); }
  static __device__ F from_unsigned(U u) { return __uint2float_rn(u); }
  static __device__ F from_signed(U u) { return __int2float_rn(static_cast<int>(u)); }
  static __device__ U to_signed(F x) { return static_cast<U>(__float2int_rz(x)); }
  static __device__ U add(U a, U b) { return a + b; }
  static __device__ U sub(U a, U b) { return a - b; }
  static __device__ U bit_and(U a, U b) { return a & b; }
  static __device__ U bit_xor(U a, U b) { return a ^ b; }
  template <int n>
  static __device__ U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static __device__ U shift_right_signed(U a) {
    return static_cast<U>(static_cast<int>(a) >> n);
  }
  template <int bit>
  static __device__ F select_bit(U a, F if_set, F if_clear) {
    return a >> bit & 1 ? if_set : if_clear;
  }

  // Spelled out, as the compiler makes a product of 64 bits of it, with one more addition.
  static __device__ W multiply(W a, uint32_t b) {
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(a) : "r"(static_cast<uint32_t>(a)), "r"(b));
    return a;
  }
  static __device__ W high(W a) { return a >> 32; }
  static __device__ W xor3(W a, W b, uint32_t c) { return a ^ b ^ c; }
  static __device__ W counters(uint32_t first, int) { return first; }
  static __device__ U join(W (*words)[4], int i) { return static_cast<U>(words[0][i]); }
  static __device__ void interleave(F*) {}
};

}  // namespace
}  // namespace ddpm_fast
