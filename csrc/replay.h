// The calls that a recording is made of: an operator, and what it is given.
#pragma once

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "torch_checks.h"

namespace ddpm_fast {

using Integers = std::vector<int64_t>;
template <class T>
using Maybe = std::optional<T>;

// The place of a tensor that each replay makes, or is given.
struct Slot {
  size_t number;
};
using Slots = std::vector<Maybe<Tensor>>;
// A tensor in a value is a constant.
using Value = std::variant<std::monostate, Slot, Tensor, int64_t, double, Integers, std::string>;
using Values = std::vector<Value>;

// A value as the type that a function takes: what does not fit is refused, since a recording could
// be made by hand.
template <class T>
struct As {
  static const T& of(const Value& value, const Slots&) {
    const T* found = std::get_if<T>(&value);
    require(found != nullptr,
            "an operator of this recording was given another type than it takes.");
    return *found;
  }
};
template <>
struct As<bool> {
  static bool of(const Value& value, const Slots& slots) {
    return As<int64_t>::of(value, slots) != 0;
  }
};
template <>
struct As<Tensor> {
  static const Tensor& of(const Value& value, const Slots& slots) {
    const Slot* slot = std::get_if<Slot>(&value);
    if (slot == nullptr) return As<Tensor>::constant(value);
    require(slots[slot->number].has_value(), "this recording reads a tensor before it is made.");
    return *slots[slot->number];
  }
  static const Tensor& constant(const Value& value) {
    const Tensor* found = std::get_if<Tensor>(&value);
    require(found != nullptr, "an operator of this recording was given no tensor.");
    return *found;
  }
};
template <class T>
struct As<Maybe<T>> {
  static Maybe<T> of(const Value& value, const Slots& slots) {
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    return As<T>::of(value, slots);
  }
};

using Call = Tensor (*)(const Values&, const Slots&);

struct Operator {
  std::string name;  // as torch has it, with its overload
  Call call;
  size_t inputs;
};

template <class... Arguments>
constexpr size_t count_of(Tensor (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto function, class... Arguments>
Tensor call_of(Tensor (*)(Arguments...), const Values& values, const Slots& slots) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return function(As<Arguments>::of(values[i], slots)...);
  }(std::index_sequence_for<Arguments...>{});
}

// `function` as an operator of this name.
template <auto function>
Operator operator_of(const char* name) {
  const Call call = [](const Values& values, const Slots& slots) {
    return call_of<function>(function, values, slots);
  };
  return {name, call, count_of(function)};
}

// All of them, by the numbers that a recording has for them; in torch_replay_operators.cpp.
const std::vector<Operator>& recordable();

}  // namespace ddpm_fast
