// Fuzzes the CPU kernels over shapes, strides, offsets, types and ranges, and holds every level
// that this CPU has against the baseline, bit for bit. Built by itself, with sanitizers:
//   cmake -B build-fuzz -DDDPM_FAST_SANITIZE=address,undefined && cmake --build build-fuzz
//   build-fuzz/kernels_fuzz [cases] [seed]
// Philox' published words are held against them too.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "fuzz_tensors.h"
#include "published_words.h"

namespace {

using namespace ddpm_fast;

int64_t chunk_count(const Shape& shape) { return shape.samples * chunks_of(shape.elements()); }

// Runs `kernel(begin, end)` over all chunks in two ranges, at every level, and compares what is
// then in `written` with the baseline's.
void compare(const char* what, const Shape& shape, std::vector<Buffer*> written,
             const std::function<int64_t(const CpuKernels&, int64_t, int64_t)>& kernel) {
  const char* names[kCpuLevels];
  const int levels = cpu_levels(names, true);
  const int64_t chunks = chunk_count(shape), middle = below(chunks + 1);
  std::vector<std::string> expected;
  int64_t expected_bad = 0;
  for (int level = 0; level < levels; ++level) {
    set_cpu_level(names[level]);
    for (Buffer* buffer : written) buffer->reset();
    int64_t bad = kernel(cpu_kernels(), 0, middle), later = kernel(cpu_kernels(), middle, chunks);
    if (bad < 0) bad = later;
    if (level == 0) {
      expected_bad = bad;
      for (Buffer* buffer : written) expected.push_back(buffer->bytes());
      continue;
    }
    for (size_t i = 0; i < written.size(); ++i) {
      if (bad == expected_bad && equal(written[i]->bytes(), expected[i], written[i]->dtype)) {
        continue;
      }
      std::printf("%s: %s differs from %s in output %zu, shape (%ld, %ld, %ld)\n", what,
                  names[level], names[0], i, static_cast<long>(shape.samples),
                  static_cast<long>(shape.channels), static_cast<long>(shape.pixels));
      std::exit(1);
    }
  }
}

std::vector<int64_t> random_indices(int64_t n, bool small) {
  std::vector<int64_t> values(n);
  for (int64_t& value : values) value = small ? below(3) : static_cast<int64_t>(random_bits());
  return values;
}

void fuzz_randn() {
  const Shape shape = random_shape();
  const auto seed = random_indices(shape.samples, false), index = random_indices(shape.samples, 0);
  const Shape flat{1, 1, shape.samples * shape.elements()};
  Buffer out(DType::kFloat32, flat);
  out.layout = {flat.pixels, flat.pixels, 1};
  const auto step = static_cast<int32_t>(below(1 << 20));
  compare("randn", shape, {&out}, [&](const CpuKernels& kernels, int64_t begin, int64_t end) {
    kernels.randn({out.data<float>(), seed.data(), index.data(), shape.samples, shape.elements(),
                   step, static_cast<int32_t>(step & 2)},
                  begin, end);
    return int64_t{-1};
  });
}

void fuzz_q_sample() {
  const Shape shape = random_shape();
  Buffer x_start(DType::kFloat32, shape), x_t, noise;
  x_t = Buffer(DType::kFloat32, shape);
  // One layout serves all.
  const auto copied = [&](Buffer* to) {
    to->layout = x_start.layout;
    to->offset = x_start.offset;
    to->first.assign(x_start.first.size(), 1);
    to->reset();
  };
  copied(&x_t);
  copied(&noise);
  const bool given = flip(), past_caches = flip();
  const float coefficients[] = {0.9f, 0.3f, 0.5f, 0.8f, 0.0f, 1.0f};
  const auto t = random_indices(shape.samples, true), seed = random_indices(shape.samples, false);
  compare("q_sample", shape, {&x_t, &noise},
          [&](const CpuKernels& kernels, int64_t begin, int64_t end) {
            float* z = noise.data<float>();
            kernels.q_sample({.samples = shape.samples,
                              .channels = shape.channels,
                              .pixels = shape.pixels,
                              .table_rows = 3,
                              .x_t = x_t.data<float>(),
                              .noise_out = given ? nullptr : z,
                              .x_start = x_start.data<float>(),
                              .noise = given ? z : nullptr,
                              .coefficients = coefficients,
                              .timesteps = t.data(),
                              .seed = seed.data(),
                              .sample_index = seed.data(),
                              .layout = x_start.layout,
                              .past_caches = past_caches},
                             begin, end);
            return int64_t{-1};
          });
}

DType random_dtype() { return static_cast<DType>(below(3)); }

void fuzz_step() {
  const Shape shape = random_shape();
  const bool guided = flip(), learned = flip();
  Shape model_shape = shape, next_shape = shape;
  if (guided) model_shape.samples = next_shape.samples = 2 * shape.samples;
  if (learned) model_shape.channels *= 2;
  Buffer x(DType::kFloat32, shape), out(DType::kFloat32, shape), noise(DType::kFloat32, shape);
  Buffer model(random_dtype(), model_shape), previous(DType::kFloat32, shape);
  Buffer next(random_dtype(), next_shape);
  const float scale = 1.7f;
  // All terms; a plain row; a copy of x_t with infinite clips.
  Coefficients table[3] = {
      {1.2f, -.7f, .6f, .3f, -.2f, .1f, .3f, -7.f, -1.f, -1.f, 1.f, {}},
      {1.1f, -.4f, .5f, .4f, 0, 0, .2f, -7.f, -1.f, -1.f, 1.f, {}},
      {0, 0, 0, 1.f, 0, 0, 0, -7.f, -1.f, -__builtin_inff(), __builtin_inff(), {}}};
  const RowIndex index[3] = {{0, 7, learned ? 1 : 0, 0}, {0, (1 << 20) - 1, 0, 0}, {0, 0, 0, 0}};
  const auto row = random_indices(shape.samples, true), seed = random_indices(shape.samples, false);
  const bool in_place = flip(), has_previous = flip();
  if (!has_previous) table[0].c2 = 0;
  StepArgs args{};
  args.guidance_scale = guided ? &scale : nullptr;
  args.coefficients = table;
  args.index = index;
  args.row = row.data();
  args.seed = args.sample_index = seed.data();
  args.x_layout = x.layout;
  args.out_layout = in_place ? x.layout : out.layout;
  args.model_layout = model.layout;
  args.noise_layout = noise.layout;
  args.previous_layout = previous.layout;
  args.next_layout = next.layout;
  args.samples = shape.samples;
  args.channels = shape.channels;
  args.pixels = shape.pixels;
  args.table_rows = 3;
  args.model_dtype = model.dtype;
  args.next_dtype = next.dtype;
  args.model_channels = static_cast<int32_t>(model_shape.channels);
  const bool given = flip(), has_next = flip();
  compare("step", shape, {&x, &out, &previous, &next},
          [&](const CpuKernels& kernels, int64_t begin, int64_t end) {
            args.x_t = x.data<float>();
            args.out = in_place ? x.data<float>() : out.data<float>();
            args.model_output = model.data();
            args.noise = given ? noise.data<float>() : nullptr;
            args.previous = has_previous ? previous.data<float>() : nullptr;
            args.next_input = has_next ? next.data() : nullptr;
            return kernels.step(args, begin, end);
          });
}

// As many floats as a sample may have; only the pages that are written become memory.
class FarFloats {
 public:
  FarFloats() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) data = static_cast<float*>(memory);
  }
  FarFloats(const FarFloats&) = delete;
  ~FarFloats() {
    if (data != nullptr) munmap(data, kBytes);
  }

  float* data = nullptr;

 private:
  static constexpr size_t kBytes = kMaxElements * sizeof(float);
};

void far_elements(float* out) {
  const char* names[kCpuLevels];
  const int levels = cpu_levels(names, true);
  const int64_t elements = (int64_t{1} << 31) + 4099, count = 4099, seed = 3;
  const int64_t chunks = chunks_of(elements);
  std::string expected;
  for (int level = 0; level < levels; ++level) {
    set_cpu_level(names[level]);
    cpu_kernels().randn({out, &seed, &seed, 1, elements, 5, 0}, chunks - 2, chunks);
    const std::string got(reinterpret_cast<char*>(out + elements - count), count * 4);
    if (level == 0) expected = got;
    if (got != expected || got == std::string(count * 4, '\0')) {
      std::printf("randn past 2^31 elements: %s differs\n", names[level]);
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  state = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int i = 0; i < cases; ++i) {
    fuzz_randn();
    fuzz_q_sample();
    fuzz_step();
  }
  known_words();
  const FarFloats far;
  if (far.data != nullptr) {
    far_elements(far.data);
    known_normals(far.data);
  } else {
    std::printf("no address space for 2^34 elements: not tested\n");
  }
  const char* names[kCpuLevels];
  std::printf("%d cases, %d levels agree\n", cases, cpu_levels(names, true));
}
