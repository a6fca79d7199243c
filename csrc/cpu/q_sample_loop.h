// The loop of q_sample, written once over V (see ../numerics.h).
#pragma once

#include "noise_loop.h"

namespace ddpm_fast {
namespace {

// What one run of q_sample reads and writes, float32 in logical order; null where there is none.
struct QSampleTile {
  const float *x_start, *noise;
  float *x_t, *noise_out;
  int64_t first;  // the element index of the tile's first, for the noise
  float c0, c1;
};

template <class V, bool kPastCaches>
inline void put(float* to, typename V::F x) {
  if constexpr (kPastCaches) {
    V::store_past_caches(to, x);
  } else {
    V::store(to, x);
  }
}

// A block of elements from position i on.
template <class V, bool kPastCaches>
inline void q_sample_block(const QSampleTile& tile, const RoundKeys& key, int64_t i) {
  typename V::F z[8];
  if (tile.noise == nullptr) block_normals<V>(key, tile.first + i, z);
  DDPM_FAST_UNROLL
  for (int k = 0; k < 8; ++k, i += V::kLanes) {
    if (tile.noise == nullptr) {
      put<V, kPastCaches>(tile.noise_out + i, z[k]);
    } else {
      z[k] = V::load(tile.noise + i);
    }
    put<V, kPastCaches>(tile.x_t + i, V::add(V::mul(V::set(tile.c0), V::load(tile.x_start + i)),
                                             V::mul(V::set(tile.c1), z[k])));
  }
}

template <class V, bool kPastCaches>
void q_sample_tile(const QSampleTile& tile, const RoundKeys& key, int64_t count) {
  int64_t i = 0;
  for (; i + kBlock<V> <= count; i += kBlock<V>) q_sample_block<V, kPastCaches>(tile, key, i);
  if (i == count) return;
  // The last elements, fewer than a block, through padded copies.
  float in[2][kBlock<V>] = {}, out[2][kBlock<V>];
  QSampleTile padded = {in[0], nullptr, out[0], out[1], tile.first + i, tile.c0, tile.c1};
  copy(tile.x_start + i, count - i, in[0]);
  if (tile.noise != nullptr) {
    copy(tile.noise + i, count - i, in[1]);
    padded.noise = in[1];
  }
  q_sample_block<V, false>(padded, key, 0);
  copy(out[0], count - i, tile.x_t + i);
  if (tile.noise == nullptr) copy(out[1], count - i, tile.noise_out + i);
}

template <class V>
void q_sample_run(const QSampleArgs& args, const Run& run) {
  alignas(64) float buffers[4][kTile];
  const RoundKeys key(
      noise_key(args.seed[run.sample], args.sample_index[run.sample], 0, args.stream));
  const float* c = args.coefficients + 2 * args.timesteps[run.sample];
  float* x_t = place(run, args.x_t, args.layout, buffers[2]);
  float* noise_out = place(run, args.noise_out, args.layout, buffers[3]);
  const QSampleTile tile = {fetch<V>(run, args.x_start, args.layout, buffers[0]),
                            fetch<V>(run, args.noise, args.layout, buffers[1]),
                            x_t,
                            noise_out,
                            run.first,
                            c[0],
                            c[1]};
  constexpr uintptr_t vector = V::kLanes * sizeof(float);
  const bool aligned =
      (reinterpret_cast<uintptr_t>(x_t) | reinterpret_cast<uintptr_t>(noise_out)) % vector == 0;
  if (V::kPastCaches && args.past_caches && aligned && run.linear(args.layout)) {
    q_sample_tile<V, V::kPastCaches>(tile, key, run.count);
  } else {
    q_sample_tile<V, false>(tile, key, run.count);
  }
  put_back<V>(run, x_t, args.layout, args.x_t);
  put_back<V>(run, noise_out, args.layout, args.noise_out);
}

template <class V>
void q_sample(const QSampleArgs& args, int64_t begin, int64_t end) {
  each_tile(begin, end, args.channels * args.pixels, args.pixels,
            [&](const Run& run) { q_sample_run<V>(args, run); });
  if constexpr (V::kPastCaches) {
    if (args.past_caches) V::fence();
  }
}

}  // namespace
}  // namespace ddpm_fast
