// Any x86-64 (or other 64-bit CPU): one lane, and a fused multiply-add in software.
#include "loops.h"

namespace ddpm_fast {
namespace {

struct Scalar {
  using F = float;
  using U = uint32_t;
  using W = uint64_t;
  static constexpr int kLanes = 1, kParts = 1;

  static F set(float x) { return x; }
  static U set_u(uint32_t x) { return x; }
  static W set_w(uint32_t x) { return x; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F sqrt(F x) { return __builtin_sqrtf(x); }
  static F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN, as in SSE
  static F min(F a, F b) { return a < b ? a : b; }

  // The product is exact in double; the sum, rounded to odd there, sees on which side of a tie
  // of the final rounding it lies. libm's fmaf would do, but may be a slow call or resolve to
  // code for another CPU.
  static F fma(F a, F b, F c) {
    double p = static_cast<double>(a) * b, s = p + c, v = s - p;
    double error = (p - (s - v)) + (c - v);
    uint64_t word;
    __builtin_memcpy(&word, &s, sizeof word);
    // error is NaN where the sum is infinite or NaN: neither comparison holds.
    if ((error > 0.0 || error < 0.0) && (word & 1) == 0) {
      word += (error > 0.0) == (s > 0.0) ? 1 : -1;
      __builtin_memcpy(&s, &word, sizeof s);
    }
    return static_cast<float>(s);
  }

  static U bits(F x) {
    U u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u;
  }
  static F from_bits(U u) {
    F x;
    __builtin_memcpy(&x, &u, sizeof x);
    return x;
  }
  static F from_unsigned(U u) { return static_cast<float>(u); }
  static F from_signed(U u) { return static_cast<float>(static_cast<int32_t>(u)); }
  static U to_signed(F x) { return x == x ? static_cast<U>(static_cast<int32_t>(x)) : 0; }
  static U add(U a, U b) { return a + b; }
  static U sub(U a, U b) { return a - b; }
  static U bit_and(U a, U b) { return a & b; }
  static U bit_xor(U a, U b) { return a ^ b; }
  template <int n>
  static U shift_left(U a) {
    return a << n;
  }
  template <int n>
  static U shift_right_signed(U a) {
    return static_cast<U>(static_cast<int32_t>(a) >> n);
  }
  template <int bit>
  static F select_bit(U a, F if_set, F if_clear) {
    return a >> bit & 1 ? if_set : if_clear;
  }

  static W multiply(W a, uint32_t b) { return (a & 0xFFFFFFFFu) * b; }
  static W high(W a) { return a >> 32; }
  static W xor3(W a, W b, uint32_t c) { return a ^ b ^ c; }
  static W counters(uint32_t first, int) { return first; }
  static U join(W (*words)[4], int i) { return static_cast<U>(words[0][i]); }
  static void interleave(F*) {}

  static float from_half(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // 2^112 moves the exponent's bias from 15 to 127, also for subnormals.
    return from_bits(sign | bits(from_bits(magnitude << 13) * 0x1p112f));
  }
};

}  // namespace

const CpuKernels kBaselineKernels = cpu_kernels<Scalar>("baseline");

}  // namespace ddpm_fast
