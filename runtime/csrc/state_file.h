// state_file.h - the header of a state: what it is, whose it is, and whether it is whole.
//
//   0  magic "LOCOSTAT"             48  payload bytes, u64
//   8  state schema version, u32    56  sha256 of bytes 0..55 and the payload
//  12  header bytes (88), u32       88  payload: the manifest's state tensors, in its order, tight, little-endian
//  16  bundle id, 32 bytes
#pragma once

#include <cstddef>
#include <cstdint>

#include "manifest.h"

namespace lococo {

constexpr size_t kStateHeaderBytes = 88;

// Fills the header in front of a payload that is in place.
void seal_state(const Manifest& manifest, uint8_t* state);

// The first kStateHeaderBytes (or fewer, if `size` is less) of a state of `size` bytes. CORRUPT, VERSION,
// STATE_MISMATCH.
void check_state_header(const Manifest& manifest, const uint8_t* header, uint64_t size);

// All of a state whose header was checked: checksum, position and lengths. CORRUPT.
void check_state(const Manifest& manifest, const uint8_t* state);

int64_t load_int64(const uint8_t* bytes);
void store_int64(uint8_t* bytes, int64_t value);

}  // namespace lococo
