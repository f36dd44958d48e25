// sampler.h - choosing a token from logits. No allocation per call, reproducible draws.
//
// Logits are changed and cut with the float32 arithmetic of transformers' LogitsProcessors, so that the same tokens are
// kept at a boundary; docs/sampling.md gives the definitions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lococo.h"

namespace lococo {

// Uniform in [0, 1), a function of seed and position alone.
double uniform_at(uint64_t seed, uint64_t position);

// What the penalties see, (vocab_size): 0 for a token that was never read, else 1 + how often it was read since
// generation began. Part of a session's state.
class TokenCounts {
 public:
  explicit TokenCounts(int32_t vocab_size) : counts_(static_cast<size_t>(vocab_size)) {}

  void clear();
  // ids: (n), read together at `position`: a prompt, or one generated token.
  void read(const int32_t* ids, size_t n, int64_t position);

  [[nodiscard]] const int32_t* data() const { return counts_.data(); }
  [[nodiscard]] int32_t* data() { return counts_.data(); }
  [[nodiscard]] uint64_t nbytes() const { return counts_.size() * sizeof(int32_t); }
  static uint64_t nbytes(int32_t vocab_size) { return static_cast<uint64_t>(vocab_size) * sizeof(int32_t); }

 private:
  std::vector<int32_t> counts_;
};

class Sampler {
 public:
  explicit Sampler(int32_t vocab_size);

  // INVALID_ARGUMENT, naming the field.
  void check(const lococo_sampling_params& params) const;

  // Nothing but the largest logit decides.
  static bool is_plain_greedy(const lococo_sampling_params& params);

  // logits: (vocab_size). BACKEND if a logit is NaN or +inf, or all are -inf; INVALID_ARGUMENT if the parameters leave
  // no token.
  int32_t sample(const float* logits, const TokenCounts& counts, const lococo_sampling_params& params,
                 uint64_t position);
  // probabilities: (vocab_size), what sample draws from.
  void distribution(const float* logits, const TokenCounts& counts, const lococo_sampling_params& params,
                    float* probabilities);
  // log softmax(logits) of id and of the n likeliest. top_ids, top_logprobs: (n).
  void logprobs(const float* logits, int32_t id, int32_t n, float* logprob, int32_t* top_ids, float* top_logprobs);

  static uint64_t nbytes(int32_t vocab_size) {
    const uint64_t a_token = sizeof(int32_t) + 2 * sizeof(float) + sizeof(uint64_t);
    return static_cast<uint64_t>(vocab_size) * a_token + kBuckets * sizeof(double);
  }

 private:
  static constexpr int kBucketBits = 12;  // sign, exponent and three bits of the fraction
  static constexpr size_t kBuckets = size_t{1} << kBucketBits;

  // Scores of all tokens, bias, penalties and mask applied: ids_, scores_. Returns the likeliest.
  int32_t process(const float* logits, const TokenCounts& counts, const lococo_sampling_params& params);
  // Then the candidates that are left, in order of id: ids_, scores_, weights_ [0..size_).
  void warp(const lococo_sampling_params& params, int32_t best);
  void keep_top_k(size_t k);
  void keep_top_p(double top_p);
  void keep_min_p(double min_p);
  void keep_typical(double typical_p, float highest);
  [[nodiscard]] double total() const;  // of weights_
  [[nodiscard]] float probability(size_t i, float total) const { return weights_[i] / total; }
  template <typename W, typename F>
  uint64_t find_cut(size_t n, W&& weight, F&& is_over);
  template <typename F>
  void keep_if(F&& kept);

  int32_t vocab_size_;
  size_t size_ = 0;              // candidates
  std::vector<int32_t> ids_;     // (vocab_size)
  std::vector<float> scores_;    // (vocab_size)
  std::vector<float> weights_;   // (vocab_size): exp(score - highest)
  std::vector<uint64_t> order_;  // (vocab_size): sort keys, candidates by value and then by index
  std::vector<double> buckets_;  // (kBuckets)
};

}  // namespace lococo
