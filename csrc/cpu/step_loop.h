// The loop of the fused step, written once over V (see ../numerics.h).
#pragma once

#include "../step.h"
#include "tiles.h"

namespace ddpm_fast {
namespace {

// What one run of a step reads and writes, float32 in logical order; null where there is none.
struct StepTile {
  const float *x_t, *model_output, *unconditional, *variance, *noise, *previous;
  float *out, *pred_xstart;
  float guidance_scale;
  NoiseKey key;
  int64_t first;  // the element index of the tile's first, for the noise
};

// 4 * kLanes elements from position i on. `check` turns NaN once a result is not finite.
template <class V>
inline void step_block(const StepRow& row, const StepTile& tile, int64_t i, typename V::F& check) {
  using F = typename V::F;
  F z[4] = {};
  const bool noisy = row.noisy();
  if (noisy && tile.noise == nullptr) {
    normals<V>(tile.key, static_cast<uint32_t>((tile.first + i) / 4), z);
  }
  DDPM_FAST_UNROLL
  for (int k = 0; k < 4; ++k, i += V::kLanes) {
    F x = V::load(tile.x_t + i), model = V::load(tile.model_output + i);
    if (tile.unconditional != nullptr) {
      model = guide<V>(model, V::load(tile.unconditional + i), tile.guidance_scale);
    }
    F pred_xstart = predict_xstart<V>(row, x, model);
    F previous = tile.previous != nullptr ? V::load(tile.previous + i) : V::set(0.0f);
    F sum = combine<V>(row, pred_xstart, x, previous, model);
    if (noisy) {
      F noise = tile.noise != nullptr ? V::load(tile.noise + i) : z[k];
      F sigma = row.learned ? learned_sigma<V>(row, V::load(tile.variance + i)) : V::set(row.sigma);
      sum = V::add(sum, V::mul(sigma, noise));
    }
    if (tile.pred_xstart != nullptr) V::store(tile.pred_xstart + i, pred_xstart);
    V::store(tile.out + i, sum);
    check = V::add(check, V::mul(sum, V::set(0.0f)));
  }
}

// The last elements, fewer than a block, through padded copies.
template <class V>
void step_tail(const StepRow& row, const StepTile& tile, int64_t done, int64_t count,
               typename V::F& check) {
  float in[6][4 * V::kLanes] = {}, out[2][4 * V::kLanes];
  const float* sources[6] = {tile.x_t,      tile.model_output, tile.unconditional,
                             tile.variance, tile.noise,        tile.previous};
  for (int j = 0; j < 6; ++j) {
    if (sources[j] == nullptr) continue;
    copy(sources[j] + done, count, in[j]);
    sources[j] = in[j];
  }
  StepTile padded = {sources[0],
                     sources[1],
                     sources[2],
                     sources[3],
                     sources[4],
                     sources[5],
                     out[0],
                     tile.pred_xstart != nullptr ? out[1] : nullptr,
                     tile.guidance_scale,
                     tile.key,
                     tile.first + done};
  // The padding must not be reported as not finite: look at the elements themselves.
  typename V::F ignored = V::set(0.0f);
  step_block<V>(row, padded, 0, ignored);
  copy(out[0], count, tile.out + done);
  if (tile.pred_xstart != nullptr) copy(out[1], count, tile.pred_xstart + done);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += out[0][i] * 0.0f;
  check = V::add(check, V::set(sum));
}

template <class V>
bool step_tile(const StepRow& row, const StepTile& tile, int64_t count) {
  constexpr int kBlock = 4 * V::kLanes;
  typename V::F check = V::set(0.0f);
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) step_block<V>(row, tile, i, check);
  if (i < count) step_tail<V>(row, tile, i, count - i, check);
  float lanes[V::kLanes], sum = 0.0f;
  V::store(lanes, check);
  for (float lane : lanes) sum += lane;
  return sum == sum;
}

template <class V>
bool step_run(const StepArgs& args, const Run& run) {
  float buffers[7][kTile];
  const StepRow row = step_row(args, args.row[run.sample]);
  Run unconditional = run;
  unconditional.sample += args.samples;
  const bool guided = args.guidance_scale != nullptr;
  const Layout& layout = args.model_layout;
  const int64_t variance = args.channels * layout.channel;  // the extra channels come after
  float* out = place(run, args.out, args.out_layout, buffers[5]);
  float* pred_xstart = place(run, args.previous, args.previous_layout, buffers[6]);
  const StepTile tile = {
      fetch<V>(run, args.x_t, args.x_layout, buffers[0]),
      fetch<V>(run, args.model_output, args.model_dtype, layout, 0, buffers[1]),
      guided ? fetch<V>(unconditional, args.model_output, args.model_dtype, layout, 0, buffers[2])
             : nullptr,
      row.learned ? fetch<V>(run, args.model_output, args.model_dtype, layout, variance, buffers[3])
                  : nullptr,
      row.noisy() ? fetch<V>(run, args.noise, args.noise_layout, buffers[4]) : nullptr,
      row.c2 != 0.0f ? fetch<V>(run, args.previous, args.previous_layout, buffers[6]) : nullptr,
      out,
      pred_xstart,
      guided ? *args.guidance_scale : 0.0f,
      noise_key(args.seed[run.sample], args.sample_index[run.sample], row.noise_step, 0),
      run.first};
  const bool finite = step_tile<V>(row, tile, run.count);
  put_back(run, out, args.out_layout, args.out);
  put_back(run, pred_xstart, args.previous_layout, args.previous);
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
