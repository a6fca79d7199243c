// The installed C++ library as a C++17 program without CMake finds it: what it refuses, and in
// which sentence; that memory order and threads change no bit. Built and run by
// test_cpp_package.py.
#include <ddpm_fast/ddpm_fast.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace ddpm_fast;

constexpr int64_t kSamples = 3, kChannels = 2, kPixels = 5000;
constexpr int64_t kValues = kSamples * kChannels * kPixels;
constexpr float kUntouched = -77.0f;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

// A step that is right, for a test to change.
struct Step {
  std::vector<float> out, x_t, model_output, previous;
  std::vector<Coefficients> coefficients;
  std::vector<RowIndex> index;
  std::vector<int64_t> row{0, 1, 0}, seed{-1, 7, 7}, sample_index{0, 1, int64_t{1} << 40};
  int32_t status[4] = {};
  StepArgs args;

  Step() : out(kValues, kUntouched), x_t(kValues), model_output(kValues), previous(kValues) {
    for (int64_t i = 0; i < kValues; ++i) {
      x_t[i] = static_cast<float>(i % 101) * 0.01f;
      model_output[i] = static_cast<float>(i % 37) * 0.02f - 0.3f;
    }
    Coefficients c{};
    c.a = 1.25f;
    c.b = -0.75f;
    c.c0 = 0.625f;
    c.c1 = 0.375f;
    c.sigma = 0.3f;
    c.clip_lo = -1.0f;
    c.clip_hi = 1.0f;
    coefficients.assign(2, c);
    index = {{10, 1, 0, 0}, {0, 2, 0, 0}};
    args.samples = kSamples;
    args.channels = args.model_channels = kChannels;
    args.pixels = kPixels;
    args.table_rows = 2;
    args.out = out.data();
    args.x_t = x_t.data();
    args.model_output = model_output.data();
    args.coefficients = coefficients.data();
    args.index = index.data();
    args.row = row.data();
    args.seed = seed.data();
    args.sample_index = sample_index.data();
    args.status = status;
    set_layouts(contiguous(kChannels, kPixels));
  }
  Step(const Step&) = delete;

  void set_layouts(const Layout& layout) {
    args.out_layout = args.x_layout = args.model_layout = args.previous_layout = layout;
  }
};

void refused(const std::string& sentence, const std::function<void()>& call) {
  std::string said = "nothing";
  try {
    call();
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  expect(said == "ddpm_fast: " + sentence, "\"" + sentence + "\" was wanted, but it said: " + said);
}

void step_refused(const std::string& sentence, const std::function<void(Step&)>& change) {
  Step step;
  change(step);
  refused(sentence, [&] { p_sample_step(step.args); });
  expect(step.out == std::vector<float>(kValues, kUntouched), "nothing written: " + sentence);
}

void bad_steps() {
  step_refused("out must not be null.", [](Step& s) { s.args.out = nullptr; });
  step_refused("x_t must not be null.", [](Step& s) { s.args.x_t = nullptr; });
  step_refused("model_output must not be null.", [](Step& s) { s.args.model_output = nullptr; });
  step_refused("index must not be null.", [](Step& s) { s.args.index = nullptr; });
  step_refused("samples must be between 0 and 2^34, but it is -1.",
               [](Step& s) { s.args.samples = -1; });
  step_refused(
      "a sample may have 2^34 elements, but this one has 2 channels of 17179869184 pixels.",
      [](Step& s) { s.args.pixels = kMaxElements; });
  step_refused("row[2] is 2, but the table has the rows 0 to 1.", [](Step& s) { s.row[2] = 2; });
  step_refused("row[0] is -1, but the table has the rows 0 to 1.", [](Step& s) { s.row[0] = -1; });
  step_refused("the noise step of row 1 is 1048576, but it must be between 0 and 2^20 - 1.",
               [](Step& s) { s.index[1].noise_step = 1 << 20; });
  step_refused("model_channels must be 2 or 4, but it is 3.",
               [](Step& s) { s.args.model_channels = 3; });
  step_refused(
      "row 0 takes the variance from the model, but model_output has 2 channels instead of "
      "4.",
      [](Step& s) { s.index[0].flags = kLearnedVariance; });
  step_refused("row 1 uses the previous pred_xstart; pass previous_pred_xstart.",
               [](Step& s) { s.coefficients[1].c2 = 0.5f; });
  step_refused("model_dtype must be a DType, but it is 3.",
               [](Step& s) { s.args.model_dtype = static_cast<DType>(3); });
  step_refused("x_t must begin at a multiple of its elements' 4 bytes; pass a copy.", [](Step& s) {
    s.args.x_t = reinterpret_cast<const float*>(reinterpret_cast<const char*>(s.x_t.data()) + 2);
  });
  step_refused(
      "out has the layout (0, 0, 0), in which elements share an address; use contiguous() "
      "or channels_last().",
      [](Step& s) { s.args.out_layout = Layout{}; });
  step_refused(
      "out has the layout (9223372036854775807, 5000, 1), in which 3 samples of 2 channels of "
      "5000 pixels reach past all memory.",
      [](Step& s) { s.args.out_layout.sample = std::numeric_limits<int64_t>::max(); });
  step_refused("out is written while x_t is read, so they must not share memory; pass a clone.",
               [](Step& s) { s.args.x_t = s.out.data() + 1; });
  step_refused(
      "previous is written while model_output is read, so they must not share memory; pass "
      "a clone.",
      [](Step& s) { s.args.previous = s.model_output.data(); });
}

void bad_noise() {
  std::vector<float> x(6), noise(6), table(4);
  const std::vector<int64_t> n{0, 1};
  RandnArgs draw{x.data(), n.data(), n.data(), 2, 3, 1 << 20, 0};
  refused("step must be between 0 and 2^20 - 1, but it is 1048576.", [&] { randn(draw); });
  draw.step = 0;
  draw.sample_index = nullptr;
  refused("sample_index must not be null.", [&] { randn(draw); });
  QSampleArgs args;
  args.samples = 2;
  args.channels = 3;
  args.pixels = 1;
  args.table_rows = 1;
  args.layout = contiguous(3, 1);
  args.x_start = args.x_t = x.data();
  args.noise_out = noise.data();
  args.coefficients = table.data();
  args.timesteps = args.seed = args.sample_index = n.data();
  refused("x_t is written while x_start is read, so they must not share memory; pass a clone.",
          [&] { q_sample(args); });
  std::vector<float> x_t(6);
  args.x_t = x_t.data();
  refused("timesteps[1] is 1, but the table has the rows 0 to 0.", [&] { q_sample(args); });
  args.noise = noise.data();
  refused("noise_out must be null, because noise is given.", [&] { q_sample(args); });
}

// Element (n, c, p) of `from` in another memory order.
std::vector<float> reordered(const std::vector<float>& from, const Layout& a, const Layout& b) {
  std::vector<float> to(from.size());
  for (int64_t n = 0; n < kSamples; ++n) {
    for (int64_t c = 0; c < kChannels; ++c) {
      for (int64_t p = 0; p < kPixels; ++p) {
        to[n * b.sample + c * b.channel + p * b.pixel] =
            from[n * a.sample + c * a.channel + p * a.pixel];
      }
    }
  }
  return to;
}

// One unit after the other, the last first, on two threads.
void backwards(int64_t count, const RangeBody& body) {
  const int64_t middle = count / 2;
  std::thread other([&] {
    for (int64_t i = middle; i-- > 0;) body(i, i + 1);
  });
  for (int64_t i = count; i-- > middle;) body(i, i + 1);
  other.join();
}

void same_bits() {
  Step step, other;
  p_sample_step(step.args);
  expect(step.out[0] != kUntouched && step.status[0] == 0, "a step is taken");
  const Layout plain = contiguous(kChannels, kPixels), last = channels_last(kChannels, kPixels);
  other.x_t = reordered(step.x_t, plain, last);
  other.model_output = reordered(step.model_output, plain, last);
  other.args.x_t = other.x_t.data();
  other.args.model_output = other.model_output.data();
  other.args.out = other.x_t.data();  // in place
  other.set_layouts(last);
  p_sample_step(other.args, backwards);
  expect(reordered(other.x_t, last, plain) == step.out, "memory order, threads and place");
}

void not_finite() {
  Step step;
  step.model_output[static_cast<size_t>(kChannels * kPixels + 9)] =
      std::numeric_limits<float>::quiet_NaN();
  p_sample_step(step.args, backwards);
  const int32_t want[4] = {static_cast<int32_t>(Status::kNotFinite), 1, 1, 0};
  expect(std::memcmp(step.status, want, sizeof want) == 0, "what is not finite is reported");
}

void nothing_to_do() {
  Step step;
  step.args.pixels = 0;
  step.set_layouts(contiguous(kChannels, 0));
  p_sample_step(step.args, backwards);
  expect(step.out[0] == kUntouched, "no pixel is written");
  p_sample_step(StepArgs{});
  q_sample(QSampleArgs{});
  randn(RandnArgs{});
}

}  // namespace

int main() {
  bad_steps();
  bad_noise();
  same_bits();
  not_finite();
  nothing_to_do();
  std::printf("%s, noise %d, %s: all as it should be\n", DDPM_FAST_VERSION, kNoiseVersion,
              cpu_level());
}
