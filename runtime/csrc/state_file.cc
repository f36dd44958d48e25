#include "state_file.h"

#include <cstring>
#include <limits>
#include <string_view>

#include "error.h"
#include "sha256.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "state files are little-endian and written from memory as it is");

namespace lococo {
namespace {

constexpr std::string_view kMagic = "LOCOSTAT";
constexpr size_t kVersionAt = 8;
constexpr size_t kHeaderBytesAt = 12;
constexpr size_t kBundleAt = 16;
constexpr size_t kPayloadBytesAt = 48;
constexpr size_t kChecksumAt = 56;

template <typename T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

Digest checksum(const Manifest& m, const uint8_t* state) {
  Sha256 sha;
  sha.update(state, kChecksumAt);
  sha.update(state + kStateHeaderBytes, m.state_bytes);
  return sha.digest();
}

}  // namespace

int64_t load_int64(const uint8_t* bytes) { return load<int64_t>(bytes); }
void store_int64(uint8_t* bytes, int64_t value) { std::memcpy(bytes, &value, sizeof value); }

void seal_state(const Manifest& m, uint8_t* state) {
  const uint32_t version = kStateSchemaVersion;
  const uint32_t header_bytes = kStateHeaderBytes;
  std::memcpy(state, kMagic.data(), kMagic.size());
  std::memcpy(state + kVersionAt, &version, sizeof version);
  std::memcpy(state + kHeaderBytesAt, &header_bytes, sizeof header_bytes);
  std::memcpy(state + kBundleAt, m.bundle_digest.data(), m.bundle_digest.size());
  std::memcpy(state + kPayloadBytesAt, &m.state_bytes, sizeof m.state_bytes);
  const Digest sum = checksum(m, state);
  std::memcpy(state + kChecksumAt, sum.data(), sum.size());
}

void check_state_header(const Manifest& m, const uint8_t* header, uint64_t size) {
  const uint64_t expected_size = kStateHeaderBytes + m.state_bytes;
  if (size < kStateHeaderBytes) {
    fail(LOCOCO_ERROR_CORRUPT, "state: expected %llu bytes, got %llu; it was cut short",
         static_cast<unsigned long long>(expected_size), static_cast<unsigned long long>(size));
  }
  if (std::memcmp(header, kMagic.data(), kMagic.size()) != 0) {
    fail(LOCOCO_ERROR_CORRUPT, "state: expected it to start with %s; this is no saved state", kMagic.data());
  }
  if (const auto version = load<uint32_t>(header + kVersionAt); version != kStateSchemaVersion) {
    fail(LOCOCO_ERROR_VERSION, "state: schema version: expected %d, got %u; use the release that wrote it",
         kStateSchemaVersion, version);
  }
  if (const auto bytes = load<uint32_t>(header + kHeaderBytesAt); bytes != kStateHeaderBytes) {
    fail(LOCOCO_ERROR_CORRUPT, "state: header: expected %zu bytes, got %u", kStateHeaderBytes, bytes);
  }
  Digest bundle;
  std::memcpy(bundle.data(), header + kBundleAt, bundle.size());
  if (bundle != m.bundle_digest) {
    fail(LOCOCO_ERROR_STATE_MISMATCH,
         "state: expected one of bundle %s, got one of bundle %s; open the bundle that it was saved with",
         m.bundle_id.c_str(), to_hex(bundle).c_str());
  }
  const auto payload_bytes = load<uint64_t>(header + kPayloadBytesAt);
  if (size != expected_size || payload_bytes != m.state_bytes) {
    fail(LOCOCO_ERROR_CORRUPT,
         "state: expected %llu bytes, %llu of them payload, got %llu and %llu; it was cut short or is damaged",
         static_cast<unsigned long long>(expected_size), static_cast<unsigned long long>(m.state_bytes),
         static_cast<unsigned long long>(size), static_cast<unsigned long long>(payload_bytes));
  }
}

void check_state(const Manifest& m, const uint8_t* state) {
  Digest stored;
  std::memcpy(stored.data(), state + kChecksumAt, stored.size());
  const Digest got = checksum(m, state);
  if (got != stored) {
    fail(LOCOCO_ERROR_CORRUPT, "state: checksum: expected sha256 %s, got %s; it is damaged, load another copy",
         to_hex(stored).c_str(), to_hex(got).c_str());
  }
  const int64_t position = load_int64(state + kStateHeaderBytes);
  const int64_t length = load_int64(state + kStateHeaderBytes + 8);
  if (position < 0 || position > std::numeric_limits<int32_t>::max()) {
    fail(LOCOCO_ERROR_CORRUPT, "state: position: expected 0 to 2147483647, got %lld", static_cast<long long>(position));
  }
  // Up to the capacity nothing is fused, so every token has its slot; from there on at least mem_size are live.
  const int64_t lowest = position <= m.capacity ? position : m.mem_size;
  const int64_t highest = position <= m.capacity ? position : m.capacity;
  if (length < lowest || length > highest) {
    fail(LOCOCO_ERROR_CORRUPT, "state: live slots at position %lld: expected %lld to %lld, got %lld",
         static_cast<long long>(position), static_cast<long long>(lowest), static_cast<long long>(highest),
         static_cast<long long>(length));
  }
  const uint8_t* counts = state + kStateHeaderBytes + m.state_bytes - static_cast<size_t>(m.vocab_size) * 4;
  for (int32_t id = 0; id < m.vocab_size; ++id) {
    if (const auto count = load<int32_t>(counts + static_cast<size_t>(id) * 4); count < 0) {
      fail(LOCOCO_ERROR_CORRUPT, "state: token_counts: expected at least 0, got %d for token id %d", count, id);
    }
  }
}

}  // namespace lococo
