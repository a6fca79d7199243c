// The kernels on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu_run.h"

namespace py = pybind11;

namespace ddpm_fast {
namespace {

using Shape = std::vector<py::ssize_t>;
using Optional = std::optional<py::array>;

constexpr auto calling_thread = [](int64_t chunks, const auto& body) { body(0, chunks); };

Shape shape_of(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

std::string text(const Shape& shape) { return py::str(py::tuple(py::cast(shape))); }

void require_walkable(const char* name, const py::array& a) {
  require(a.flags() & py::array::c_style, name,
          " must be C-contiguous; pass numpy.ascontiguousarray of it.");
  require_aligned(name, a.data(), static_cast<size_t>(a.itemsize()));
}

// The array's elements, which must be of type T and in C order.
template <class T>
T* elements(const char* name, const py::array& a) {
  require(py::isinstance<py::array_t<T>>(a), name, " must be ",
          std::string(py::str(py::dtype::of<T>())), ", but it is ", std::string(py::str(a.dtype())),
          ".");
  require_walkable(name, a);
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

struct Named {
  const char* name;
  const py::array* array;  // or null
};

// What is written can be written, and shares memory with nothing else.
void check_memory(std::initializer_list<Named> written, std::initializer_list<Named> read) {
  std::vector<Bytes> all;
  auto add = [&](const Named& argument) {
    if (argument.array == nullptr) return;
    const auto first = reinterpret_cast<uintptr_t>(argument.array->data());
    all.push_back({argument.name, first, first + static_cast<uintptr_t>(argument.array->nbytes())});
  };
  for (const Named& argument : written) {
    require(argument.array == nullptr || argument.array->writeable(), argument.name,
            " is written, so it must be writeable.");
    add(argument);
  }
  const size_t count = all.size();
  for (const Named& argument : read) add(argument);
  require_separate(all, count);
}

// A state (N, C, ...), whose elements lie in C order.
struct State {
  Shape shape;
  int64_t samples, channels = 1, pixels = 1;

  State(const char* name, const py::array& a, size_t dimensions) : shape(shape_of(a)) {
    require(shape.size() >= dimensions, name, " must have the shape (N, ",
            dimensions > 1 ? "C, " : "", "...), but it is ", text(shape), ".");
    samples = shape[0];
    if (shape.size() > 1) channels = shape[1];
    for (size_t i = 2; i < shape.size(); ++i) pixels *= shape[i];
    require_elements(channels * pixels);
  }
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
  py::gil_scoped_release release;
  randn_on_cpu(args, calling_thread);
  return out;
}

py::tuple q_sample(const py::array& x_start, const py::array& coefficients,
                   const py::array& timesteps, const py::array& seed, const py::array& sample_index,
                   const Optional& noise) {
  const State state("x_start", x_start, 1);
  const Shape n{state.shape[0]};
  const py::ssize_t rows = rows_of("coefficients", coefficients);
  py::array_t<float> x_t(state.shape), drawn(noise ? Shape{0} : state.shape);
  const QSampleArgs args{.samples = state.samples,
                         .channels = state.channels,
                         .pixels = state.pixels,
                         .table_rows = rows,
                         .x_t = x_t.mutable_data(),
                         .noise_out = noise ? nullptr : drawn.mutable_data(),
                         .x_start = elements<float>("x_start", x_start),
                         .noise = optional<float>("noise", noise, state.shape),
                         .coefficients = shaped<float>("coefficients", coefficients, {rows, 2}),
                         .timesteps = shaped<int64_t>("timesteps", timesteps, n),
                         .seed = shaped<int64_t>("seed", seed, n),
                         .sample_index = shaped<int64_t>("sample_index", sample_index, n)};
  {
    py::gil_scoped_release release;
    q_sample_on_cpu(args, calling_thread);
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
  require_walkable("model_output", model_output);
  args->model_output = model_output.data();
  args->model_dtype = model_dtype(model_output);
  args->model_channels = shape.size() > 1 ? shape[1] : 1;
  args->model_layout = contiguous(args->model_channels, state.pixels);
}

py::array_t<float> p_sample_step(const py::array& x_t, const py::array& model_output,
                                 const py::array& coefficients, const py::array& index,
                                 const py::array& row, const py::array& seed,
                                 const py::array& sample_index, const Optional& noise,
                                 std::optional<float> guidance_scale, const Optional& previous,
                                 const Optional& status) {
  const State state("x_t", x_t, 2);
  const Shape n{state.shape[0]};
  const py::ssize_t rows = rows_of("coefficients", coefficients);
  py::array_t<float> out(state.shape);
  StepArgs args{
      .samples = state.samples,
      .channels = state.channels,
      .pixels = state.pixels,
      .table_rows = rows,
      .out = out.mutable_data(),
      .x_t = elements<float>("x_t", x_t),
      .noise = optional<float>("noise", noise, state.shape),
      .previous = optional<float>("previous_pred_xstart", previous, state.shape),
      .guidance_scale = guidance_scale ? &*guidance_scale : nullptr,
      .coefficients = reinterpret_cast<const Coefficients*>(
          shaped<float>("coefficients", coefficients, {rows, kCoefficients})),
      .index =
          reinterpret_cast<const RowIndex*>(shaped<int32_t>("index", index, {rows, kIndexColumns})),
      .row = shaped<int64_t>("row", row, n),
      .seed = shaped<int64_t>("seed", seed, n),
      .sample_index = shaped<int64_t>("sample_index", sample_index, n),
      .status = optional<int32_t>("status", status, {4}),
  };
  set_model_output(&args, state, model_output);
  check_memory({{"previous_pred_xstart", previous ? &*previous : nullptr},
                {"status", status ? &*status : nullptr}},
               {{"x_t", &x_t},
                {"model_output", &model_output},
                {"coefficients", &coefficients},
                {"index", &index},
                {"row", &row},
                {"seed", &seed},
                {"sample_index", &sample_index},
                {"noise", noise ? &*noise : nullptr}});
  py::gil_scoped_release release;
  step_on_cpu(args, previous.has_value(), calling_thread);
  return out;
}

}  // namespace

void bind_numpy(py::module_& m) {
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
        py::arg("status") = py::none(),
        "ops.p_sample_step on NumPy arrays: x_t float32 (N, C, ...), model_output float32 or "
        "float16, guidance_scale a number -> x_prev.");
}

}  // namespace ddpm_fast
