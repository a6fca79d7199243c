// A network's calls of operators, recorded once and replayed without Python; what records them is
// ddpm_fast/replay.py.
#include <bit>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "replay.h"

namespace ddpm_fast {
namespace {

// Of a tensor that each replay is given, which must be as it was when the recording was made: its
// views would lie elsewhere.
struct Form {
  ScalarType dtype;
  Integers sizes, strides;

  explicit Form(const Tensor& t) : dtype(t.scalar_type()) {
    for (int64_t i = 0; i < t.dim(); ++i) {
      sizes.push_back(t.size(i));
      strides.push_back(t.stride(i));
    }
  }
  bool fits(const Tensor& t) const {
    bool same = t.is_cpu() && t.scalar_type() == dtype && t.dim() == std::ssize(sizes);
    for (int64_t i = 0; same && i < t.dim(); ++i) {
      same = t.size(i) == sizes[i] && t.stride(i) == strides[i];
    }
    return same;
  }
};

struct Step {
  Call call;
  Values inputs;
  size_t output;             // its slot
  std::vector<size_t> last;  // the slots that no later step reads
};

struct Recording {
  int64_t value = 0;  // of the tensor that stands for it
  std::vector<Form> inputs;
  size_t slots, result;
  std::vector<Step> steps;
};

// What was not made by `record`, or is gone, is none.
std::mutex alive_mutex;
std::unordered_set<const void*>& alive() {
  static auto* const all = new std::unordered_set<const void*>;
  return *all;
}

// What is freed may be a last reference, for which Python may run code of any kind: without the
// lock.
void forget(Recording* recording) {
  {
    const std::lock_guard lock(alive_mutex);
    alive().erase(recording);
  }
  delete recording;
}

// Of a value, by replay.py's numbers.
enum class Kind : int64_t { kNone, kSlot, kConstant, kInteger, kFloat, kIntegers, kText };

// Reads what replay.py writes; nothing beyond it.
class Code {
 public:
  Code(const Integers& code, const std::vector<Tensor>& constants)
      : code_(code), constants_(constants) {}

  int64_t next() {
    require(position_ < code_.size(), "this recording is cut short.");
    return code_[position_++];
  }
  // Below `end`.
  size_t index(size_t end) {
    const int64_t value = next();
    require(value >= 0 && static_cast<size_t>(value) < end, "this recording has the number ", value,
            " where it must be below ", end, ".");
    return static_cast<size_t>(value);
  }
  size_t slot() { return index(slots); }
  size_t length() { return index(code_.size()); }
  Integers integers() {
    Integers values(length());
    for (int64_t& value : values) value = next();
    return values;
  }
  Value value() {
    switch (static_cast<Kind>(next())) {
      case Kind::kNone:
        return std::monostate{};
      case Kind::kSlot:
        return Slot{slot()};
      case Kind::kConstant:
        return constants_[index(constants_.size())];
      case Kind::kInteger:
        return next();
      case Kind::kFloat:
        return std::bit_cast<double>(next());
      case Kind::kIntegers:
        return integers();
      case Kind::kText:
        return text();
      default:
        require(false, "this recording has a value of an unknown kind.");
        return {};
    }
  }
  std::string text() {
    const Integers letters = integers();
    return {letters.begin(), letters.end()};
  }
  Step step() {
    const Operator& chosen = recordable()[index(recordable().size())];
    Step step{.call = chosen.call, .inputs = {}, .output = 0, .last = {}};
    for (size_t i = 0; i < chosen.inputs; ++i) step.inputs.push_back(value());
    step.output = slot();
    step.last.resize(length());
    for (size_t& last : step.last) last = slot();
    return step;
  }

  size_t slots = 0;

 private:
  const Integers& code_;
  const std::vector<Tensor>& constants_;
  size_t position_ = 0;
};

}  // namespace

// The result stands for the recording, which lives as long as it.
Tensor record(std::vector<int64_t> code, std::vector<Tensor> constants,
              std::vector<Tensor> inputs) {
  auto recording = std::make_unique<Recording>();
  for (const Tensor& input : inputs) recording->inputs.emplace_back(input);
  Code reader(code, constants);
  recording->slots = reader.slots = inputs.size() + reader.length();
  recording->steps.resize(reader.length());
  for (Step& step : recording->steps) step = reader.step();
  recording->result = reader.slot();
  const int64_t one = 1;
  Recording* const made = recording.get();
  Tensor stands = torch::stable::from_blob(
      &made->value, {&one, 1}, {&one, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Long, [made](void*) { forget(made); });
  recording.release();
  const std::lock_guard lock(alive_mutex);
  alive().insert(made);
  return stands;
}

Tensor replay(Tensor recording, std::vector<Tensor> inputs) {
  const void* const found = recording.const_data_ptr();
  {
    const std::lock_guard lock(alive_mutex);
    require(alive().count(found) > 0, "this tensor is no recording: pass what `record` returned.");
  }
  const auto& [_, forms, count, result, steps] = *static_cast<const Recording*>(found);
  require(inputs.size() == forms.size(), "this recording takes ", forms.size(),
          " tensors, but it was given ", inputs.size(), ".");
  Slots slots(count);
  for (size_t i = 0; i < inputs.size(); ++i) {
    require(forms[i].fits(inputs[i]), "input ", i, " of this recording, ", shape_text(inputs[i]),
            ", is not as it was when it was made.");
    slots[i] = std::move(inputs[i]);
  }
  for (const Step& step : steps) {
    slots[step.output] = step.call(step.inputs, slots);
    for (size_t slot : step.last) slots[slot].reset();
  }
  require(slots[result].has_value(), "this recording has no result.");
  return *slots[result];
}

}  // namespace ddpm_fast
