// lococo.json. The bundle_id seals a manifest, so one whose id alone is wrong is tried again with the right one.
#include <cstring>

#include "cadence.h"
#include "fuzz.h"
#include "manifest.h"

namespace {

// What the rest of the library takes for granted of a manifest that was read.
void check_promises(const lococo::Manifest& m) {
  using lococo::GraphKind;
  REQUIRE(m.widths.front() == 1 && m.widths.back() == m.block_size && m.mem_size <= m.capacity);
  uint64_t bytes = 0;
  for (const lococo::TensorSpec& t : m.state) bytes += t.nbytes();
  REQUIRE(bytes + static_cast<uint64_t>(m.vocab_size) * 4 == m.state_bytes);  // token_counts is the session's
  for (const int32_t width : m.widths) {
    REQUIRE(!m.graph(GraphKind::kDecoder, width).inputs.empty() && !m.graph(GraphKind::kFusion, width).inputs.empty());
  }
  const lococo::Cadence cadence(m.mem_size, m.capacity, m.widths);
  int32_t length = 0;
  for (const uint64_t left : {uint64_t{1}, uint64_t{2}, uint64_t{1000}, ~uint64_t{0}, uint64_t{1}}) {
    const lococo::Forward f = cadence.next(length, left);
    REQUIRE(f.n >= 1 && f.n <= f.width && f.after >= 1 && f.after <= m.capacity);
    length = f.after;
  }
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = scratch() + "/lococo.json";
  std::string text(reinterpret_cast<const char*>(data), size);
  for (int attempt = 0; attempt < 2; ++attempt) {
    write_text(path, text);
    const Outcome o = outcome_of([] { check_promises(lococo::read_manifest(scratch())); });
    constexpr const char* kExpected = "bundle_id: expected ";
    const size_t expected = o.text.find(kExpected);
    const size_t key = text.find("\"bundle_id\"");
    const size_t start = key == std::string::npos ? key : text.find('"', key + 11);
    const size_t end = start == std::string::npos ? start : text.find('"', start + 1);
    if (expected == std::string::npos || end == std::string::npos) break;
    text.replace(start + 1, end - start - 1, o.text.substr(expected + std::strlen(kExpected), 64));
  }
  return 0;
}
