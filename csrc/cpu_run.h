// Running a kernel on the CPU: the last checks, and the work shared out by
// parallel_for(count, body), which calls body(begin, end) for ranges that cover [0, count).
#pragma once

#include <atomic>

#include "require.h"

namespace ddpm_fast {

template <class ParallelFor>
void randn_on_cpu(const RandnArgs& args, const ParallelFor& parallel_for) {
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(args.samples * chunks_of(args.elements),
               [&](int64_t begin, int64_t end) { kernels.randn(args, begin, end); });
}

template <class ParallelFor>
void q_sample_on_cpu(const QSampleArgs& args, const ParallelFor& parallel_for) {
  require_timesteps(args);
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(args.samples * chunks_of(args.channels * args.pixels),
               [&](int64_t begin, int64_t end) { kernels.q_sample(args, begin, end); });
}

// The first report stays.
inline void report_not_finite(const StepArgs& args, int64_t sample) {
  if (args.status == nullptr || args.status[0] != 0) return;
  args.status[0] = static_cast<int32_t>(Status::kNotFinite);
  args.status[1] = static_cast<int32_t>(args.row[sample]);
  args.status[2] = static_cast<int32_t>(sample);
}

// `has_previous`: see require_rows.
template <class ParallelFor>
void step_on_cpu(const StepArgs& args, bool has_previous, const ParallelFor& parallel_for) {
  require_rows(args, has_previous);
  const CpuKernels& kernels = cpu_kernels();
  std::atomic<int64_t> first_bad{args.samples};
  parallel_for(args.samples * chunks_of(args.channels * args.pixels),
               [&](int64_t begin, int64_t end) {
                 const int64_t bad = kernels.step(args, begin, end);
                 int64_t seen = first_bad.load();
                 while (bad >= 0 && bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
                 }
               });
  if (first_bad.load() < args.samples) report_not_finite(args, first_bad.load());
}

}  // namespace ddpm_fast
