// pybind11, apart from torch's headers: what was built, what this CPU can do, and the kernels on
// NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "require.h"

namespace py = pybind11;

namespace ddpm_fast {
namespace {

using Shape = std::vector<py::ssize_t>;
using Optional = std::optional<py::array>;

std::vector<std::string> levels(bool available_only) {
  const char* names[3];
  const int count = cpu_levels(names, available_only);
  return {names, names + count};
}

py::dict build_config() {
  py::dict config;
  config["version"] = DDPM_FAST_VERSION;
  config["compiler"] = DDPM_FAST_COMPILER;
  config["build_type"] = DDPM_FAST_BUILD_TYPE;
  config["torch"] = DDPM_FAST_TORCH;
  config["cpu_levels"] = levels(false);
  config["cuda_compiled"] = DDPM_FAST_CUDA_COMPILED != 0;
#ifdef DDPM_FAST_WITH_CUDA
  config["cuda_linked"] = true;
#else
  config["cuda_linked"] = false;
#endif
  return config;
}

Shape shape_of(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

std::string text(const Shape& shape) { return py::str(py::tuple(py::cast(shape))); }

// The array's elements, which must be of type T and in C order.
template <class T>
T* elements(const char* name, const py::array& a) {
  require(py::isinstance<py::array_t<T>>(a), name, " must be ",
          std::string(py::str(py::dtype::of<T>())), ", but it is ", std::string(py::str(a.dtype())),
          ".");
  require(a.flags() & py::array::c_style, name,
          " must be C-contiguous; pass numpy.ascontiguousarray of it.");
  return static_cast<T*>(const_cast<void*>(a.data()));
}

template <class T>
T* shaped(const char* name, const py::array& a, const Shape& shape) {
  require(shape_of(a) == shape, name, " must have the shape ", text(shape), ", but it is ",
          text(shape_of(a)), ".");
  return elements<T>(name, a);
}

template <class T>
T* optional(const char* name, const Optional& a, const Shape& shape) {
  return a ? shaped<T>(name, *a, shape) : nullptr;
}

py::ssize_t rows_of(const char* name, const py::array& table) {
  require(table.ndim() == 2, name, " must have two dimensions, but it is ", text(shape_of(table)),
          ".");
  return table.shape(0);
}

Bytes bytes_of(const py::array& a) {
  const auto first = reinterpret_cast<uintptr_t>(a.data());
  return {first, first + a.nbytes()};
}

// A state (N, C, ...), whose elements lie in C order.
struct State {
  Shape shape;
  int64_t samples, channels = 1, pixels = 1;

  State(const char* name, const py::array& a) : shape(shape_of(a)) {
    require(!shape.empty(), name, " must have the samples as its first dimension.");
    samples = shape[0];
    if (shape.size() > 1) channels = shape[1];
    for (size_t i = 2; i < shape.size(); ++i) pixels *= shape[i];
    require_elements(channels * pixels);
  }
  int64_t chunks() const { return samples * chunks_of(channels * pixels); }
  Layout layout() const { return {channels * pixels, pixels, 1}; }
};

py::array_t<float> randn(const py::array& seed, const py::array& sample_index, int64_t count,
                         int32_t step, int32_t stream) {
  require(seed.ndim() == 1, "seed must have the shape (N,), but it is ", text(shape_of(seed)), ".");
  require(count >= 0, "elements must be 0 or more, but it is ", count, ".");
  require_elements(count);
  require_noise(step, stream);
  const Shape samples = shape_of(seed);
  py::array_t<float> out({samples[0], static_cast<py::ssize_t>(count)});
  const RandnArgs args{out.mutable_data(),
                       elements<int64_t>("seed", seed),
                       shaped<int64_t>("sample_index", sample_index, samples),
                       samples[0],
                       count,
                       step,
                       stream};
  const CpuKernels& kernels = cpu_kernels();
  py::gil_scoped_release release;
  kernels.randn(args, 0, args.samples * chunks_of(count));
  return out;
}

py::tuple q_sample(const py::array& x_start, const py::array& coefficients,
                   const py::array& timesteps, const py::array& seed, const py::array& sample_index,
                   const Optional& noise) {
  const State state("x_start", x_start);
  const Shape n{state.shape[0]};
  const py::ssize_t rows = rows_of("coefficients", coefficients);
  py::array_t<float> x_t(state.shape), drawn(noise ? Shape{0} : state.shape);
  const QSampleArgs args{x_t.mutable_data(),
                         noise ? nullptr : drawn.mutable_data(),
                         elements<float>("x_start", x_start),
                         optional<float>("noise", noise, state.shape),
                         shaped<float>("coefficients", coefficients, {rows, 2}),
                         shaped<int64_t>("timesteps", timesteps, n),
                         shaped<int64_t>("seed", seed, n),
                         shaped<int64_t>("sample_index", sample_index, n),
                         state.layout(),
                         state.samples,
                         state.channels,
                         state.pixels,
                         rows,
                         1};
  require_timesteps(args);
  const CpuKernels& kernels = cpu_kernels();
  {
    py::gil_scoped_release release;
    kernels.q_sample(args, 0, state.chunks());
  }
  return py::make_tuple(x_t, noise ? *noise : py::array(drawn));
}

// model_output: float32, or float16, which pybind11 has no type for.
DType model_dtype(const py::array& model_output) {
  if (py::isinstance<py::array_t<float>>(model_output)) return DType::kFloat32;
  const std::string name = py::str(model_output.dtype());
  require(name == "float16", "model_output must be float32 or float16, but it is ", name, ".");
  return DType::kFloat16;
}

void set_model_output(StepArgs* args, const State& state, const py::array& model_output) {
  Shape single = state.shape;
  if (args->guidance_scale != nullptr) single[0] *= 2;
  Shape twice = single;
  if (twice.size() > 1) twice[1] *= 2;
  const Shape shape = shape_of(model_output);
  require(shape == single || shape == twice, "model_output must have the shape ", text(single),
          ", or with a learned variance ", text(twice), ", but it is ", text(shape), ".");
  require(model_output.flags() & py::array::c_style,
          "model_output must be C-contiguous; pass numpy.ascontiguousarray of it.");
  args->model_output = model_output.data();
  args->model_dtype = model_dtype(model_output);
  args->model_channels = static_cast<int32_t>(shape.size() > 1 ? shape[1] : 1);
  args->model_layout = {args->model_channels * state.pixels, state.pixels, 1};
}

py::array_t<float> p_sample_step(const py::array& x_t, const py::array& model_output,
                                 const py::array& coefficients, const py::array& index,
                                 const py::array& row, const py::array& seed,
                                 const py::array& sample_index, const Optional& noise,
                                 std::optional<float> guidance_scale, const Optional& previous) {
  const State state("x_t", x_t);
  const Shape n{state.shape[0]};
  const py::ssize_t rows = rows_of("coefficients", coefficients);
  py::array_t<float> out(state.shape);
  StepArgs args{};
  args.out = out.mutable_data();
  args.x_t = elements<float>("x_t", x_t);
  args.noise = optional<float>("noise", noise, state.shape);
  args.previous = optional<float>("previous_pred_xstart", previous, state.shape);
  args.guidance_scale = guidance_scale ? &*guidance_scale : nullptr;
  args.coefficients = shaped<float>("coefficients", coefficients, {rows, kCoefficients});
  args.index = shaped<int32_t>("index", index, {rows, kIndexColumns});
  args.row = shaped<int64_t>("row", row, n);
  args.seed = shaped<int64_t>("seed", seed, n);
  args.sample_index = shaped<int64_t>("sample_index", sample_index, n);
  args.out_layout = args.x_layout = args.noise_layout = args.previous_layout = state.layout();
  args.samples = state.samples;
  args.channels = state.channels;
  args.pixels = state.pixels;
  args.table_rows = rows;
  set_model_output(&args, state, model_output);
  require_rows(args, previous.has_value());
  if (previous) {
    require(previous->writeable(), "previous_pred_xstart is written, so it must be writeable.");
    const Bytes written = bytes_of(*previous);
    require_disjoint("previous_pred_xstart", written, "x_t", bytes_of(x_t));
    require_disjoint("previous_pred_xstart", written, "model_output", bytes_of(model_output));
    if (noise) require_disjoint("previous_pred_xstart", written, "noise", bytes_of(*noise));
  }
  const CpuKernels& kernels = cpu_kernels();
  py::gil_scoped_release release;
  kernels.step(args, 0, state.chunks());
  return out;
}

}  // namespace
}  // namespace ddpm_fast

PYBIND11_MODULE(_C, m) {
  using namespace ddpm_fast;
  m.doc() = "Compiled kernels of ddpm_fast; importing it registers torch.ops.ddpm_fast.";
  m.def("build_config", &build_config, "What was compiled into this module.");
  m.def("cpu_level", [] { return cpu_kernels().name; }, "The instruction-set level in use.");
  m.def(
      "cpu_levels_available", [] { return levels(true); },
      "The compiled levels that this CPU has, best last.");
  m.def("_set_cpu_level", &set_cpu_level, py::arg("name"),
        "Use this level from now on (for tests); RuntimeError if it is not available.");
  // On the calling thread, without the GIL. Arrays in C order; the arguments are those of
  // ddpm_fast/ops.py, and RuntimeError says in a sentence which one is not so.
  m.def(
      "randn", &randn, py::arg("seed"), py::arg("sample_index"), py::arg("elements"),
      py::arg("step"), py::arg("stream") = 0,
      "Normals of the noise contract: seed and sample_index int64 (N,) -> float32 (N, elements).");
  m.def("q_sample", &q_sample, py::arg("x_start"), py::arg("coefficients"), py::arg("timesteps"),
        py::arg("seed"), py::arg("sample_index"), py::arg("noise") = py::none(),
        "ops.q_sample on NumPy arrays: x_start float32 (N, ...) -> (x_t, noise).");
  m.def("p_sample_step", &p_sample_step, py::arg("x_t"), py::arg("model_output"),
        py::arg("coefficients"), py::arg("index"), py::arg("row"), py::arg("seed"),
        py::arg("sample_index"), py::arg("noise") = py::none(),
        py::arg("guidance_scale") = py::none(), py::arg("previous_pred_xstart") = py::none(),
        "ops.p_sample_step on NumPy arrays: x_t float32 (N, C, ...), model_output float32 or "
        "float16, guidance_scale a number -> x_prev.");
}
