// Stands in for liblococo_trt in test_trt: a model without weights whose likeliest token follows from everything read
// since the last fusion. Its state is one number, kept in the first bytes of the state after the logits.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "module.h"

struct lococo_module_backend {
  lococo_module_bundle bundle;
  std::vector<uint64_t> offsets;
};

struct lococo_module_executor {
  const lococo_module_backend* backend;
  std::vector<float> logits;
  uint32_t sum = 0;
  std::vector<float> saved_logits = {};  // of the start of a window
  uint32_t new_sum = 0;                  // of its end
  bool fails_late = false;               // what forward started
};

namespace {

using Executor = lococo_module_executor;

bool is(const char* what) {
  const char* value = std::getenv("FAKE_TRT");
  return value != nullptr && std::strcmp(value, what) == 0;
}

lococo_status refuse(lococo_module_error* error, lococo_status status, const char* text) {
  std::snprintf(error->text, sizeof error->text, "%s", text);
  return status;
}

uint32_t fused(uint32_t sum) { return sum ^ (sum >> 7); }

void read(Executor& e, uint32_t& sum, int32_t id) {
  sum = (sum + static_cast<uint32_t>(id) + 1) * 2654435761u;
  const auto vocab_size = static_cast<uint32_t>(e.backend->bundle.vocab_size);
  for (uint32_t i = 0; i < vocab_size; ++i) e.logits[i] = static_cast<float>((sum >> 8) * (i + 3) % 97);
}

int32_t best(const Executor& e) {
  size_t best = 0;
  for (size_t i = 1; i < e.logits.size(); ++i) best = e.logits[i] > e.logits[best] ? i : best;
  return static_cast<int32_t>(best);
}

uint64_t state_bytes(const Executor& e) {
  const lococo_module_bundle& b = e.backend->bundle;
  const auto slots = static_cast<uint64_t>(b.num_kv_heads * b.capacity) * static_cast<uint64_t>(b.num_layers);
  const bool scores = b.layout.scores_bytes > 0;
  return slots * (2 * static_cast<uint64_t>(b.head_dim * b.element_bytes) + (scores ? 4 : 0));
}

const lococo_module kModule = {
    LOCOCO_MODULE_ABI,
    "fake",
    12000,
    [](const lococo_module_host* host, const char** version, lococo_module_error* error) {
      if (is("other version")) return refuse(error, LOCOCO_ERROR_VERSION, "expected another TensorRT");
      host->log(LOCOCO_LOG_INFO, "fake module loaded");
      *version = "10.3.0";
      return LOCOCO_OK;
    },
    [](const lococo_module_bundle* bundle, lococo_module_backend** out, lococo_module_error* error) {
      if (is("no memory")) return refuse(error, LOCOCO_ERROR_OUT_OF_MEMORY, "device memory: needs more");
      *out = new lococo_module_backend{*bundle, {}};
      return LOCOCO_OK;
    },
    [](lococo_module_backend* backend) { delete backend; },
    [](const lococo_module_backend* backend) { return backend->bundle.layout.arena_bytes; },
    [](lococo_module_backend* backend, Executor** out, lococo_module_error*) {
      const auto vocab_size = static_cast<size_t>(backend->bundle.vocab_size);
      *out = new Executor{backend, std::vector<float>(vocab_size)};
      return LOCOCO_OK;
    },
    [](Executor* e) { delete e; },
    [](Executor* e, const lococo_module_forward* f, float* all_logits, lococo_module_error* error) {
      if (is("dying") || (is("dying of 1") && f->ids[0] == 1)) {
        return refuse(error, LOCOCO_ERROR_BACKEND, "CUDA: cannot run the graphs");
      }
      e->fails_late = is("dying late of 1") && f->ids[0] == 1;
      for (int32_t i = 0; i < f->n; ++i) {
        read(*e, e->sum, f->ids[i]);
        if (all_logits == nullptr) continue;
        std::memcpy(all_logits, e->logits.data(), e->logits.size() * sizeof(float));
        all_logits += e->logits.size();
      }
      if (f->fuses != 0) e->sum = fused(e->sum);
      return LOCOCO_OK;
    },
    [](Executor* e, lococo_module_error* error) {
      return e->fails_late ? refuse(error, LOCOCO_ERROR_BACKEND, "CUDA: the graphs failed") : LOCOCO_OK;
    },
    [](Executor* e, int64_t, int32_t* ids, double* idle_seconds, lococo_module_error*) {
      *idle_seconds = 0.5;
      e->saved_logits = e->logits;
      e->new_sum = e->sum;
      for (int32_t i = 0; i < e->backend->bundle.capacity - e->backend->bundle.mem_size + 1; ++i) {
        ids[i] = best(*e);
        read(*e, e->new_sum, ids[i]);
      }
      e->new_sum = fused(e->new_sum);
      return LOCOCO_OK;
    },
    [](Executor* e, int32_t keep, lococo_module_error*) {
      if (keep != 0) e->sum = e->new_sum;
      if (keep == 0) e->logits = e->saved_logits;
      return LOCOCO_OK;
    },
    [](Executor* e, const float** logits, lococo_module_error*) {
      *logits = e->logits.data();
      return LOCOCO_OK;
    },
    [](Executor* e, lococo_module_error* error) {
      if (is("dying")) return refuse(error, LOCOCO_ERROR_BACKEND, "CUDA: cannot clear the session");
      e->sum = 0;
      e->logits.assign(e->logits.size(), 0.0f);
      return LOCOCO_OK;
    },
    [](Executor* e, uint8_t* bytes, lococo_module_error*) {
      std::memcpy(bytes, e->logits.data(), e->logits.size() * sizeof(float));
      bytes += e->logits.size() * sizeof(float);
      std::memset(bytes, 0, state_bytes(*e));
      std::memcpy(bytes, &e->sum, sizeof e->sum);  // a column of one head, which is live whenever anything is
      return LOCOCO_OK;
    },
    [](Executor* e, const uint8_t* bytes, lococo_module_error* error) {
      std::memcpy(e->logits.data(), bytes, e->logits.size() * sizeof(float));
      if (is("dying")) return refuse(error, LOCOCO_ERROR_BACKEND, "CUDA: cannot send the state");
      std::memcpy(&e->sum, bytes + e->logits.size() * sizeof(float), sizeof e->sum);
      return LOCOCO_OK;
    },
    [](Executor* to, Executor* from, lococo_module_error*) {
      to->logits = from->logits;
      to->sum = from->sum;
      return LOCOCO_OK;
    },
};

}  // namespace

extern "C" LOCOCO_API const lococo_module* lococo_backend_module(uint32_t abi) {
  return abi == LOCOCO_MODULE_ABI && !is("other ABI") ? &kModule : nullptr;
}
