// Any x86-64 (or other 64-bit CPU): one lane, and a fused multiply-add in software.
#include "loops.h"

namespace ddpm_fast {
namespace {

struct Scalar {
  using F = float;
  using U = uint32_t;
  using W = uint64_t;
  static constexpr int kLanes = 1, kParts = 1, kMaxStride = 1;
  static constexpr bool kPastCaches = false, kHasScale = false;

  static F set(float x) { return x; }
  static U set_u(uint32_t x) { return x; }
  static W set_w(uint32_t x) { return x; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  template <int stride, class T>  // and kLanes elements of any type, `stride` apart
  static F load(const T* p) {
    return to_float(*p);
  }
  template <int stride, class T>
  static void store(T* p, F x) {
    from_float(x, p);
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F sqrt(F x) { return __builtin_sqrtf(x); }
  static F reciprocal(F x) { return 1.0f / x; }
  static F poison(F a, F x) { return a + x * 0.0f; }  // NaN where x is not finite
  static F max(F a, F b) { return a > b ? a : b; }    // b where either is NaN, as in SSE
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
  static W xor3(W a, W b, W c) { return a ^ b ^ c; }
  static W counters(uint32_t first, int) { return first; }
  static U join(W (*words)[4], int i) { return static_cast<U>(words[0][i]); }
  static void interleave(F*) {}
};

}  // namespace

const CpuKernels kBaselineKernels = cpu_kernels<Scalar>();

}  // namespace ddpm_fast
