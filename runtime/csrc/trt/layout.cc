#include "trt/layout.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace lococo::trt {
namespace {

constexpr uint64_t kAlignment = 256;  // that TensorRT asks of addresses
constexpr uint64_t kChooserBytes = 32;

uint64_t aligned(uint64_t nbytes) { return (nbytes + kAlignment - 1) / kAlignment * kAlignment; }

uint64_t take(uint64_t& end, uint64_t nbytes) {
  const uint64_t offset = end;
  end += aligned(nbytes);
  return offset;
}

// The widest tensor of this name.
uint64_t widest(const Manifest& m, const char* name) {
  uint64_t nbytes = 0;
  for (const GraphSpec& g : m.graphs) {
    for (const auto* list : {&g.inputs, &g.outputs}) {
      for (const TensorSpec& t : *list) {
        if (t.name == name) nbytes = std::max(nbytes, t.nbytes());
      }
    }
  }
  return nbytes;
}

}  // namespace

lococo_module_layout make_layout(const Manifest& m) {
  const auto layers = static_cast<uint64_t>(m.num_layers);
  lococo_module_layout l{};
  uint64_t end = 0;
  l.inputs = end;
  l.position = take(end, sizeof(int32_t));
  l.past_length = take(end, sizeof(int32_t));
  l.num_tokens = take(end, sizeof(int32_t));
  l.input_ids = take(end, static_cast<uint64_t>(m.block_size) * sizeof(int32_t));
  l.chooser = take(end, kChooserBytes);
  l.inputs_bytes = end - l.inputs;
  l.ring = take(end, static_cast<uint64_t>(window_tokens(m)) * sizeof(int32_t));

  l.logits_bytes = static_cast<uint64_t>(m.vocab_size) * sizeof(float);
  l.kv_stride = aligned(widest(m, "past_key_values.0.key"));
  l.past_stride = aligned(widest(m, "past_scores.0"));  // 0 where scores do not accumulate
  l.scores_bytes = layers * l.past_stride;
  l.cache_bytes = 2 * layers * l.kv_stride + l.scores_bytes;
  l.state = l.logits = take(end, l.logits_bytes);
  l.cache = take(end, l.cache_bytes);
  l.past_scores = l.cache + 2 * layers * l.kv_stride;
  l.state_bytes = end - l.state;
  l.fused = take(end, l.cache_bytes);
  l.saved_logits = take(end, l.logits_bytes);
  l.saved_scores = take(end, l.scores_bytes);

  l.new_kv_stride = aligned(widest(m, "new_key_values.0.key"));
  l.new_kv = take(end, 2 * layers * l.new_kv_stride);
  l.scores_stride = aligned(widest(m, "scores.0"));
  l.scores = take(end, layers * l.scores_stride);
  l.hidden = take(end, widest(m, "hidden_states"));
  l.arena_bytes = end;
  return l;
}

uint64_t offset_of(const lococo_module_layout& l, GraphKind kind, const TensorSpec& tensor) {
  const std::string& name = tensor.name;
  if (name == "input_ids") return l.input_ids;
  if (name == "position_ids") return l.position;
  if (name == "past_length") return l.past_length;
  if (name == "num_tokens") return l.num_tokens;
  if (name == "hidden_states") return l.hidden;
  if (name == "logits") return kind == GraphKind::kLmHead ? LOCOCO_MODULE_NO_OFFSET : l.logits;
  const size_t dot = name.find('.');
  unsigned layer = 0;
  if (dot == std::string::npos || std::sscanf(name.c_str() + dot, ".%u", &layer) != 1) {
    fail(LOCOCO_ERROR_INTERNAL, "%s: no place for it", name.c_str());
  }
  const std::string prefix = name.substr(0, dot);
  const uint64_t part = 2ull * layer + (name.find(".value", dot) != std::string::npos ? 1 : 0);  // K0, V0, K1, ...
  const uint64_t past_scores = l.past_scores - l.cache;
  if (prefix == "past_key_values") return l.cache + part * l.kv_stride;
  if (prefix == "past_scores") return l.cache + past_scores + layer * l.past_stride;
  if (prefix == "present") return l.fused + part * l.kv_stride;
  if (prefix == "present_scores") return l.fused + past_scores + layer * l.past_stride;
  if (prefix == "new_key_values") return l.new_kv + part * l.new_kv_stride;
  if (prefix == "scores") return l.scores + layer * l.scores_stride;
  fail(LOCOCO_ERROR_INTERNAL, "%s: no place for it", name.c_str());
}

}  // namespace lococo::trt
