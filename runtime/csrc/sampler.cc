#include "sampler.h"

#include <algorithm>
#include <cmath>
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

// The likeliest token, the lowest id on a tie; refuses what cannot come out of a sound model.
int32_t arg_max(const float* logits, int32_t vocab_size) {
  int32_t best = 0;
  for (int32_t id = 0; id < vocab_size; ++id) {
    if (std::isnan(logits[id]) || logits[id] == INFINITY) {
      fail(LOCOCO_ERROR_BACKEND,
           "logits: expected finite numbers, got %s for token id %d; the weights are damaged or overflow this dtype, "
           "export with a wider one",
           std::isnan(logits[id]) ? "NaN" : "infinity", id);
    }
    if (logits[id] > logits[best]) best = id;
  }
  if (logits[best] == -INFINITY) {
    fail(LOCOCO_ERROR_BACKEND,
         "logits: expected finite numbers, got -infinity for all %d tokens; the weights are damaged", vocab_size);
  }
  return best;
}

}  // namespace

double uniform_at(uint64_t seed, uint64_t position) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t bits = mix(mix(seed + kGolden) + (position + 1) * kGolden);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

Sampler::Sampler(int32_t vocab_size)
    : weights_(static_cast<size_t>(vocab_size)), ids_(static_cast<size_t>(vocab_size)) {}

void Sampler::check(const lococo_sampling_params& p) {
  if (p.struct_size != sizeof(lococo_sampling_params)) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "sampling params: struct_size: expected %zu, got %zu; set it to sizeof(lococo_sampling_params)",
         sizeof(lococo_sampling_params), p.struct_size);
  }
  if (!std::isfinite(p.temperature) || p.temperature < 0) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "temperature: expected a finite number of at least 0, got %g",
         static_cast<double>(p.temperature));
  }
  if (p.top_k < 0) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "top_k: expected at least 0 (0 keeps all), got %d", p.top_k);
  if (!(p.top_p >= 0 && p.top_p <= 1)) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "top_p: expected a number from 0 to 1 (0 and 1 keep all), got %g",
         static_cast<double>(p.top_p));
  }
}

int32_t Sampler::sample(const float* logits, const lococo_sampling_params& params, uint64_t position) {
  const auto vocab_size = static_cast<int32_t>(weights_.size());
  const int32_t best = arg_max(logits, vocab_size);
  if (params.temperature == 0 || params.top_k == 1) return best;

  // Candidates are ids_[0..end). Both selections order them likelier first, then lower id.
  const auto before = [logits](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  const auto first = ids_.begin();
  auto end = ids_.end();
  std::iota(first, end, 0);
  const bool is_top_k = params.top_k > 0 && params.top_k < vocab_size;
  const bool is_top_p = params.top_p > 0 && params.top_p < 1;
  if (is_top_k) {
    end = first + params.top_k;
    std::partial_sort(first, end, ids_.end(), before);
  }

  double total = 0;
  for (auto it = first; it != end; ++it) {
    weights_[*it] = std::exp((static_cast<double>(logits[*it]) - logits[best]) / params.temperature);
    total += weights_[*it];
  }

  if (is_top_p) {
    const double target = params.top_p * total;
    // Tokens below this weight have less than 1 - top_p together, so none of them is needed to reach top_p.
    const double floor = (total - target) / static_cast<double>(end - first);
    end = std::remove_if(first, end, [&](int32_t id) { return weights_[id] < floor; });
    // Halve the candidates towards the token that makes the sum reach the target: it is the last one kept.
    double reached = 0;
    auto begin = first;
    while (end - begin > 1) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, before);
      double mass = 0;
      for (auto it = begin; it != middle; ++it) mass += weights_[*it];
      if (reached + mass >= target) {
        end = middle;
      } else {
        reached += mass;
        begin = middle;
      }
    }
  }

  // The draw walks the kept tokens in order of id, so that it does not depend on how they were selected.
  if (is_top_k || is_top_p) {
    std::sort(first, end);
    total = 0;
    for (auto it = first; it != end; ++it) total += weights_[*it];
  }
  double left = uniform_at(params.seed, position) * total;
  int32_t chosen = best;
  for (auto it = first; it != end; ++it) {
    if (weights_[*it] == 0) continue;
    chosen = *it;  // the last one stands where rounding leaves a remainder
    left -= weights_[*it];
    if (left < 0) break;
  }
  return chosen;
}

}  // namespace lococo
