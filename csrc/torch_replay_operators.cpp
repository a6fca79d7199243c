// The operators that a recording can have: our own layers', and what else the layers of fused.py
// call. Each takes what its schema has.
#include <algorithm>
#include <array>
#include <iterator>

#include "replay.h"
#include "torch_layers.h"

// Of torch's C interface for what its compiler generates, in torch 2.11 to 2.13 (whose header is
// not for the stable ABI); absent where torch was built without oneDNN.
extern "C" {
#define WHERE_TORCH_HAS_IT __attribute__((weak, visibility("default")))
AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const int64_t* padding,
    int64_t paddings, const int64_t* stride, int64_t strides, const int64_t* dilation,
    int64_t dilations, int64_t groups, const char* attr, const double** scalars, int64_t count,
    const char** algorithm, AtenTensorHandle* result) WHERE_TORCH_HAS_IT;
AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
    AtenTensorHandle x, AtenTensorHandle other, AtenTensorHandle weight, AtenTensorHandle* bias,
    const int64_t* padding, int64_t paddings, const int64_t* stride, int64_t strides,
    const int64_t* dilation, int64_t dilations, int64_t groups, const char* binary_attr,
    double* alpha, const char** unary_attr, const double** scalars, int64_t count,
    const char** algorithm, AtenTensorHandle* result) WHERE_TORCH_HAS_IT;
#undef WHERE_TORCH_HAS_IT
}

namespace ddpm_fast {
namespace {

constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

// The first of its results; those of gradients are dropped.
template <size_t results = 1, class... Arguments>
Tensor dispatch(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), results)> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  for (size_t i = 1; i < results; ++i) torch::stable::detail::to<Tensor>(stack[i]);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Any view of a tensor, of the same memory: sizes and strides are a recording's constants, the
// offset is from the tensor's first element.
Tensor view(Tensor of, Integers sizes, Integers strides, int64_t offset) {
  int64_t first = 0, bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(of.get(), &first));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(of.get(), &bytes));
  // In float64, which numbers of any size cannot overflow.
  const double begin = static_cast<double>(first) + static_cast<double>(offset);
  double end = begin + 1;
  bool is_valid = sizes.size() == strides.size(), is_empty = false;
  for (size_t i = 0; is_valid && i < sizes.size(); ++i) {
    is_valid = sizes[i] >= 0 && strides[i] >= 0;
    is_empty = is_empty || sizes[i] == 0;
    end += (static_cast<double>(sizes[i]) - 1) * static_cast<double>(strides[i]);
  }
  const double room = static_cast<double>(bytes) / static_cast<double>(of.element_size());
  require(is_valid && (is_empty || (begin >= 0 && end <= room)),
          "a view of this recording lies outside its tensor.");
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      of.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &made));
  return Tensor(made);
}

Tensor bmm(Tensor x, Tensor y) { return dispatch("aten::bmm", x, y); }

Tensor softmax(Tensor x, int64_t dimension, bool half_to_float) {
  return dispatch("aten::_softmax", x, dimension, half_to_float);
}

Tensor flash_attention(Tensor query, Tensor key, Tensor value, double dropout, bool is_causal,
                       Maybe<Tensor> mask, Maybe<double> scale) {
  return dispatch<2>("aten::_scaled_dot_product_flash_attention_for_cpu", query, key, value,
                     dropout, is_causal, mask, scale);
}

Tensor avg_pool2d(Tensor x, Integers kernel_size, Integers stride, Integers padding, bool ceil_mode,
                  bool count_padding, Maybe<int64_t> divisor) {
  return dispatch("aten::avg_pool2d", x, kernel_size, stride, padding, ceil_mode, count_padding,
                  divisor);
}

Tensor upsample_nearest2d(Tensor x, Integers size, Maybe<double> height, Maybe<double> width) {
  return dispatch("aten::upsample_nearest2d", x, size, height, width);
}

Tensor constant_pad(Tensor x, Integers padding, double value) {
  return torch::stable::pad(x, padding, "constant", value);
}

Tensor copy_to(Tensor x, Tensor from, bool) { return torch::stable::copy_(x, from); }

// Layout, device and the like are x's: others have no kind of value.
using Default = std::monostate;

ScalarType dtype_at(int64_t number) {
  require(number >= 0 && number < std::ssize(kDtypes), "this recording has an unknown dtype.");
  return kDtypes[number];
}

Tensor convert(Tensor x, int64_t dtype, Default, Default, Default, bool, Default) {
  return torch::stable::to(x, dtype_at(dtype));
}

Tensor new_empty(Tensor x, Integers size, Default, Default, Default, bool) {
  return torch::stable::new_empty(x, size);
}

// oneDNN's convolutions, whose schemas the stable ABI cannot call; nothing follows them.
AtenTensorHandle* handle_of(const Maybe<Tensor>& bias, AtenTensorHandle& handle) {
  if (!bias) return nullptr;
  handle = bias->get();
  return &handle;
}

Tensor convolution(Tensor x, Tensor weight, Maybe<Tensor> bias, Integers padding, Integers stride,
                   Integers dilation, int64_t groups, std::string after, Integers scalars,
                   std::string algorithm) {
  AtenTensorHandle made = nullptr, handle = nullptr;
  const char* name = algorithm.c_str();
  require(scalars.empty(), "this recording has a convolution with scalars.");
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mkldnn__convolution_pointwise(
      x.get(), weight.get(), handle_of(bias, handle), padding.data(), std::ssize(padding),
      stride.data(), std::ssize(stride), dilation.data(), std::ssize(dilation), groups,
      after.c_str(), nullptr, 0, &name, &made));
  return Tensor(made);
}

Tensor convolution_and(Tensor x, Tensor other, Tensor weight, Maybe<Tensor> bias, Integers padding,
                       Integers stride, Integers dilation, int64_t groups, std::string binary,
                       Default, Default, Integers scalars, Default) {
  AtenTensorHandle made = nullptr, handle = nullptr;
  require(scalars.empty(), "this recording has a convolution with scalars.");
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
      x.get(), other.get(), weight.get(), handle_of(bias, handle), padding.data(),
      std::ssize(padding), stride.data(), std::ssize(stride), dilation.data(), std::ssize(dilation),
      groups, binary.c_str(), nullptr, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

}  // namespace

const std::vector<Operator>& recordable() {
  static const auto* const all = [] {
    auto* list = new std::vector<Operator>{
        operator_of<&view>("view"),
        operator_of<&group_norm>("ddpm_fast::group_norm"),
        operator_of<&conv2d>("ddpm_fast::conv2d"),
        operator_of<&upsample_conv2d>("ddpm_fast::upsample_conv2d"),
        operator_of<&attention>("ddpm_fast::attention"),
        operator_of<&bmm>("aten::bmm"),
        operator_of<&softmax>("aten::_softmax"),
        operator_of<&flash_attention>("aten::_scaled_dot_product_flash_attention_for_cpu"),
        operator_of<&avg_pool2d>("aten::avg_pool2d"),
        operator_of<&upsample_nearest2d>("aten::upsample_nearest2d"),
        operator_of<&constant_pad>("aten::constant_pad_nd"),
        operator_of<&copy_to>("aten::copy_"),
        operator_of<&convert>("aten::_to_copy"),
        operator_of<&new_empty>("aten::new_empty"),
    };
    if (aoti_torch_cpu_mkldnn__convolution_pointwise != nullptr) {
      list->push_back(operator_of<&convolution>("mkldnn::_convolution_pointwise"));
      list->push_back(operator_of<&convolution_and>("mkldnn::_convolution_pointwise.binary"));
    }
    return list;
  }();
  return *all;
}

std::vector<std::string> replay_operators() {
  std::vector<std::string> names;
  for (const Operator& each : recordable()) names.push_back(each.name);
  return names;
}

}  // namespace ddpm_fast
