// The CPU kernels of one instruction set, written once over V (see ../numerics.h).
#pragma once

#include "noise_loop.h"
#include "norm_loop.h"
#include "q_sample_loop.h"
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
constexpr CpuKernels cpu_kernels() {
  return {randn<V>, q_sample<V>, step<V>, group_norm<V>};
}

}  // namespace
}  // namespace ddpm_fast
