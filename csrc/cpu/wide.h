// Two vectors as one, so that the operations of one fill the time the other waits for its results.
#pragma once

#include <stdint.h>

#include "../numerics.h"

namespace ddpm_fast {
namespace {

// As much of a V (see ../numerics.h) as the normals need.
template <class V>
struct Wide {
  struct F {
    typename V::F a, b;
  };
  struct U {
    typename V::U a, b;
  };
  struct W {
    typename V::W a, b;
  };
  static constexpr int kLanes = 2 * V::kLanes, kParts = V::kParts;

  static F set(float x) { return {V::set(x), V::set(x)}; }
  static U set_u(uint32_t x) { return {V::set_u(x), V::set_u(x)}; }
  static W set_w(uint32_t x) { return {V::set_w(x), V::set_w(x)}; }

  static F add(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static F sub(F x, F y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static F mul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
  static F sqrt(F x) { return {V::sqrt(x.a), V::sqrt(x.b)}; }

  static U bits(F x) { return {V::bits(x.a), V::bits(x.b)}; }
  static F from_bits(U x) { return {V::from_bits(x.a), V::from_bits(x.b)}; }
  static F from_unsigned(U x) { return {V::from_unsigned(x.a), V::from_unsigned(x.b)}; }
  static F from_signed(U x) { return {V::from_signed(x.a), V::from_signed(x.b)}; }
  static U add(U x, U y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static U sub(U x, U y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static U bit_and(U x, U y) { return {V::bit_and(x.a, y.a), V::bit_and(x.b, y.b)}; }
  static U bit_xor(U x, U y) { return {V::bit_xor(x.a, y.a), V::bit_xor(x.b, y.b)}; }
  template <int n>
  static U shift_right_signed(U x) {
    return {V::template shift_right_signed<n>(x.a), V::template shift_right_signed<n>(x.b)};
  }
  template <int bit>
  static F select_bit(U x, F set, F clear) {
    return {V::template select_bit<bit>(x.a, set.a, clear.a),
            V::template select_bit<bit>(x.b, set.b, clear.b)};
  }

  static W multiply(W x, uint32_t y) { return {V::multiply(x.a, y), V::multiply(x.b, y)}; }
  static W high(W x) { return {V::high(x.a), V::high(x.b)}; }
  static W xor3(W x, W y, uint64_t z) { return {V::xor3(x.a, y.a, z), V::xor3(x.b, y.b, z)}; }
  static W counters(uint32_t first, int part) {
    return {V::counters(first, part), V::counters(first + V::kLanes, part)};
  }
  static U join(W (*words)[4], int i) {
    typename V::W a[kParts][4], b[kParts][4];
    for (int part = 0; part < kParts; ++part) {
      a[part][i] = words[part][i].a;
      b[part][i] = words[part][i].b;
    }
    return {V::join(a, i), V::join(b, i)};
  }
  static void interleave(F* z) {
    typename V::F a[4] = {z[0].a, z[1].a, z[2].a, z[3].a};
    typename V::F b[4] = {z[0].b, z[1].b, z[2].b, z[3].b};
    V::interleave(a);
    V::interleave(b);
    for (int k = 0; k < 4; ++k) z[k] = {a[k], b[k]};
  }
};

}  // namespace
}  // namespace ddpm_fast
