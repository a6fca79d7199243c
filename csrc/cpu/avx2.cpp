// AVX2, FMA3 and F16C: eight lanes.
#include <immintrin.h>

#include "loops.h"

namespace ddpm_fast {
namespace {

struct Avx2 {
  using F = __m256;
  struct U {
    __m256i v;
  };
  using W = __m256i;
  static constexpr int kLanes = 8, kParts = 2, kMaxStride = 1;
  static constexpr bool kPastCaches = true, kHasScale = false;

  static F set(float x) { return _mm256_set1_ps(x); }
  static U set_u(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static W set_w(uint32_t x) { return _mm256_set1_epi64x(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  // p: a multiple of a vector. fence: what was stored so comes before what follows.
  static void store_past_caches(float* p, F x) { _mm256_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }

  // kLanes elements of any type; see conversions.h.
  static F widen(__m128i x, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static F widen(__m128i x, Half) { return _mm256_cvtph_ps(x); }
  static __m128i narrow(F x, BFloat16) {
    const __m256i bits = _mm256_castps_si256(x), half = _mm256_srli_epi32(bits, 16);
    const __m256i up =
        _mm256_add_epi32(_mm256_and_si256(half, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(half, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_packus_epi32(words, words);  // within each 128-bit lane
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static __m128i narrow(F x, Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

  template <int stride>
  static F load(const float* p) {
    return load(p);
  }
  template <int stride, class T>
  static F load(const T* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
  }
  template <int stride>
  static void store(float* p, F x) {
    store(p, x);
  }
  template <int stride, class T>
  static void store(T* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F x) { return _mm256_sqrt_ps(x); }
  static F reciprocal(F x) { return _mm256_rcp_ps(x); }       // within 2^-11.4
  static F poison(F a, F x) { return fma(x, set(0.0f), a); }  // NaN where x is not finite
  static F max(F a, F b) { return _mm256_max_ps(a, b); }      // b where either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }

  static U bits(F x) { return {_mm256_castps_si256(x)}; }
  static F from_bits(U u) { return _mm256_castsi256_ps(u.v); }
  static F from_unsigned(U u) {  // both halves are exact, so that the sum is the only rounding
    F high = _mm256_cvtepi32_ps(_mm256_srli_epi32(u.v, 16));
    F low = _mm256_cvtepi32_ps(_mm256_and_si256(u.v, _mm256_set1_epi32(0xFFFF)));
    return fma(high, set(65536.0f), low);
  }
  static F from_signed(U u) { return _mm256_cvtepi32_ps(u.v); }
  static U to_signed(F x) { return {_mm256_cvttps_epi32(x)}; }
  static U add(U a, U b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static U sub(U a, U b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  static U bit_and(U a, U b) { return {_mm256_and_si256(a.v, b.v)}; }
  static U bit_xor(U a, U b) { return {_mm256_xor_si256(a.v, b.v)}; }
  template <int n>
  static U shift_left(U a) {
    return {_mm256_slli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right_signed(U a) {
    return {_mm256_srai_epi32(a.v, n)};
  }
  template <int bit>
  static F select_bit(U a, F if_set, F if_clear) {
    return _mm256_blendv_ps(if_clear, if_set, from_bits(shift_left<31 - bit>(a)));
  }

  static W multiply(W a, uint32_t b) { return _mm256_mul_epu32(a, set_w(b)); }
  static W high(W a) { return _mm256_srli_epi64(a, 32); }
  static W xor3(W a, W b, uint64_t c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_set1_epi64x(static_cast<int64_t>(c)));
  }
  // Lane 4 j + m takes counter 2 m + j, so that `interleave` need not cross 128-bit lanes.
  static W counters(uint32_t first, int part) {
    W offsets = part ? _mm256_setr_epi64x(2, 6, 3, 7) : _mm256_setr_epi64x(0, 4, 1, 5);
    return _mm256_add_epi64(set_w(first), offsets);
  }
  static U join(W (*words)[4], int i) {  // part 0 has the even lanes, part 1 the odd ones
    return {_mm256_blend_epi32(words[0][i], _mm256_shuffle_epi32(words[1][i], 0xA0), 0xAA)};
  }
  static __m256d pairs(F x) { return _mm256_castps_pd(x); }
  static void interleave(F* z) {
    F low01 = _mm256_unpacklo_ps(z[0], z[1]), high01 = _mm256_unpackhi_ps(z[0], z[1]);
    F low23 = _mm256_unpacklo_ps(z[2], z[3]), high23 = _mm256_unpackhi_ps(z[2], z[3]);
    z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs(low01), pairs(low23)));
    z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs(low01), pairs(low23)));
    z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs(high01), pairs(high23)));
    z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs(high01), pairs(high23)));
  }
};

}  // namespace

const CpuKernels kAvx2Kernels = cpu_kernels<Avx2>();

}  // namespace ddpm_fast
