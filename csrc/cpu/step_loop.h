// The loop of the fused step, written once over V (see ../numerics.h).
#pragma once

#include "../step.h"
#include "noise_loop.h"

namespace ddpm_fast {
namespace {

// What one run of a step reads and writes, float32 in logical order; null where there is none.
struct StepTile {
  const float *x_t, *model_output, *sigma, *noise, *previous;
  float *out, *pred_xstart;
  int64_t first;  // the element index of the tile's first, for the noise
};

enum class Noise { kNone, kDrawn, kGiven };

// A block of elements from position i on. `check` turns NaN once a result is not finite. `kPlain`:
// the row is plain, its sigma a number, and no pred_xstart is wanted.
template <class V, Noise kNoise, bool kPlain>
inline void step_block(const StepRow& row, const RoundKeys& key, const StepTile& tile, int64_t i,
                       typename V::F& check) {
  using F = typename V::F;
  F z[8];
  if constexpr (kNoise == Noise::kDrawn) block_normals<V>(key, tile.first + i, z);
  DDPM_FAST_UNROLL
  for (int k = 0; k < 8; ++k, i += V::kLanes) {
    F x = V::load(tile.x_t + i), model = V::load(tile.model_output + i);
    F pred_xstart = predict_xstart<V, kPlain>(row, x, model), previous = V::set(0.0f);
    if (!kPlain && tile.previous != nullptr) previous = V::load(tile.previous + i);
    F sum = combine<V, kPlain>(row, pred_xstart, x, previous, model);
    if constexpr (kNoise != Noise::kNone) {
      F noise = kNoise == Noise::kGiven ? V::load(tile.noise + i) : z[k];
      F sigma = V::set(row.sigma);
      if (!kPlain && tile.sigma != nullptr) sigma = V::load(tile.sigma + i);
      sum = V::add(sum, V::mul(sigma, noise));
    }
    if (!kPlain && tile.pred_xstart != nullptr) V::store(tile.pred_xstart + i, pred_xstart);
    V::store(tile.out + i, sum);
    check = V::poison(check, sum);
  }
}

// The last elements, fewer than a block, through padded copies.
template <class V, Noise kNoise, bool kPlain>
void step_tail(const StepRow& row, const RoundKeys& key, const StepTile& tile, int64_t done,
               int64_t count, typename V::F& check) {
  float in[5][kBlock<V>] = {}, out[2][kBlock<V>];
  const float* sources[5] = {tile.x_t, tile.model_output, tile.sigma, tile.noise, tile.previous};
  for (int j = 0; j < 5; ++j) {
    if (sources[j] == nullptr) continue;
    copy(sources[j] + done, count, in[j]);
    sources[j] = in[j];
  }
  const StepTile padded = {sources[0],
                           sources[1],
                           sources[2],
                           sources[3],
                           sources[4],
                           out[0],
                           tile.pred_xstart != nullptr ? out[1] : nullptr,
                           tile.first + done};
  typename V::F ignored = V::set(0.0f);
  step_block<V, kNoise, kPlain>(row, key, padded, 0, ignored);
  copy(out[0], count, tile.out + done);
  if (tile.pred_xstart != nullptr) copy(out[1], count, tile.pred_xstart + done);
  // The padding must not be reported as not finite.
  for (int64_t i = count; i < kBlock<V>; ++i) out[0][i] = 0.0f;
  for (int i = 0; i < kBlock<V>; i += V::kLanes) {
    check = V::poison(check, V::load(out[0] + i));
  }
}

template <class V, Noise kNoise, bool kPlain>
bool step_tile(const StepRow& row, const RoundKeys& key, const StepTile& tile, int64_t count) {
  typename V::F check = V::set(0.0f);
  int64_t i = 0;
  for (; i + kBlock<V> <= count; i += kBlock<V>)
    step_block<V, kNoise, kPlain>(row, key, tile, i, check);
  if (i < count) step_tail<V, kNoise, kPlain>(row, key, tile, i, count - i, check);
  float lanes[V::kLanes], sum = 0.0f;
  V::store(lanes, check);
  for (float lane : lanes) sum += lane;
  return sum == sum;
}

template <class V, bool kPlain>
bool step_tile(const StepRow& row, const RoundKeys& key, const StepTile& tile, int64_t count) {
  if (!row.noisy()) return step_tile<V, Noise::kNone, kPlain>(row, key, tile, count);
  if (tile.noise == nullptr) return step_tile<V, Noise::kDrawn, kPlain>(row, key, tile, count);
  return step_tile<V, Noise::kGiven, kPlain>(row, key, tile, count);
}

// Brings model output, `skip` elements after each sample's first, into `buffer`, and makes
// body(vector, position) of each vector there; the last one may hold what was there before.
template <class V, class Body>
inline void fetch_mapped(const StepArgs& args, const Run& run, int64_t skip, float* buffer,
                         Body body) {
  as_typed(args.model_output, args.model_dtype,
           [&](auto* model) { gather<V>(run, model + skip, args.model_layout, buffer); });
  for (int64_t i = 0; i < run.count; i += V::kLanes) {
    V::store(buffer + i, body(V::load(buffer + i), i));
  }
}

// The model's prediction, guided where that is asked for.
template <class V>
const float* fetch_prediction(const StepArgs& args, const Run& run, float* buffer) {
  if (args.guidance_scale == nullptr) {
    const float* prediction = buffer;
    as_typed(args.model_output, args.model_dtype,
             [&](auto* model) { prediction = fetch<V>(run, model, args.model_layout, buffer); });
    return prediction;
  }
  alignas(64) float unconditional[kTile];
  Run other = run;
  other.sample += args.samples;
  fetch_mapped<V>(args, other, 0, unconditional, [](auto x, int64_t) { return x; });
  const float scale = *args.guidance_scale;
  fetch_mapped<V>(args, run, 0, buffer, [&](typename V::F x, int64_t i) {
    return guide<V>(x, V::load(unconditional + i), scale);
  });
  return buffer;
}

// x_prev as the network's next input: once, or under guidance for both halves.
template <class V>
void put_next_input(const StepArgs& args, const Run& run, const float* x_prev) {
  if (args.next_input == nullptr) return;
  Run copy = run;
  for (int half = 0; half < (args.guidance_scale != nullptr ? 2 : 1); ++half) {
    as_typed(args.next_input, args.next_dtype,
             [&](auto* next) { scatter<V>(copy, x_prev, args.next_layout, next); });
    copy.sample += args.samples;
  }
}

template <class V>
bool step_run(const StepArgs& args, const Run& run) {
  alignas(64) float buffers[6][kTile];
  const StepRow row = step_row(args, args.row[run.sample]);
  const RoundKeys key(
      noise_key(args.seed[run.sample], args.sample_index[run.sample], row.noise_step, 0));
  if (row.learned) {  // the extra channels come after
    fetch_mapped<V>(args, run, args.channels * args.model_layout.channel, buffers[2],
                    [&](typename V::F x, int64_t) { return learned_sigma<V>(row, x); });
  }
  float* out = place(run, args.out, args.out_layout, buffers[5]);
  float* pred_xstart = place(run, args.previous, args.previous_layout, buffers[4]);
  const StepTile tile = {
      fetch<V>(run, args.x_t, args.x_layout, buffers[0]),
      fetch_prediction<V>(args, run, buffers[1]),
      row.learned ? buffers[2] : nullptr,
      row.noisy() ? fetch<V>(run, args.noise, args.noise_layout, buffers[3]) : nullptr,
      row.c2 != 0.0f ? fetch<V>(run, args.previous, args.previous_layout, buffers[4]) : nullptr,
      out,
      pred_xstart,
      run.first};
  const bool plain = row.plain() && !row.learned && pred_xstart == nullptr;
  const bool finite = plain ? step_tile<V, true>(row, key, tile, run.count)
                            : step_tile<V, false>(row, key, tile, run.count);
  put_next_input<V>(args, run, out);
  put_back<V>(run, out, args.out_layout, args.out);
  put_back<V>(run, pred_xstart, args.previous_layout, args.previous);
  return finite;
}

template <class V>
int64_t step(const StepArgs& args, int64_t begin, int64_t end) {
  int64_t bad = -1;
  each_tile(begin, end, args.channels * args.pixels, args.pixels, [&](const Run& run) {
    if (!step_run<V>(args, run) && bad < 0) bad = run.sample;
  });
  return bad;
}

}  // namespace
}  // namespace ddpm_fast
