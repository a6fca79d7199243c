// ddpm_fast for C++: the fused operators on your own arrays, on the CPU. arguments.h says what each
// argument is. The same arguments give the same bits as in Python, on every CPU level and in any
// number of threads.
//
// Each function checks what it is given before it writes anything, and throws std::runtime_error in
// one sentence: a null pointer, a size below 0, a row outside the table, results that share memory
// with what is read, ... What it cannot check is that the arrays are as long as the sizes and
// layouts say. It may be called from several threads at once.
#pragma once

#include <ddpm_fast/arguments.h>
#include <ddpm_fast/version.h>

#include <functional>

#ifdef DDPM_FAST_SHARED  // set by the CMake package
#define DDPM_FAST_API __attribute__((visibility("default")))
#else
#define DDPM_FAST_API
#endif

namespace ddpm_fast {

// Your threads. parallel_for(count, body) calls body(begin, end) for ranges that cover [0, count)
// once, on any threads in any order, and returns when all are done. A unit is up to 4096 elements:
// some microseconds, so several make a task. An empty one means the calling thread.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const RangeBody& body)>;

DDPM_FAST_API void randn(const RandnArgs& args, const ParallelFor& parallel_for = {});

DDPM_FAST_API void q_sample(const QSampleArgs& args, const ParallelFor& parallel_for = {});

// A value of x_prev that is not finite is no error: it is reported in `status`, if that is given.
DDPM_FAST_API void p_sample_step(const StepArgs& args, const ParallelFor& parallel_for = {});

// The instruction sets in use: baseline, avx2 or avx512, the best that this CPU has, or what the
// environment variable DDPM_FAST_CPU names (here amx is avx512). Throws if it names what is not
// there.
DDPM_FAST_API const char* cpu_level();

}  // namespace ddpm_fast
