#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "error.h"

namespace lococo {
namespace {

// Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection whose output bits are all mixed.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The highest of x[0..n), in lanes that do not wait for each other; +infinity if one of them is NaN.
float highest_of(const float* x, size_t n) {
  constexpr size_t kLanes = 8;
  float highest[kLanes];
  uint32_t wrong[kLanes] = {};
  std::fill(highest, highest + kLanes, -INFINITY);
  const auto look = [&](size_t i, size_t lane) {
    highest[lane] = x[i] > highest[lane] ? x[i] : highest[lane];
    wrong[lane] |= static_cast<uint32_t>(!(x[i] < INFINITY));
  };
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) look(i + lane, lane);
  }
  for (; i < n; ++i) look(i, 0);
  if (std::any_of(wrong, wrong + kLanes, [](uint32_t w) { return w != 0; })) return INFINITY;
  return *std::max_element(highest, highest + kLanes);
}

// The highest logit; refuses what cannot come out of a sound model.
float check_logits(const float* logits, size_t n) {
  const float highest = highest_of(logits, n);
  if (highest == INFINITY) {
    const float* wrong = std::find_if(logits, logits + n, [](float x) { return !(x < INFINITY); });
    fail(LOCOCO_ERROR_BACKEND,
         "logits: expected finite numbers, got %s for token id %d; the weights are damaged or overflow this dtype, "
         "export with a wider one",
         std::isnan(*wrong) ? "NaN" : "infinity", static_cast<int32_t>(wrong - logits));
  }
  if (highest == -INFINITY) {
    fail(LOCOCO_ERROR_BACKEND,
         "logits: expected finite numbers, got -infinity for all %zu tokens; the weights are damaged", n);
  }
  return highest;
}

// Sorts by value, then by index.
uint64_t sort_key(float value, size_t index) {
  uint32_t bits = 0;
  value += 0.0f;  // -0 becomes 0
  std::memcpy(&bits, &value, sizeof bits);
  bits ^= (bits >> 31) != 0 ? 0xffffffffu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(index);
}

size_t index_of(uint64_t key) { return static_cast<uint32_t>(key); }
uint32_t value_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }  // keeps the order of values

void check_number(const char* name, double value, bool ok, const char* expected) {
  if (!std::isfinite(static_cast<float>(value)) || !ok) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "%s: expected %s, got %g", name, expected, value);
  }
}

void check_ids(const char* name, const int32_t* ids, size_t n, int32_t vocab_size) {
  if (n > 0 && ids == nullptr) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "%s: expected %zu of them, got NULL", name, n);
  for (size_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "%s[%zu]: expected a token id from 0 to %d, got %d", name, i, vocab_size - 1,
           ids[i]);
    }
  }
}

bool is_on(double penalty) { return penalty != 0 && penalty != 1; }
bool is_cut(double p) { return p > 0 && p < 1; }

}  // namespace

double uniform_at(uint64_t seed, uint64_t position) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t bits = mix(mix(seed + kGolden) + (position + 1) * kGolden);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

void TokenCounts::clear() { std::fill(counts_.begin(), counts_.end(), 0); }

void TokenCounts::read(const int32_t* ids, size_t n, int64_t position) {
  const bool is_prompt = n > 1 || position == 0;
  if (is_prompt) {
    for (int32_t& count : counts_) count = std::min(count, 1);
  }
  for (size_t i = 0; i < n; ++i) {
    int32_t& count = counts_[static_cast<size_t>(ids[i])];
    if (count == 0) count = 1;
    if (!is_prompt && count < std::numeric_limits<int32_t>::max()) ++count;
  }
}

Sampler::Sampler(int32_t vocab_size)
    : vocab_size_(vocab_size),
      ids_(static_cast<size_t>(vocab_size)),
      scores_(static_cast<size_t>(vocab_size)),
      weights_(static_cast<size_t>(vocab_size)),
      order_(static_cast<size_t>(vocab_size)),
      buckets_(kBuckets) {}

void Sampler::check(const lococo_sampling_params& p) const {
  if (p.struct_size != sizeof(lococo_sampling_params)) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "sampling params: struct_size: expected %zu, got %zu; set it to sizeof(lococo_sampling_params)",
         sizeof(lococo_sampling_params), p.struct_size);
  }
  check_number("temperature", p.temperature, p.temperature >= 0, "a finite number of at least 0 (0 is greedy)");
  if (p.top_k < 0) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "top_k: expected at least 0 (0 keeps all), got %d", p.top_k);
  const auto check_share = [](const char* name, double p) {
    check_number(name, p, p >= 0 && p <= 1, "a number from 0 to 1 (0 and 1 keep all)");
  };
  check_share("top_p", p.top_p);
  check_number("min_p", p.min_p, p.min_p >= 0 && p.min_p <= 1, "a number from 0 to 1 (0 keeps all)");
  check_share("typical_p", p.typical_p);
  check_number("repetition_penalty", p.repetition_penalty, p.repetition_penalty >= 0,
               "a finite number above 0 (0 and 1 change nothing)");
  check_number("presence_penalty", p.presence_penalty, true, "a finite number");
  check_number("frequency_penalty", p.frequency_penalty, true, "a finite number");
  check_ids("logit_bias_ids", p.logit_bias_ids, p.num_logit_bias, vocab_size_);
  if (p.num_logit_bias > 0 && p.logit_bias_values == nullptr) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "logit_bias_values: expected %zu of them, got NULL", p.num_logit_bias);
  }
  for (size_t i = 0; i < p.num_logit_bias; ++i) {
    if (!std::isfinite(p.logit_bias_values[i])) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "logit_bias_values[%zu]: expected a finite number, got %g for token id %d", i,
           static_cast<double>(p.logit_bias_values[i]), p.logit_bias_ids[i]);
    }
  }
  const size_t words = p.allowed_tokens != nullptr ? (static_cast<size_t>(vocab_size_) + 31) / 32 : 0;
  if (p.num_allowed_words != words) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "num_allowed_words: expected %zu%s, got %zu", words,
         words > 0 ? ", one bit for each token of the vocabulary" : " without allowed_tokens", p.num_allowed_words);
  }
  check_ids("stop_token_ids", p.stop_token_ids, p.num_stop_token_ids, vocab_size_);
}

bool Sampler::is_plain_greedy(const lococo_sampling_params& p) {
  return p.temperature == 0 && !is_on(p.repetition_penalty) && p.presence_penalty == 0 && p.frequency_penalty == 0 &&
         p.num_logit_bias == 0 && p.allowed_tokens == nullptr;
}

int32_t Sampler::process(const float* logits, const TokenCounts& token_counts, const lococo_sampling_params& p) {
  const auto n = static_cast<size_t>(vocab_size_);
  check_logits(logits, n);
  const int32_t* counts = token_counts.data();
  float* scores = scores_.data();
  std::copy(logits, logits + n, scores);
  for (size_t i = 0; i < p.num_logit_bias; ++i) scores[p.logit_bias_ids[i]] += p.logit_bias_values[i];
  if (is_on(p.repetition_penalty)) {
    const auto penalty = static_cast<float>(p.repetition_penalty);
    for (size_t i = 0; i < n; ++i) {
      if (counts[i] > 0) scores[i] = scores[i] < 0 ? scores[i] * penalty : scores[i] / penalty;
    }
  }
  if (p.frequency_penalty != 0 || p.presence_penalty != 0) {
    const auto frequency = static_cast<float>(p.frequency_penalty);
    const auto presence = static_cast<float>(p.presence_penalty);
    for (size_t i = 0; i < n; ++i) {
      if (counts[i] > 1) {
        scores[i] -= frequency * static_cast<float>(counts[i] - 1);
        scores[i] -= presence;
      }
    }
  }
  if (p.allowed_tokens != nullptr) {
    for (size_t i = 0; i < n; ++i) {
      if ((p.allowed_tokens[i / 32] >> (i % 32) & 1) == 0) scores[i] = -INFINITY;
    }
  }
  const float highest = highest_of(scores, n);
  if (highest == -INFINITY) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "%s: expected to leave at least one token, left none",
         p.allowed_tokens != nullptr ? "allowed_tokens" : "logit_bias and penalties");
  }
  if (highest == INFINITY) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "logit_bias and penalties: expected them to leave logits in the range of float32, got infinity");
  }
  return static_cast<int32_t>(std::find(scores, scores + n, highest) - scores);
}

template <typename F>
void Sampler::keep_if(F&& kept) {
  size_t end = 0;
  for (size_t i = 0; i < size_; ++i) {
    if (!kept(i)) continue;
    ids_[end] = ids_[i];
    scores_[end] = scores_[i];
    weights_[end] = weights_[i];
    ++end;
  }
  size_ = end;
}

double Sampler::total() const {
  return std::accumulate(weights_.begin(), weights_.begin() + static_cast<ptrdiff_t>(size_), 0.0);
}

// Walks candidates in the order of order_[0..n), adding up their weights: the key of the first at which is_over(sum),
// or of the last. First by buckets, the leading bits of keys, then by halving what is left; no step sorts more than it
// must.
template <typename W, typename F>
uint64_t Sampler::find_cut(size_t n, W&& weight, F&& is_over) {
  const auto bucket_of = [](uint64_t key) { return static_cast<size_t>(key >> (64 - kBucketBits)); };
  std::fill(buckets_.begin(), buckets_.end(), 0.0);
  size_t last = 0;
  for (size_t i = 0; i < n; ++i) {
    buckets_[bucket_of(order_[i])] += weight(index_of(order_[i]));
    last = std::max(last, bucket_of(order_[i]));
  }
  double reached = 0;
  size_t bucket = 0;
  while (bucket < last && !is_over(reached + buckets_[bucket])) reached += buckets_[bucket++];

  const auto begin = order_.begin();
  const auto is_elsewhere = [&](uint64_t key) { return bucket_of(key) != bucket; };
  size_t low = 0;
  size_t high = static_cast<size_t>(std::remove_if(begin, begin + static_cast<ptrdiff_t>(n), is_elsewhere) - begin) - 1;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(begin + static_cast<ptrdiff_t>(low), begin + static_cast<ptrdiff_t>(middle),
                     begin + static_cast<ptrdiff_t>(high) + 1);
    double sum = reached;
    for (size_t i = low; i <= middle; ++i) sum += weight(index_of(order_[i]));
    if (is_over(sum)) {
      high = middle;
    } else {
      reached = sum;
      low = middle + 1;
    }
  }
  return order_[low];
}

void Sampler::keep_top_k(size_t k) {
  if (k >= size_) return;
  for (size_t i = 0; i < size_; ++i) order_[i] = sort_key(scores_[i], i);
  const auto dropped = static_cast<double>(size_ - k);
  const uint64_t cut = find_cut(size_, [](size_t) { return 1; }, [dropped](double count) { return count > dropped; });
  const float lowest = scores_[index_of(cut)];
  keep_if([&](size_t i) { return scores_[i] >= lowest; });
}

// Dropped are the least likely, lower ids first where they tie, while their probabilities add up to 1 - top_p or less.
void Sampler::keep_top_p(double top_p) {
  const auto limit = static_cast<float>(1 - top_p);
  const auto sum = static_cast<float>(total());
  for (size_t i = 0; i < size_; ++i) order_[i] = sort_key(scores_[i], i);
  const uint64_t cut = find_cut(
      size_, [&](size_t i) { return probability(i, sum); },
      [limit](double mass) { return static_cast<float>(mass) > limit; });
  keep_if([&](size_t i) { return sort_key(scores_[i], i) >= cut; });
}

void Sampler::keep_min_p(double min_p) {
  const auto sum = static_cast<float>(total());
  const float lowest = static_cast<float>(min_p) * (1 / sum);  // the likeliest weighs 1
  keep_if([&](size_t i) { return probability(i, sum) >= lowest; });
}

// Kept are those whose surprise is nearest to the entropy, while their probabilities add up to less than typical_p,
// and one more; arXiv 2202.00666, section 4.
void Sampler::keep_typical(double typical_p, float highest) {
  const double exact_sum = total();
  const auto sum = static_cast<float>(exact_sum);
  const double log_sum = std::log(exact_sum);
  const auto surprise = [&](size_t i) {
    return static_cast<float>(log_sum - static_cast<double>(scores_[i] - highest));
  };
  double entropy = 0;
  for (size_t i = 0; i < size_; ++i) {
    if (weights_[i] > 0) entropy += static_cast<double>(surprise(i)) * probability(i, sum);
  }
  const auto target = static_cast<float>(entropy);
  for (size_t i = 0; i < size_; ++i) order_[i] = sort_key(std::abs(surprise(i) - target), i);
  const float share = std::max(static_cast<float>(typical_p), FLT_MIN);  // 0 would be reached before any candidate
  const uint64_t cut = find_cut(
      size_, [&](size_t i) { return probability(i, sum); },
      [share](double mass) { return static_cast<float>(mass) >= share; });
  keep_if([&](size_t i) { return value_of(sort_key(std::abs(surprise(i) - target), i)) <= value_of(cut); });
}

void Sampler::warp(const lococo_sampling_params& p, int32_t best) {
  // A temperature below float32 is its least; where a quotient would overflow, the highest score is moved to 0 first.
  const float temperature = std::max(static_cast<float>(p.temperature), FLT_MIN);
  const float highest_score = scores_[static_cast<size_t>(best)];
  const float shift = std::isfinite(highest_score / temperature) ? 0 : highest_score;
  const float highest = (highest_score - shift) / temperature;
  size_ = 0;
  for (size_t id = 0; id < scores_.size(); ++id) {
    if (scores_[id] == -INFINITY) continue;
    ids_[size_] = static_cast<int32_t>(id);
    scores_[size_] = (scores_[id] - shift) / temperature;
    ++size_;
  }
  if (p.top_k > 0) keep_top_k(static_cast<size_t>(p.top_k));
  for (size_t i = 0; i < size_; ++i) weights_[i] = std::exp(scores_[i] - highest);
  if (is_cut(p.top_p)) keep_top_p(p.top_p);
  if (p.min_p > 0) keep_min_p(p.min_p);
  if (is_cut(p.typical_p)) keep_typical(p.typical_p, highest);
}

int32_t Sampler::sample(const float* logits, const TokenCounts& counts, const lococo_sampling_params& params,
                        uint64_t position) {
  const int32_t best = process(logits, counts, params);
  if (params.temperature == 0) return best;
  warp(params, best);
  double left = uniform_at(params.seed, position) * total();
  int32_t chosen = best;
  for (size_t i = 0; i < size_; ++i) {
    if (weights_[i] == 0) continue;
    chosen = ids_[i];  // the last one stands where rounding leaves a remainder
    left -= weights_[i];
    if (left < 0) break;
  }
  return chosen;
}

void Sampler::distribution(const float* logits, const TokenCounts& counts, const lococo_sampling_params& params,
                           float* probabilities) {
  const int32_t best = process(logits, counts, params);
  std::fill(probabilities, probabilities + vocab_size_, 0.0f);
  if (params.temperature == 0) {
    probabilities[best] = 1;
    return;
  }
  warp(params, best);
  const auto sum = static_cast<float>(total());
  for (size_t i = 0; i < size_; ++i) probabilities[ids_[i]] = probability(i, sum);
}

void Sampler::logprobs(const float* logits, int32_t id, int32_t n, float* logprob, int32_t* top_ids,
                       float* top_logprobs) {
  check_ids("id", &id, 1, vocab_size_);
  if (n < 0 || n > vocab_size_) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "n: expected 0 to %d, the size of the vocabulary, got %d", vocab_size_, n);
  }
  const auto size = static_cast<size_t>(vocab_size_);
  const float highest = check_logits(logits, size);
  double sum = 0;
  for (size_t i = 0; i < size; ++i) sum += std::exp(logits[i] - highest);
  const double log_sum = highest + std::log(sum);
  *logprob = static_cast<float>(logits[id] - log_sum);
  if (n == 0) return;
  for (size_t i = 0; i < size; ++i) order_[i] = ~sort_key(logits[i], ~static_cast<uint32_t>(i));
  std::partial_sort(order_.begin(), order_.begin() + n, order_.end());
  for (int32_t i = 0; i < n; ++i) {
    top_ids[i] = static_cast<int32_t>(index_of(order_[static_cast<size_t>(i)]));
    top_logprobs[i] = static_cast<float>(logits[top_ids[i]] - log_sum);
  }
}

}  // namespace lococo
