// The CPU kernels of one instruction set, written once over V (see ../numerics.h).
#pragma once

#include "noise_loop.h"
#include "norm_loop.h"
#include "step_loop.h"

namespace ddpm_fast {
namespace {

template <class V>
void randn(const RandnArgs& args, int64_t begin, int64_t end) {
  each_tile(begin, end, args.elements, args.elements, [&](const Run& run) {
    const RoundKeys key(
        noise_key(args.seed[run.sample], args.sample_index[run.sample], args.step, args.stream));
    fill_normals<V>(key, run.first, run.count, args.out + run.sample * args.elements + run.first);
  });
}

template <class V>
void q_sample(const QSampleArgs& args, int64_t begin, int64_t end) {
  each_tile(begin, end, args.channels * args.pixels, args.pixels, [&](const Run& run) {
    float x_buffer[kTile], noise_buffer[kTile], out_buffer[kTile];
    const float* x = fetch<V>(run, args.x_start, args.layout, x_buffer);
    const float* noise = fetch<V>(run, args.noise, args.layout, noise_buffer);
    float* out = place(run, args.x_t, args.layout, out_buffer);
    if (noise == nullptr) {
      float* drawn = place(run, args.noise_out, args.layout, noise_buffer);
      const RoundKeys key(
          noise_key(args.seed[run.sample], args.sample_index[run.sample], 0, args.stream));
      fill_normals<V>(key, run.first, run.count, drawn);
      put_back<V>(run, drawn, args.layout, args.noise_out);
      noise = drawn;
    }
    const float* c = args.coefficients + 2 * args.timesteps[run.sample];
    const float c0 = c[0], c1 = c[1];
    for (int64_t i = 0; i < run.count; ++i) out[i] = c0 * x[i] + c1 * noise[i];
    put_back<V>(run, out, args.layout, args.x_t);
  });
}

template <class V>
constexpr CpuKernels cpu_kernels(const char* name) {
  return {name, randn<V>, q_sample<V>, step<V>, group_norm<V>};
}

}  // namespace
}  // namespace ddpm_fast
