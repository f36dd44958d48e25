#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "check.h"
#include "sampler.h"

using lococo::Sampler;
using lococo::TokenCounts;
using lococo::uniform_at;

namespace {

lococo_sampling_params params(float temperature, int top_k = 0, float top_p = 0, uint64_t seed = 0) {
  lococo_sampling_params p = {};
  p.struct_size = sizeof p;
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.seed = seed;
  return p;
}

int draw(const std::vector<float>& logits, const lococo_sampling_params& p, uint64_t position = 0) {
  const auto vocab_size = static_cast<int32_t>(logits.size());
  return Sampler(vocab_size).sample(logits.data(), TokenCounts(vocab_size), p, position);
}

// The kept set by a full sort, and the probabilities in it: nothing shared with the sampler.
std::map<int, double> reference(const std::vector<float>& logits, const lococo_sampling_params& p) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] < logits[b]; });
  if (p.top_k > 0 && p.top_k < static_cast<int>(order.size())) {
    const float last = logits[order[order.size() - static_cast<size_t>(p.top_k)]];
    order.erase(order.begin(), std::find_if(order.begin(), order.end(), [&](int id) { return logits[id] >= last; }));
  }
  std::map<int, double> weights;
  double total = 0;
  for (const int id : order) {
    weights[id] =
        std::exp((static_cast<double>(logits[id]) - logits[order.back()]) / static_cast<float>(p.temperature));
    total += weights[id];
  }
  if (p.top_p > 0 && p.top_p < 1) {
    double dropped = 0;
    for (const int id : order) {
      dropped += weights[id];
      if (dropped > (1 - p.top_p) * total || id == order.back()) break;
      weights.erase(id);
    }
  }
  double kept = 0;
  for (const auto& [id, weight] : weights) kept += weight;
  for (auto& [id, weight] : weights) weight /= kept;
  return weights;
}

std::vector<float> random_logits(int vocab_size, unsigned seed, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<size_t>(vocab_size));
  for (float& x : logits) x = normal(random);
  return logits;
}

void greedy() {
  CHECK_EQ(draw({1, 3, 2}, params(0)), 1);
  CHECK_EQ(draw({1, 3, 3, 3}, params(0)), 1);  // the lowest id on a tie
  CHECK_EQ(draw({-5}, params(0)), 0);
  CHECK_EQ(draw({-INFINITY, -2, -INFINITY}, params(0)), 1);
  CHECK_EQ(draw({0, 1, 2}, params(5, 1)), 2);         // top_k = 1
  CHECK_EQ(draw({0, 1, 2}, params(1e-40f)), 2);       // next to no temperature
  CHECK_EQ(draw({0, 1, 2}, params(1, 0, 1e-9f)), 2);  // at least one token stays
}

void uniform() {
  double sum = 0;
  std::set<double> values;
  for (uint64_t i = 0; i < 100'000; ++i) {
    const double u = uniform_at(42, i);
    CHECK(u >= 0 && u < 1);
    sum += u;
    values.insert(u);
  }
  CHECK(std::abs(sum / 100'000 - 0.5) < 0.005);
  CHECK(values.size() > 99'990);
  CHECK_EQ(uniform_at(1, 7), uniform_at(1, 7));
  CHECK(uniform_at(1, 7) != uniform_at(2, 7));
  CHECK(uniform_at(1, 7) != uniform_at(1, 8));
  CHECK(uniform_at(1, 0) != uniform_at(0, 1));
}

// Frequencies of many draws against the reference's probabilities.
void distribution() {
  const int draws = 20'000;
  unsigned trial = 0;
  for (const auto& p : {params(1), params(0.7f), params(2, 5), params(1, 0, 0.9f), params(1, 0, 0.5f),
                        params(1.5f, 7, 0.8f), params(1, 12), params(1, 1000), params(1, 0, 1)}) {
    const std::vector<float> logits = random_logits(12, ++trial, 1.5f);
    const auto expected = reference(logits, p);
    Sampler sampler(12);
    std::map<int, int> counts;
    const TokenCounts nothing_read(12);
    for (int i = 0; i < draws; ++i) ++counts[sampler.sample(logits.data(), nothing_read, p, static_cast<uint64_t>(i))];
    double chi2 = 0;
    for (const auto& [id, probability] : expected) {
      chi2 += std::pow(counts[id] - probability * draws, 2) / (probability * draws);
    }
    for (const auto& [id, count] : counts) CHECK(expected.count(id) == 1 || count == 0);
    CHECK(chi2 < 35);  // 11 degrees of freedom: above with probability 2.5e-4, and the seed is fixed
  }
}

// The walk over the kept set, token by token, on vocabularies of real size, ties included.
void against_reference() {
  for (unsigned trial = 0; trial < 60; ++trial) {
    const int vocab_size = trial % 3 == 0 ? 49'152 : trial % 3 == 1 ? 1000 : 7;
    std::vector<float> logits = random_logits(vocab_size, trial, trial % 2 == 0 ? 3.f : 0.5f);
    if (trial % 4 == 1) {
      for (float& x : logits) x = std::round(x);
    }
    const auto p = params(0.5f + 0.25f * static_cast<float>(trial % 5), trial % 5 == 0 ? 40 : 0,
                          trial % 7 == 0 ? 0.f : 0.13f * static_cast<float>(trial % 8), trial);
    const auto kept = reference(logits, p);
    Sampler sampler(vocab_size);
    const TokenCounts nothing_read(vocab_size);
    for (uint64_t position = 0; position < 20; ++position) {
      double left = uniform_at(p.seed, position);
      int expected = kept.rbegin()->first;
      for (const auto& [id, probability] : kept) {
        left -= probability;
        if (left < 0) {
          expected = id;
          break;
        }
      }
      CHECK_EQ(sampler.sample(logits.data(), nothing_read, p, position), expected);
    }
  }
}

void refusals() {
  Sampler sampler(3);
  const TokenCounts none(3);
  const float nan[] = {0, NAN, 1};
  const float infinite[] = {0, 1, INFINITY};
  const float nothing[] = {-INFINITY, -INFINITY, -INFINITY};
  for (const auto& p : {params(0), params(1)}) {
    CHECK_ERROR(LOCOCO_ERROR_BACKEND, ("NaN", "token id 1"), sampler.sample(nan, none, p, 0));
    CHECK_ERROR(LOCOCO_ERROR_BACKEND, ("infinity", "token id 2"), sampler.sample(infinite, none, p, 0));
    CHECK_ERROR(LOCOCO_ERROR_BACKEND, ("-infinity", "all 3"), sampler.sample(nothing, none, p, 0));
  }
  sampler.check(params(0.8f, 40, 0.95f, 7));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("temperature", "-1"), sampler.check(params(-1)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("temperature"), sampler.check(params(NAN)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("temperature"), sampler.check(params(INFINITY)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("top_k", "-2"), sampler.check(params(1, -2)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("top_p", "1.5"), sampler.check(params(1, 0, 1.5f)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("top_p"), sampler.check(params(1, 0, -0.1f)));
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("top_p"), sampler.check(params(1, 0, NAN)));
  auto unset = params(1);
  unset.struct_size = 0;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("struct_size"), sampler.check(unset));
}

void print_times() {
  const std::vector<float> logits = random_logits(128'256, 1, 3.f);
  Sampler sampler(128'256);
  const TokenCounts none(128'256);
  for (const auto& [name, p] : {std::pair("greedy", params(0)),
                                {"temperature", params(1)},
                                {"top_k 40", params(1, 40)},
                                {"top_p 0.9", params(1, 0, 0.9f)},
                                {"top_k 40, top_p 0.9", params(1, 40, 0.9f)}}) {
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t i = 0; i < 10; ++i) CHECK(sampler.sample(logits.data(), none, p, i) >= 0);
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%s: %.2f ms a draw of 128256\n", name, elapsed.count() / 10);
  }
}

}  // namespace

int main() {
  greedy();
  uniform();
  distribution();
  against_reference();
  refusals();
  print_times();
  return finish();
}
