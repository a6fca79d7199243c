// Draws images by DDPM in plain C++, with neither Python nor torch.
//   gaussian [OUT.f32 [COEFFICIENTS.f32 INDEX.i32]]
//
// Every pixel of the data is normal, with mean 0.3 and standard deviation 0.2: the best prediction
// of the noise is then a formula, and the result can be checked. Put your network (ONNX Runtime,
// LibTorch, your own) in the place of `predict_eps`, and its schedule in the place of `Schedule`.
// OUT.f32 takes the samples, and then the same noised again, as raw floats.
//
// The table of DDPM's steps is made here. That of any other method is written once, by Python:
//   plan = make_plan(NoiseSchedule.linear(1000), "ddim", steps=50)  # from plan and schedule
//   plan.coefficients.numpy().tofile("coefficients.f32")
//   plan.index.numpy().tofile("index.i32")
#include <ddpm_fast/ddpm_fast.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kSamples = 16, kChannels = 3, kPixels = 32 * 32;
constexpr int64_t kValues = kSamples * kChannels * kPixels;
constexpr double kMean = 0.3, kDeviation = 0.2;

// Ho et al. 2020's linear schedule of 1000 timesteps.
struct Schedule {
  std::vector<double> betas, alphas_cumprod;

  Schedule() {
    const double first = 1e-4, last = 0.02;
    double alpha_cumprod = 1.0;
    for (int t = 0; t < 1000; ++t) {
      betas.push_back(t < 999 ? first + t * ((last - first) / 999) : last);
      alpha_cumprod *= 1.0 - betas.back();
      alphas_cumprod.push_back(alpha_cumprod);
    }
  }
};

struct Table {
  std::vector<ddpm_fast::Coefficients> coefficients;
  std::vector<ddpm_fast::RowIndex> index;
};

// Ho et al. 2020, equations 4 and 7 with the smaller variance: in double, rounded once. The
// noisiest step comes first, and the last one draws no noise.
Table ddpm_table(const Schedule& schedule) {
  Table table;
  for (int t = 999; t >= 0; --t) {
    const double beta = schedule.betas[t], ac = schedule.alphas_cumprod[t];
    const double ac_prev = t > 0 ? schedule.alphas_cumprod[t - 1] : 1.0;
    ddpm_fast::Coefficients c{};
    c.a = static_cast<float>(std::sqrt(1.0 / ac));
    c.b = static_cast<float>(-std::sqrt(1.0 / ac - 1.0));
    c.c0 = static_cast<float>(beta * std::sqrt(ac_prev) / (1.0 - ac));
    c.c1 = static_cast<float>((1.0 - ac_prev) * std::sqrt(1.0 - beta) / (1.0 - ac));
    c.sigma = static_cast<float>(std::sqrt(beta * (1.0 - ac_prev) / (1.0 - ac)));
    c.clip_lo = -1.0f;
    c.clip_hi = 1.0f;
    table.coefficients.push_back(c);
    table.index.push_back({t, 1000 - t, 0, 0});
  }
  return table;
}

template <class T>
std::vector<T> read_rows(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file || bytes.empty() || bytes.size() % sizeof(T) != 0) {
    throw std::runtime_error(path + " holds no table of rows of " + std::to_string(sizeof(T)) +
                             " bytes.");
  }
  std::vector<T> rows(bytes.size() / sizeof(T));
  std::memcpy(rows.data(), bytes.data(), bytes.size());
  return rows;
}

// The network: eps of (samples, channels, pixels) at one timestep.
void predict_eps(double alpha_cumprod, const std::vector<float>& x_t, std::vector<float>* eps) {
  const double variance = alpha_cumprod * kDeviation * kDeviation + 1.0 - alpha_cumprod;
  const auto center = static_cast<float>(std::sqrt(alpha_cumprod) * kMean);
  const auto gain = static_cast<float>(std::sqrt(1.0 - alpha_cumprod) / variance);
  for (size_t i = 0; i < x_t.size(); ++i) (*eps)[i] = gain * (x_t[i] - center);
}

// Shares the work out to two threads; an engine passes what hands it to its own.
void two_threads(int64_t count, const ddpm_fast::RangeBody& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

// Which samples: the same pair of seed and index is the same sample, in any batch.
const std::vector<int64_t> kSeed(kSamples, 7);
const std::vector<int64_t> kSampleIndex = [] {
  std::vector<int64_t> index(kSamples);
  std::iota(index.begin(), index.end(), 0);
  return index;
}();

std::vector<float> draw_samples(const Schedule& schedule, const Table& table) {
  std::vector<float> x(kValues), eps(kValues), previous;
  for (const auto& c : table.coefficients) {  // DPM-Solver++ looks back; DDPM and DDIM do not
    if (c.c2 != 0.0f) previous.resize(kValues);
  }
  std::vector<int64_t> row(kSamples);
  int32_t status[4] = {};
  ddpm_fast::randn({.out = x.data(),
                    .seed = kSeed.data(),
                    .sample_index = kSampleIndex.data(),
                    .samples = kSamples,
                    .elements = kChannels * kPixels},
                   two_threads);
  const ddpm_fast::StepArgs step{.samples = kSamples,
                                 .channels = kChannels,
                                 .pixels = kPixels,
                                 .table_rows = static_cast<int64_t>(table.coefficients.size()),
                                 .out = x.data(),
                                 .x_t = x.data(),
                                 .model_output = eps.data(),
                                 .previous = previous.empty() ? nullptr : previous.data(),
                                 .coefficients = table.coefficients.data(),
                                 .index = table.index.data(),
                                 .row = row.data(),
                                 .seed = kSeed.data(),
                                 .sample_index = kSampleIndex.data(),
                                 .status = status};
  for (int64_t i = 0; i < step.table_rows; ++i) {
    predict_eps(schedule.alphas_cumprod.at(table.index[i].timestep), x, &eps);
    row.assign(kSamples, i);
    ddpm_fast::p_sample_step(step, two_threads);
  }
  if (status[0] != 0) {
    throw std::runtime_error("step " + std::to_string(status[1]) + " made sample " +
                             std::to_string(status[2]) + " infinite or NaN.");
  }
  return x;
}

// The forward process to the last timestep.
std::vector<float> add_noise(const Schedule& schedule, const std::vector<float>& x_start) {
  std::vector<float> coefficients, x_t(kValues), noise(kValues);
  for (double alpha_cumprod : schedule.alphas_cumprod) {
    coefficients.push_back(static_cast<float>(std::sqrt(alpha_cumprod)));
    coefficients.push_back(static_cast<float>(std::sqrt(1.0 - alpha_cumprod)));
  }
  const std::vector<int64_t> timesteps(kSamples, 999);
  ddpm_fast::q_sample({.samples = kSamples,
                       .channels = kChannels,
                       .pixels = kPixels,
                       .table_rows = 1000,
                       .x_t = x_t.data(),
                       .noise_out = noise.data(),
                       .x_start = x_start.data(),
                       .coefficients = coefficients.data(),
                       .timesteps = timesteps.data(),
                       .seed = kSeed.data(),
                       .sample_index = kSampleIndex.data()},
                      two_threads);
  return x_t;
}

void print_moments(const char* name, const std::vector<float>& x, double mean, double deviation) {
  double sum = 0.0, squares = 0.0;
  for (double value : x) sum += value;
  const double found = sum / static_cast<double>(x.size());
  for (double value : x) squares += (value - found) * (value - found);
  std::printf("%s: mean %.3f, standard deviation %.3f (wanted: %.3f, %.3f)\n", name, found,
              std::sqrt(squares / static_cast<double>(x.size())), mean, deviation);
}

void run(const std::vector<std::string>& arguments) {
  const Schedule schedule;
  Table table;
  if (arguments.size() == 3) {
    table = {read_rows<ddpm_fast::Coefficients>(arguments[1]),
             read_rows<ddpm_fast::RowIndex>(arguments[2])};
    if (table.coefficients.size() != table.index.size()) {
      throw std::runtime_error("The coefficients and the index have not as many rows.");
    }
  } else {
    table = ddpm_table(schedule);
  }
  std::printf("ddpm_fast %s on %s, %zu steps\n", DDPM_FAST_VERSION, ddpm_fast::cpu_level(),
              table.index.size());
  const std::vector<float> samples = draw_samples(schedule, table);
  const std::vector<float> noised = add_noise(schedule, samples);
  print_moments("samples", samples, kMean, kDeviation);
  print_moments("noised again", noised, 0.0, 1.0);
  if (arguments.empty()) return;
  std::ofstream file(arguments[0], std::ios::binary);
  for (const auto* values : {&samples, &noised}) {
    file.write(reinterpret_cast<const char*>(values->data()), kValues * sizeof(float));
  }
  if (!file.flush()) throw std::runtime_error(arguments[0] + " could not be written.");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
