#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <numeric>
#include <random>
#include <set>

#include "check.h"
#include "sampler.h"
#include "stops.h"

// Counts what the process allocates. Not inlined: GCC would then see malloc and free, and warn that they do not match.
std::atomic<size_t> allocations{0};

[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
[[gnu::noinline]] void* operator new(size_t size) {
  void* memory = operator new(size, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

using lococo::Sampler;
using lococo::Stops;
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
  const auto refuses = [&](const char* field, double lococo_sampling_params::*member, std::vector<double> values) {
    for (const double value : values) {
      auto p = params(1);
      p.*member = value;
      CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, (field), sampler.check(p));
    }
  };
  refuses("temperature", &lococo_sampling_params::temperature, {-1, NAN, INFINITY, 1e39});
  refuses("top_p", &lococo_sampling_params::top_p, {-1, NAN, INFINITY, 1.1});
  refuses("min_p", &lococo_sampling_params::min_p, {-1, NAN, INFINITY, 1.1});
  refuses("typical_p", &lococo_sampling_params::typical_p, {-1, NAN, INFINITY, 1.1});
  refuses("repetition_penalty", &lococo_sampling_params::repetition_penalty, {-1, NAN, INFINITY, 1e39});
  refuses("presence_penalty", &lococo_sampling_params::presence_penalty, {NAN, INFINITY, -INFINITY, -1e39});
  refuses("frequency_penalty", &lococo_sampling_params::frequency_penalty, {NAN, INFINITY, -INFINITY, 1e39});
  const int32_t ids[] = {0, 3};
  const float values[] = {0, NAN};
  auto p = params(1);
  p.logit_bias_ids = ids;
  p.num_logit_bias = 1;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("logit_bias_values", "NULL"), sampler.check(p));
  p.logit_bias_values = values;
  sampler.check(p);
  p.logit_bias_values = values + 1;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("logit_bias_values[0]", "nan"), sampler.check(p));
  p.logit_bias_values = values;
  p.num_logit_bias = 2;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("logit_bias_ids[1]", "got 3"), sampler.check(p));
  p.logit_bias_ids = nullptr;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("logit_bias_ids", "NULL"), sampler.check(p));
  p = params(1);
  p.stop_token_ids = ids;
  p.num_stop_token_ids = 2;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("stop_token_ids[1]", "got 3"), sampler.check(p));
  p = params(1);
  p.num_allowed_words = 1;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("num_allowed_words"), sampler.check(p));
  const float fine[] = {0, 1, 2};
  const uint32_t mask[] = {8, 0};  // a bit beyond the vocabulary
  p.allowed_tokens = mask;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("allowed_tokens", "none"), sampler.sample(fine, none, p, 0));
  p.num_allowed_words = 2;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("num_allowed_words", "expected 1"), sampler.check(p));
  float logprob = 0;
  for (const int32_t id : {-1, 3}) {
    CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("id"), sampler.logprobs(fine, id, 0, &logprob, nullptr, nullptr));
  }
  for (const int32_t n : {-1, 4}) {
    CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("n:"), sampler.logprobs(fine, 0, n, &logprob, nullptr, nullptr));
  }
  auto unset = params(1);
  unset.struct_size = 0;
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("struct_size"), sampler.check(unset));
}

void counts() {
  TokenCounts counts(5);
  const auto are = [&](const std::vector<int32_t>& expected) {
    CHECK(std::equal(expected.begin(), expected.end(), counts.data()));
  };
  const int32_t ids[] = {2, 2, 4};
  counts.read(ids, 1, 0);  // the first token is a prompt
  are({0, 0, 1, 0, 0});
  counts.read(ids + 2, 1, 1);
  counts.read(ids, 1, 2);
  counts.read(ids, 1, 3);
  are({0, 0, 3, 0, 2});
  const TokenCounts copy = counts;
  counts.read(ids, 2, 4);  // a prompt: counting begins anew
  are({0, 0, 1, 0, 1});
  counts.data()[2] = INT32_MAX;
  counts.read(ids, 1, 6);
  are({0, 0, INT32_MAX, 0, 1});
  counts = copy;
  are({0, 0, 3, 0, 2});
  counts.clear();
  are({0, 0, 0, 0, 0});
}

// Bias and penalties one by one, seen through logits that a softmax gives back.
void adjusted() {
  const std::vector<float> logits = {1, -1, 2, 0.5f};
  TokenCounts counts(4);
  const int32_t prompt[] = {0, 1};
  const int32_t generated = 2;
  counts.read(prompt, 2, 0);
  counts.read(&generated, 1, 2);
  counts.read(&generated, 1, 3);
  const auto is = [&](const lococo_sampling_params& p, const std::vector<double>& expected) {
    Sampler sampler(4);
    std::vector<float> got(4);
    sampler.distribution(logits.data(), counts, p, got.data());
    double total = 0;
    for (const double x : expected) total += std::exp(x);
    for (size_t i = 0; i < 4; ++i) CHECK(std::abs(got[i] - std::exp(expected[i]) / total) < 1e-6);
  };
  auto p = params(1);
  is(p, {1, -1, 2, 0.5});
  p.repetition_penalty = 2;
  is(p, {0.5, -2, 1, 0.5});
  p = params(1);
  p.frequency_penalty = 0.25;
  is(p, {1, -1, 1.5, 0.5});
  p = params(1);
  p.presence_penalty = -0.25;
  is(p, {1, -1, 2.25, 0.5});
  p = params(2);
  const int32_t ids[] = {1, 3, 1};
  const float values[] = {2, -1, 1};
  p.logit_bias_ids = ids;
  p.logit_bias_values = values;
  p.num_logit_bias = 3;
  is(p, {0.5, 1, 1, -0.25});
  p.repetition_penalty = 4;  // after the bias
  is(p, {0.125, 0.25, 0.25, -0.25});
  const uint32_t allowed = 0b1001;
  p.allowed_tokens = &allowed;
  p.num_allowed_words = 1;
  is(p, {0.125, -INFINITY, -INFINITY, -0.25});
}

void no_allocation() {
  const int32_t vocab_size = 49'152;
  const std::vector<float> logits = random_logits(vocab_size, 1, 3.f);
  const std::vector<uint32_t> allowed(vocab_size / 32, 0x7fffffffu);
  const std::vector<int32_t> ids = {5, 6, 7};
  const std::vector<float> values = {1, -1, 2};
  auto p = params(0.8f, 5000, 0.99f, 3);
  p.min_p = 1e-6;
  p.typical_p = 0.95;
  p.repetition_penalty = 1.2;
  p.presence_penalty = 0.5;
  p.frequency_penalty = 0.1;
  p.logit_bias_ids = ids.data();
  p.logit_bias_values = values.data();
  p.num_logit_bias = ids.size();
  p.allowed_tokens = allowed.data();
  p.num_allowed_words = allowed.size();
  p.stop_token_ids = ids.data();
  p.num_stop_token_ids = ids.size();
  Sampler sampler(vocab_size);
  TokenCounts counts(vocab_size);
  std::vector<float> probabilities(logits.size());
  std::vector<int32_t> top_ids(20);
  std::vector<float> top(20);
  float logprob = 0;
  int32_t sum = 0;
  const size_t before = allocations;
  for (const auto& each : {p, params(0), params(1), params(1, 40), params(5, 0, 0.9f)}) {
    for (int32_t position = 0; position < 5; ++position) {
      sampler.check(each);
      const int32_t id = sampler.sample(logits.data(), counts, each, static_cast<uint64_t>(position));
      sampler.distribution(logits.data(), counts, each, probabilities.data());
      sampler.logprobs(logits.data(), id, 20, &logprob, top_ids.data(), top.data());
      counts.read(&id, 1, position);
      sum += id;
    }
  }
  CHECK_EQ(allocations - before, 0u);
  CHECK(sum > 0 && logprob < 0);
}

void stops() {
  const char* strings[] = {"ab", "cab", "abc", "zz"};
  Stops stops(strings, 4);
  const auto push = [&](const std::string& text) {
    const Stops::Shown shown = stops.push(text.data(), text.size());
    return std::string(shown.text, shown.size) + "|" + std::to_string(shown.matched);
  };
  CHECK_EQ(push("xyz"), "xy|-1");
  CHECK_EQ(push(""), "|-1");
  CHECK_EQ(push("yc"), "zy|-1");
  CHECK_EQ(push("a"), "|-1");
  CHECK_EQ(push("bcab"), "|1");  // "ab" ends here too, "cab" is longer; "abc" would end later
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("reset"), push("x"));
  stops.reset();
  CHECK_EQ(push("a"), "|-1");
  const Stops::Shown rest = stops.finish();
  CHECK_EQ(std::string(rest.text, rest.size), "a");
  CHECK_EQ(push("b"), "b|-1");
  Stops none(nullptr, 0);
  CHECK_EQ(none.push("abc", 3).size, 3u);
  const char* empty[] = {"a", ""};
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("stop[1]", "empty"), Stops(empty, 2));
  const std::vector<const char*> many(LOCOCO_MAX_STOPS + 1, "a");
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("64", "65"), Stops(many.data(), many.size()));
  const std::string text(LOCOCO_MAX_STOP_BYTES + 1, 'a');
  const char* huge[] = {text.c_str()};
  CHECK_ERROR(LOCOCO_ERROR_INVALID_ARGUMENT, ("stop[0]", "1025"), Stops(huge, 1));
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
  counts();
  adjusted();
  no_allocation();
  stops();
  refusals();
  print_times();
  return finish();
}
