#include "manifest.h"

#include <algorithm>
#include <limits>

#include "error.h"
#include "files.h"
#include "json.h"

namespace lococo {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxDim = 1 << 24;  // of one axis of the model or the cache
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxBatch = 1024;
constexpr uint64_t kMaxBytes = uint64_t{1} << 48;  // of one tensor

Dtype dtype_from(const std::string& name) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16, Dtype::kInt32, Dtype::kInt64}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(LOCOCO_ERROR_CORRUPT, "dtype: expected float32, float16, bfloat16, int32 or int64, got \"%.40s\"", name.c_str());
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t n : shape) text += format(text.size() > 1 ? ", %lld" : "%lld", static_cast<long long>(n));
  return text + "]";
}

int32_t int_member(const json::Value& object, const char* key, int64_t lowest, int64_t highest) {
  return static_cast<int32_t>(object.at(key).as_int(lowest, highest));
}

// --- the tensors that geometry and cache imply -----------------------------------------------------------------------

// K and V of every layer, [batch, H_kv, slots, d].
void add_kv(std::vector<TensorSpec>& list, const char* prefix, const Manifest& m, int64_t batch, int64_t slots) {
  for (int32_t layer = 0; layer < m.num_layers; ++layer) {
    for (const char* part : {"key", "value"}) {
      list.push_back({format("%s.%d.%s", prefix, layer, part), {batch, m.num_kv_heads, slots, m.head_dim}, m.dtype});
    }
  }
}

// Scores of every layer, [batch, H_kv, slots].
void add_scores(std::vector<TensorSpec>& list, const char* prefix, const Manifest& m, int64_t batch, int64_t slots) {
  for (int32_t layer = 0; layer < m.num_layers; ++layer) {
    list.push_back({format("%s.%d", prefix, layer), {batch, m.num_kv_heads, slots}, Dtype::kFloat32});
  }
}

std::vector<TensorSpec> state_tensors(const Manifest& m) {
  std::vector<TensorSpec> list = {{"position", {1}, Dtype::kInt64},
                                  {"past_length", {1}, Dtype::kInt64},
                                  {"logits", {1, m.vocab_size}, Dtype::kFloat32}};
  add_kv(list, "past_key_values", m, 1, m.capacity);
  if (m.has_scores) add_scores(list, "past_scores", m, 1, m.capacity);
  list.push_back({"token_counts", {1, m.vocab_size}, Dtype::kInt32});
  return list;
}

std::vector<TensorSpec> graph_inputs(const Manifest& m, GraphKind kind, int64_t width, int64_t batch) {
  if (kind == GraphKind::kLmHead) return {{"hidden_states", {batch, width, m.hidden_size}, m.dtype}};
  std::vector<TensorSpec> list;
  if (kind == GraphKind::kDecoder) {
    list.push_back({"input_ids", {batch, width}, Dtype::kInt32});
    list.push_back({"position_ids", {batch}, Dtype::kInt32});
  }
  if (kind == GraphKind::kDecoder || width > 1) list.push_back({"past_length", {batch}, Dtype::kInt32});
  if (width > 1) list.push_back({"num_tokens", {batch}, Dtype::kInt32});
  add_kv(list, "past_key_values", m, batch, m.capacity);
  if (kind == GraphKind::kFusion) {
    add_kv(list, "new_key_values", m, batch, width);
    add_scores(list, "scores", m, batch, m.capacity + width);
  } else if (m.has_scores) {
    add_scores(list, "past_scores", m, batch, m.capacity);
  }
  return list;
}

std::vector<TensorSpec> graph_outputs(const Manifest& m, GraphKind kind, int64_t width, int64_t batch) {
  if (kind == GraphKind::kLmHead) return {{"logits", {batch, width, m.vocab_size}, Dtype::kFloat32}};
  std::vector<TensorSpec> list;
  if (kind == GraphKind::kDecoder) {
    list.push_back({"logits", {batch, m.vocab_size}, Dtype::kFloat32});
    if (width > 1) list.push_back({"hidden_states", {batch, width, m.hidden_size}, m.dtype});
    add_kv(list, "new_key_values", m, batch, width);
    add_scores(list, "scores", m, batch, m.capacity + width);
  } else {
    add_kv(list, "present", m, batch, m.capacity);
    if (m.has_scores) add_scores(list, "present_scores", m, batch, m.capacity);
  }
  return list;
}

// The JSON list must name exactly the tensors expected, in that order.
void check_tensors(const json::Value& list, const std::vector<TensorSpec>& expected) {
  const auto& items = list.as_array();
  if (items.size() != expected.size()) {
    fail(LOCOCO_ERROR_CORRUPT, "line %d: expected %zu tensors, got %zu", list.line, expected.size(), items.size());
  }
  for (size_t i = 0; i < items.size(); ++i) {
    const TensorSpec& want = expected[i];
    TensorSpec got{items[i].at("name").as_string(), {}, dtype_from(items[i].at("dtype").as_string())};
    for (const json::Value& n : items[i].at("shape").as_array()) got.shape.push_back(n.as_int(1, kMaxInt32));
    const int64_t nbytes = items[i].at("nbytes").as_int(0, std::numeric_limits<int64_t>::max());
    if (got.name != want.name || got.shape != want.shape || got.dtype != want.dtype ||
        static_cast<uint64_t>(nbytes) != want.nbytes()) {
      fail(LOCOCO_ERROR_CORRUPT, "line %d: expected tensor %s %s %s of %llu bytes, got %.100s %s %s of %lld bytes",
           items[i].line, want.name.c_str(), shape_text(want.shape).c_str(), dtype_name(want.dtype),
           static_cast<unsigned long long>(want.nbytes()), got.name.c_str(), shape_text(got.shape).c_str(),
           dtype_name(got.dtype), static_cast<long long>(nbytes));
    }
  }
}

// --- sections of the manifest ----------------------------------------------------------------------------------------

void read_model(const json::Value& model, Manifest& m) {
  m.vocab_size = int_member(model, "vocab_size", 1, kMaxDim);
  m.hidden_size = int_member(model, "hidden_size", 1, kMaxDim);
  m.num_layers = int_member(model, "num_layers", 1, kMaxLayers);
  m.num_kv_heads = int_member(model, "num_kv_heads", 1, kMaxDim);
  m.head_dim = int_member(model, "head_dim", 1, kMaxDim);
  for (const json::Value& id : model.at("eos_token_ids").as_array()) {
    m.eos_token_ids.push_back(static_cast<int32_t>(id.as_int(0, kMaxInt32)));
  }
}

void read_cache(const json::Value& cache, Manifest& m) {
  m.mem_size = int_member(cache, "mem_size", 1, kMaxDim);
  m.block_size = int_member(cache, "block_size", 1, kMaxDim);
  m.capacity = m.mem_size + int_member(cache, "buffer", 0, kMaxDim);
  m.has_scores = cache.at("score_decay").as_real() > 0;
  (void)cache.at("capacity").as_int(m.capacity, m.capacity);
}

GraphKind kind_from(const json::Value& text) {
  const std::string& name = text.as_string();
  if (name == "decoder") return GraphKind::kDecoder;
  if (name == "fusion") return GraphKind::kFusion;
  if (name == "lm_head") return GraphKind::kLmHead;
  fail(LOCOCO_ERROR_CORRUPT, "line %d: graph kind: expected decoder, fusion or lm_head, got \"%.40s\"", text.line,
       name.c_str());
}

void read_graphs(const json::Value& graphs, Manifest& m) {
  for (const json::Value& g : graphs.as_array()) {
    const json::Value* batch = g.find("batch");  // written where it is not 1
    GraphSpec spec{kind_from(g.at("kind")),
                   int_member(g, "tokens", 1, m.block_size),
                   batch != nullptr ? static_cast<int32_t>(batch->as_int(2, kMaxBatch)) : 1,
                   g.at("file").as_string(),
                   {},
                   {}};
    spec.inputs = graph_inputs(m, spec.kind, spec.tokens, spec.batch);
    spec.outputs = graph_outputs(m, spec.kind, spec.tokens, spec.batch);
    check_tensors(g.at("inputs"), spec.inputs);
    check_tensors(g.at("outputs"), spec.outputs);
    const bool listed =
        std::any_of(m.files.begin(), m.files.end(), [&](const FileEntry& f) { return f.path == spec.file; });
    if (!listed) {
      fail(LOCOCO_ERROR_CORRUPT, "line %d: graph file %.200s: expected it among \"files\"", g.line, spec.file.c_str());
    }
    if (spec.batch > 1) {
      if (spec.kind != GraphKind::kDecoder || spec.tokens != 1 || m.batch_decoder) {
        fail(LOCOCO_ERROR_CORRUPT, "line %d: expected at most one graph with \"batch\", a decoder of 1 token", g.line);
      }
      m.batch_decoder = std::move(spec);
      continue;
    }
    if (spec.kind == GraphKind::kDecoder) m.widths.push_back(spec.tokens);
    m.graphs.push_back(std::move(spec));
  }
  std::sort(m.widths.begin(), m.widths.end());
  if (m.widths.empty() || m.widths.front() != 1 || m.widths.back() != m.block_size ||
      std::adjacent_find(m.widths.begin(), m.widths.end()) != m.widths.end()) {
    fail(LOCOCO_ERROR_CORRUPT, "graphs: expected one decoder of 1 token and one of block_size=%d", m.block_size);
  }
  for (const int32_t width : m.widths) (void)m.graph(GraphKind::kFusion, width);
  if (m.block_size > 1) (void)m.graph(GraphKind::kLmHead, m.block_size);
}

// A path that cannot leave the bundle: relative, no "..", no empty part.
bool is_inside(const std::string& path) {
  if (path.empty() || path.find('\0') != std::string::npos || path.find('\\') != std::string::npos) return false;
  for (size_t start = 0; start <= path.size();) {
    const size_t end = std::min(path.find('/', start), path.size());
    const std::string part = path.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return false;
    start = end + 1;
  }
  return true;
}

void read_files(const json::Value& files, Manifest& m) {
  for (const json::Value& f : files.as_array()) {
    FileEntry entry{f.at("path").as_string(), 0, {}};
    entry.nbytes = static_cast<uint64_t>(f.at("nbytes").as_int(0, std::numeric_limits<int64_t>::max()));
    if (!is_inside(entry.path)) {
      fail(LOCOCO_ERROR_CORRUPT, "line %d: expected a path inside the bundle, got \"%.200s\"", f.line,
           entry.path.c_str());
    }
    if (!from_hex(f.at("sha256").as_string(), entry.sha256)) {
      fail(LOCOCO_ERROR_CORRUPT, "line %d: sha256 of %.200s: expected 64 lower-case hex digits", f.line,
           entry.path.c_str());
    }
    m.files.push_back(std::move(entry));
  }
}

// sha256 over everything that gives a state its meaning, as the exporter computes it (docs/bundle.md).
Digest identity(const json::Value& document, const Manifest& m) {
  std::string weights;
  for (const FileEntry& f : m.files) {
    if (f.path == "model.onnx.data") weights = to_hex(f.sha256);
  }
  json::Value cache = document.at("cache");  // less what is derived from the rest of it
  cache.members.erase(std::remove_if(cache.members.begin(), cache.members.end(),
                                     [](const json::Member& e) { return e.key == "capacity" || e.key == "num_mixed"; }),
                      cache.members.end());
  std::string text = "{\"batch_size\":";
  json::write_canonical(document.at("batch_size"), text);
  text += ",\"cache\":";
  json::write_canonical(cache, text);
  text += ",\"dtype\":";
  json::write_canonical(document.at("dtype"), text);
  text += ",\"model\":";
  json::write_canonical(document.at("model"), text);
  text += format(",\"state_schema_version\":%d,\"weights_sha256\":\"%s\"}", kStateSchemaVersion, weights.c_str());
  Sha256 sha;
  sha.update(text.data(), text.size());
  return sha.digest();
}

void read_document(const json::Value& d, Manifest& m) {
  const json::Value* name = d.find("format");
  if (name == nullptr || name->type != json::Value::Type::kString || name->text != "lococo-bundle") {
    fail(LOCOCO_ERROR_CORRUPT, "expected \"format\": \"lococo-bundle\"; this is not a bundle manifest");
  }
  const json::Value& version = d.at("schema_version");
  if (version.type != json::Value::Type::kInteger || version.integer != kSchemaVersion) {
    fail(LOCOCO_ERROR_VERSION,
         "schema_version: expected %d, got %.40s; export the bundle again with this release, or install the release"
         " that wrote it",
         kSchemaVersion, version.text.c_str());
  }
  const json::Value& state = d.at("state");
  if (state.at("schema_version").as_int(0, kMaxInt32) != kStateSchemaVersion) {
    fail(LOCOCO_ERROR_VERSION, "state.schema_version: expected %d, got %s; export the bundle again",
         kStateSchemaVersion, state.at("schema_version").text.c_str());
  }
  m.dtype_text = d.at("dtype").as_string();
  m.dtype = dtype_from(m.dtype_text);
  if (dtype_bytes(m.dtype) > 4 || m.dtype == Dtype::kInt32) {
    fail(LOCOCO_ERROR_CORRUPT, "dtype: expected float32, float16 or bfloat16, got %s", m.dtype_text.c_str());
  }
  if (const int64_t batch = d.at("batch_size").as_int(1, kMaxDim); batch != 1) {
    fail(LOCOCO_ERROR_UNSUPPORTED, "batch_size: expected 1, got %lld; this library runs one sequence a session",
         static_cast<long long>(batch));
  }
  read_model(d.at("model"), m);
  read_cache(d.at("cache"), m);
  read_files(d.at("files"), m);
  m.bundle_digest = identity(d, m);
  m.bundle_id = to_hex(m.bundle_digest);
  if (m.bundle_id != d.at("bundle_id").as_string()) {
    fail(LOCOCO_ERROR_CORRUPT, "bundle_id: expected %s, got %.80s; the manifest was edited, export the bundle again",
         m.bundle_id.c_str(), d.at("bundle_id").text.c_str());
  }
  m.state = state_tensors(m);
  check_tensors(state.at("tensors"), m.state);
  m.state_bytes = 0;
  for (const TensorSpec& t : m.state) m.state_bytes += t.nbytes();  // at most 12291 of 2^48: no overflow
  (void)state.at("nbytes").as_int(static_cast<int64_t>(m.state_bytes), static_cast<int64_t>(m.state_bytes));
  m.state.pop_back();  // token_counts belongs to the session, not to the backend
  read_graphs(d.at("graphs"), m);
}

}  // namespace

size_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
    case Dtype::kBfloat16:
      return 2;
    case Dtype::kInt64:
      return 8;
    default:
      return 4;
  }
}

const char* dtype_name(Dtype dtype) {
  static constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int32", "int64"};
  return kNames[static_cast<int>(dtype)];
}

uint64_t TensorSpec::nbytes() const {
  uint64_t n = dtype_bytes(dtype);
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(n, static_cast<uint64_t>(dim), &n) || n > kMaxBytes) {
      fail(LOCOCO_ERROR_CORRUPT, "tensor %s %s: expected at most 2^48 bytes", name.c_str(), shape_text(shape).c_str());
    }
  }
  return n;
}

const GraphSpec& Manifest::graph(GraphKind kind, int32_t tokens) const {
  for (const GraphSpec& g : graphs) {
    if (g.kind == kind && g.tokens == tokens) return g;
  }
  static constexpr const char* kNames[] = {"decoder", "fusion", "lm_head"};
  fail(LOCOCO_ERROR_CORRUPT, "graphs: expected one of kind %s and %d tokens, got none", kNames[static_cast<int>(kind)],
       tokens);
}

Manifest read_manifest(const std::string& directory) {
  const std::string path = directory + "/lococo.json";
  std::string text;
  try {
    InputFile file(path);
    text.resize(std::min<uint64_t>(file.size(), (16u << 20) + 1));  // the JSON reader refuses more than 16 MiB
    text.resize(file.read(text.data(), text.size()));
  } catch (const Error& e) {
    if (e.status() != LOCOCO_ERROR_NOT_FOUND) throw;
    fail(e.status(), "%s; expected a bundle directory as written by lococo-export", e.what());
  }
  Manifest m{};
  m.directory = directory;
  try {
    read_document(json::parse(text), m);
  } catch (const Error& e) {
    throw Error(e.status(), path + ": " + e.what());
  }
  return m;
}

void check_files(const Manifest& manifest, bool skip_hashes) {
  for (const FileEntry& entry : manifest.files) {
    const std::string path = manifest.directory + "/" + entry.path;
    const uint64_t size = InputFile(path).size();
    if (size != entry.nbytes) {
      fail(LOCOCO_ERROR_CORRUPT,
           "%s: expected %llu bytes, got %llu; the file is incomplete or another, copy or export the bundle again",
           path.c_str(), static_cast<unsigned long long>(entry.nbytes), static_cast<unsigned long long>(size));
    }
  }
  if (skip_hashes) return;
  for (const FileEntry& entry : manifest.files) {
    const std::string path = manifest.directory + "/" + entry.path;
    const Digest got = sha256_file(path);
    if (got != entry.sha256) {
      fail(LOCOCO_ERROR_CORRUPT,
           "%s: expected sha256 %s, got %s; the file was changed or damaged, copy or export the bundle again",
           path.c_str(), to_hex(entry.sha256).c_str(), to_hex(got).c_str());
    }
  }
}

}  // namespace lococo
