// AVX-512 F, BW, DQ and VL: sixteen lanes.
#include <immintrin.h>

#include "loops.h"

namespace ddpm_fast {
namespace {

struct Avx512 {
  using F = __m512;
  struct U {
    __m512i v;
  };
  using W = __m512i;
  static constexpr int kLanes = 16, kParts = 2;

  static F set(float x) { return _mm512_set1_ps(x); }
  static U set_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static W set_w(uint32_t x) { return _mm512_set1_epi64(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F x) { return _mm512_sqrt_ps(x); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }

  static U bits(F x) { return {_mm512_castps_si512(x)}; }
  static F from_bits(U u) { return _mm512_castsi512_ps(u.v); }
  static F from_unsigned(U u) { return _mm512_cvtepu32_ps(u.v); }
  static F from_signed(U u) { return _mm512_cvtepi32_ps(u.v); }
  static U to_signed(F x) { return {_mm512_cvttps_epi32(x)}; }
  static U add(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static U sub(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static U bit_and(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
  static U bit_xor(U a, U b) { return {_mm512_xor_si512(a.v, b.v)}; }
  template <int n>
  static U shift_left(U a) {
    return {_mm512_slli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right_signed(U a) {
    return {_mm512_srai_epi32(a.v, n)};
  }
  template <int bit>
  static F select_bit(U a, F if_set, F if_clear) {
    __mmask16 mask = _mm512_test_epi32_mask(a.v, set_u(1u << bit).v);
    return _mm512_mask_blend_ps(mask, if_clear, if_set);
  }

  static W multiply(W a, uint32_t b) { return _mm512_mul_epu32(a, set_w(b)); }
  static W high(W a) { return _mm512_srli_epi64(a, 32); }
  static W xor3(W a, W b, uint32_t c) { return _mm512_ternarylogic_epi64(a, b, set_w(c), 0x96); }
  // Lane 4 j + m takes counter 4 m + j, so that `interleave` need not cross 128-bit lanes.
  static W counters(uint32_t first, int part) {
    W offsets = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    return _mm512_add_epi64(_mm512_set1_epi64(int64_t{first} + 4 * part), offsets);
  }
  static U join(W (*words)[4], int i) {  // part 0 has the even lanes, part 1 the odd ones
    return {_mm512_mask_shuffle_epi32(words[0][i], 0xAAAA, words[1][i], _MM_PERM_CCAA)};
  }
  static __m512d pairs(F x) { return _mm512_castps_pd(x); }
  static void interleave(F* z) {
    F low01 = _mm512_unpacklo_ps(z[0], z[1]), high01 = _mm512_unpackhi_ps(z[0], z[1]);
    F low23 = _mm512_unpacklo_ps(z[2], z[3]), high23 = _mm512_unpackhi_ps(z[2], z[3]);
    z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(low01), pairs(low23)));
    z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(low01), pairs(low23)));
    z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(high01), pairs(high23)));
    z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(high01), pairs(high23)));
  }

  static float from_half(uint16_t h) { return _cvtsh_ss(h); }
};

}  // namespace

const CpuKernels kAvx512Kernels = cpu_kernels<Avx512>("avx512");

}  // namespace ddpm_fast
