// manifest.h - lococo.json, read and checked against itself and against the files of the bundle.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sha256.h"

namespace lococo {

constexpr int kSchemaVersion = 1;
constexpr int kStateSchemaVersion = 2;

enum class Dtype { kFloat32, kFloat16, kBfloat16, kInt32, kInt64 };

size_t dtype_bytes(Dtype dtype);
const char* dtype_name(Dtype dtype);

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
  Dtype dtype;

  [[nodiscard]] uint64_t nbytes() const;  // CORRUPT beyond 2^48, so that sums do not overflow
};

enum class GraphKind { kDecoder, kFusion, kLmHead };

// One ONNX file: a forward of up to `tokens` tokens, the fusion that may follow it, or logits of a whole block.
struct GraphSpec {
  GraphKind kind;
  int32_t tokens;
  int32_t batch;  // sequences that it reads tokens of
  std::string file;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
};

struct FileEntry {
  std::string path;  // relative to the bundle
  uint64_t nbytes;
  Digest sha256;
};

struct Manifest {
  std::string directory;
  std::string bundle_id;  // 64 hex digits
  Digest bundle_digest;   // the same in binary
  Dtype dtype;            // of K and V
  std::string dtype_text;

  int32_t vocab_size;
  int32_t hidden_size;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  std::vector<int32_t> eos_token_ids;

  int32_t mem_size;    // M
  int32_t capacity;    // C = M + buffer
  int32_t block_size;  // B
  bool has_scores;     // score_decay > 0: scores are state

  std::vector<TensorSpec> state;           // in the order of the state file, less token_counts, its last
  uint64_t state_bytes;                    // of all of them
  std::vector<GraphSpec> graphs;           // of one sequence each
  std::optional<GraphSpec> batch_decoder;  // steps a batch of sequences, one token each
  std::vector<FileEntry> files;
  std::vector<int32_t> widths;  // of the decoder graphs, ascending; the first is 1, the last block_size

  [[nodiscard]] int32_t max_batch() const { return batch_decoder ? batch_decoder->batch : 1; }
  [[nodiscard]] const GraphSpec& graph(GraphKind kind, int32_t tokens) const;
};

// Reads and checks directory/lococo.json. NOT_FOUND, CORRUPT, VERSION, UNSUPPORTED (more than one sequence).
Manifest read_manifest(const std::string& directory);

// Presence, size and, unless skip_hashes, sha256 of every file. NOT_FOUND, CORRUPT.
void check_files(const Manifest& manifest, bool skip_hashes);

}  // namespace lococo
