// The C++ library's functions: what torch and NumPy know of their arrays is checked here as far as
// pointers, sizes and layouts say it.
#include <ddpm_fast/ddpm_fast.h>

#include <vector>

#include "cpu_run.h"

namespace ddpm_fast {
namespace {

// An array of one argument, elements of `size` bytes.
struct Array {
  const char* name;
  const void* data;
  int64_t size, samples, channels, pixels;
  Layout layout;

  bool empty() const { return samples == 0 || channels == 0 || pixels == 0; }
  // Its last element's place, roughly, also where it is past int64.
  double reach() const {
    const auto along = [](int64_t count, int64_t stride) {
      return static_cast<double>(count - 1) * static_cast<double>(stride);
    };
    return along(samples, layout.sample) + along(channels, layout.channel) +
           along(pixels, layout.pixel);
  }
  Bytes bytes() const {
    const auto first = reinterpret_cast<uintptr_t>(data);
    const int64_t last = (samples - 1) * layout.sample + (channels - 1) * layout.channel +
                         (pixels - 1) * layout.pixel;
    return {name, first, first + static_cast<uintptr_t>((last + 1) * size)};
  }
};

template <class T>
Array row_of(const char* name, const T* data, int64_t count) {
  return {name, data, sizeof(T), 1, 1, count, contiguous(1, count)};
}

void require_size(const char* name, int64_t size) {
  require(size >= 0 && size <= kMaxElements, name, " must be between 0 and 2^34, but it is ", size,
          ".");
}

template <class Args>
void require_sizes(const Args& args) {
  require_size("samples", args.samples);
  require_size("channels", args.channels);
  require_size("pixels", args.pixels);
  require_size("table_rows", args.table_rows);
  require(args.pixels == 0 || args.channels <= kMaxElements / args.pixels,
          "a sample may have 2^34 elements, but this one has ", args.channels, " channels of ",
          args.pixels, " pixels.");
}

// Refuses a null pointer, a misplaced one, and a layout that no memory has; returns the bytes.
std::vector<Bytes> bytes_of(const std::vector<Array>& arrays) {
  std::vector<Bytes> all;
  for (const Array& a : arrays) {
    if (a.empty()) continue;
    require(a.data != nullptr, a.name, " must not be null.");
    require_aligned(a.name, a.data, static_cast<size_t>(a.size));
    require(a.reach() < 0x1p60, a.name, " has the layout (", a.layout.sample, ", ",
            a.layout.channel, ", ", a.layout.pixel, "), in which ", a.samples, " samples of ",
            a.channels, " channels of ", a.pixels, " pixels reach past all memory.");
    require(is_distinct(a.samples, a.channels, a.pixels, a.layout), a.name, " has the layout (",
            a.layout.sample, ", ", a.layout.channel, ", ", a.layout.pixel,
            "), in which elements share an address; use contiguous() or channels_last().");
    all.push_back(a.bytes());
  }
  return all;
}

void require_arrays(const std::vector<Array>& written, const std::vector<Array>& read) {
  std::vector<Bytes> all = bytes_of(written);
  const size_t count = all.size();
  for (const Bytes& bytes : bytes_of(read)) all.push_back(bytes);
  require_separate(all, count);
}

int64_t size_of(const char* name, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  require(false, name, " must be a DType, but it is ", static_cast<int32_t>(dtype), ".");
  return 0;
}

// The calling thread, where there are no others.
template <class Run>
void share_out(const ParallelFor& parallel_for, const Run& run) {
  if (parallel_for) return run(parallel_for);
  run([](int64_t count, const auto& body) { body(0, count); });
}

bool same(const Layout& a, const Layout& b) {
  return a.sample == b.sample && a.channel == b.channel && a.pixel == b.pixel;
}

void check(const RandnArgs& args) {
  require_size("samples", args.samples);
  require_size("elements", args.elements);
  require_noise(args.step, args.stream);
  const Layout layout = contiguous(1, args.elements);
  require_arrays({{"out", args.out, sizeof(float), args.samples, 1, args.elements, layout}},
                 {row_of("seed", args.seed, args.samples),
                  row_of("sample_index", args.sample_index, args.samples)});
}

void check(const QSampleArgs& args) {
  require_sizes(args);
  require_noise(0, args.stream);
  const auto state = [&](const char* name, const float* data) {
    return Array{name, data, sizeof(float), args.samples, args.channels, args.pixels, args.layout};
  };
  std::vector<Array> written{state("x_t", args.x_t)};
  std::vector<Array> read{state("x_start", args.x_start),
                          row_of("coefficients", args.coefficients, 2 * args.table_rows),
                          row_of("timesteps", args.timesteps, args.samples),
                          row_of("seed", args.seed, args.samples),
                          row_of("sample_index", args.sample_index, args.samples)};
  if (args.noise == nullptr) {
    written.push_back(state("noise_out", args.noise_out));
  } else {
    require(args.noise_out == nullptr, "noise_out must be null, because noise is given.");
    read.push_back(state("noise", args.noise));
  }
  require_arrays(written, read);
}

void check(const StepArgs& args) {
  require_sizes(args);
  require(args.model_channels == args.channels || args.model_channels == 2 * args.channels,
          "model_channels must be ", args.channels, " or ", 2 * args.channels, ", but it is ",
          args.model_channels, ".");
  const int64_t rows = args.guidance_scale != nullptr ? 2 * args.samples : args.samples;
  const auto state = [&](const char* name, const float* data, const Layout& layout) {
    return Array{name, data, sizeof(float), args.samples, args.channels, args.pixels, layout};
  };
  const Array out = state("out", args.out, args.out_layout);
  std::vector<Array> written{out};
  std::vector<Array> read{
      {"model_output", args.model_output, size_of("model_dtype", args.model_dtype), rows,
       args.model_channels, args.pixels, args.model_layout},
      row_of("coefficients", reinterpret_cast<const float*>(args.coefficients),
             args.table_rows * kCoefficients),
      row_of("index", reinterpret_cast<const int32_t*>(args.index),
             args.table_rows * kIndexColumns),
      row_of("row", args.row, args.samples),
      row_of("seed", args.seed, args.samples),
      row_of("sample_index", args.sample_index, args.samples)};
  const bool in_place = args.out == args.x_t && same(args.out_layout, args.x_layout);
  if (!in_place) read.push_back(state("x_t", args.x_t, args.x_layout));
  if (args.noise != nullptr) read.push_back(state("noise", args.noise, args.noise_layout));
  if (args.guidance_scale != nullptr) {
    read.push_back(row_of("guidance_scale", args.guidance_scale, 1));
  }
  if (args.previous != nullptr) {
    written.push_back(state("previous", args.previous, args.previous_layout));
  }
  if (args.next_input != nullptr) {
    written.push_back({"next_input", args.next_input, size_of("next_dtype", args.next_dtype), rows,
                       args.channels, args.pixels, args.next_layout});
  }
  if (args.status != nullptr) written.push_back(row_of("status", args.status, 4));
  require_arrays(written, read);
}

}  // namespace

void randn(const RandnArgs& args, const ParallelFor& parallel_for) {
  check(args);
  share_out(parallel_for, [&](const auto& share) { randn_on_cpu(args, share); });
}

void q_sample(const QSampleArgs& args, const ParallelFor& parallel_for) {
  check(args);
  share_out(parallel_for, [&](const auto& share) { q_sample_on_cpu(args, share); });
}

void p_sample_step(const StepArgs& args, const ParallelFor& parallel_for) {
  check(args);
  const bool has_previous = args.previous != nullptr || args.channels * args.pixels == 0;
  share_out(parallel_for, [&](const auto& share) { step_on_cpu(args, has_previous, share); });
}

const char* cpu_level() { return cpu_level_name(); }

}  // namespace ddpm_fast
