// sampler.h - choosing a token from logits. No allocation per call, double precision, reproducible draws.
#pragma once

#include <cstdint>
#include <vector>

#include "lococo.h"

namespace lococo {

// Uniform in [0, 1), a function of seed and position alone.
double uniform_at(uint64_t seed, uint64_t position);

class Sampler {
 public:
  explicit Sampler(int32_t vocab_size);

  // INVALID_ARGUMENT, naming the field.
  static void check(const lococo_sampling_params& params);

  // logits: (vocab_size). Temperature, then top-k, then top-p. BACKEND if a logit is NaN or +inf, or all are -inf.
  int32_t sample(const float* logits, const lococo_sampling_params& params, uint64_t position);

  static uint64_t nbytes(int32_t vocab_size) {
    return static_cast<uint64_t>(vocab_size) * (sizeof(double) + sizeof(int32_t));
  }

 private:
  std::vector<double> weights_;  // (vocab_size): exp((logit - highest) / temperature)
  std::vector<int32_t> ids_;     // (vocab_size): scratch of the selections
};

}  // namespace lococo
