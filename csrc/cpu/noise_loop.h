// Normals into memory, written once over V (see ../numerics.h).
#pragma once

#include "../numerics.h"
#include "tiles.h"
#include "wide.h"

namespace ddpm_fast {
namespace {

// A NoiseKey whose round keys lie in memory, where an instruction can take them as an operand.
struct RoundKeys {
  uint64_t keys[10][2];
  uint32_t c1, c2, c3;

  explicit RoundKeys(const NoiseKey& key) : c1(key.c1), c2(key.c2), c3(key.c3) {
    for (int round = 0; round < 10; ++round) {
      for (int word = 0; word < 2; ++word) keys[round][word] = key.round_key(round, word);
    }
  }
  uint64_t round_key(int round, int word) const { return keys[round][word]; }
};

// A block is the unit in which normals are made: eight vectors.
template <class V>
constexpr int kBlock = 8 * V::kLanes;

// The block of normals from element `first` on.
template <class V>
inline void block_normals(const RoundKeys& key, int64_t first, typename V::F z[8]) {
  typename Wide<V>::F wide[4];
  normals<Wide<V>>(key, static_cast<uint32_t>(first / 4), wide);
  for (int k = 0; k < 4; ++k) {
    z[k] = wide[k].a;
    z[4 + k] = wide[k].b;
  }
}

template <class V>
void fill_normals(const RoundKeys& key, int64_t first, int64_t count, float* out) {
  typename V::F z[8];
  for (int64_t i = 0; i < count; i += kBlock<V>) {
    float tail[kBlock<V>];
    float* to = count - i < kBlock<V> ? tail : out + i;
    block_normals<V>(key, first + i, z);
    for (int k = 0; k < 8; ++k) V::store(to + k * V::kLanes, z[k]);
    if (to == tail) copy(tail, count - i, out + i);
  }
}

}  // namespace
}  // namespace ddpm_fast
