// Manifests made from data/lococo.json, which make_manifest.py writes with the Python side of the format.
#include <cstring>

#include "check.h"
#include "manifest.h"

using lococo::check_files;
using lococo::Manifest;
using lococo::read_manifest;

namespace {

std::string original;

std::string replaced(const std::string& from, const std::string& to) {
  std::string text = original;
  const size_t at = text.find(from);
  CHECK(at != std::string::npos);
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

void expect(const TempDir& dir, lococo_status status, const std::vector<const char*>& parts, const std::string& text) {
  write_text(dir / "lococo.json", text);
  check_error(status, parts, [&] { (void)read_manifest(dir.path()); }, "manifest", static_cast<int>(text.size()));
}

void reads(const TempDir& dir) {
  write_text(dir / "lococo.json", original);
  const Manifest m = read_manifest(dir.path());
  CHECK_EQ(m.vocab_size, 11);
  CHECK_EQ(m.num_kv_heads, 2);
  CHECK_EQ(m.mem_size, 4);
  CHECK_EQ(m.capacity, 6);
  CHECK_EQ(m.block_size, 3);
  CHECK(m.has_scores);
  CHECK_EQ(m.dtype_text, "float16");
  CHECK_EQ(m.eos_token_ids.size(), 2u);
  CHECK_EQ(m.widths.size(), 2u);
  CHECK_EQ(m.state.size(), 6u);
  CHECK_EQ(m.state_bytes, 8u + 8 + 11 * 4 + 2 * (2 * 6 * 2 * 2) + 2 * 6 * 4 + 11 * 4);
  CHECK_EQ(m.graph(lococo::GraphKind::kLmHead, 3).file, "lm_head_3.onnx");
  CHECK_EQ(m.max_batch(), 2);
  CHECK_EQ(m.batch_decoder->file, "decoder_1_batch_2.onnx");
  CHECK_EQ(m.graph(lococo::GraphKind::kDecoder, 1).file, "decoder_1.onnx");
  CHECK_EQ(lococo::to_hex(m.bundle_digest), m.bundle_id);
}

void refuses(const TempDir& dir) {
  const auto corrupt = LOCOCO_ERROR_CORRUPT;
  expect(dir, corrupt, {"lococo.json", "not valid JSON"}, original.substr(0, original.size() / 2));
  expect(dir, corrupt, {"not valid JSON"}, "");
  expect(dir, corrupt, {"not a bundle manifest"}, "{}");
  expect(dir, corrupt, {"expected an object"}, "[1]");
  expect(dir, corrupt, {"at most 16777216 bytes"}, std::string(20 << 20, ' '));
  expect(dir, corrupt, {"not a bundle manifest"}, replaced("lococo-bundle", "other"));
  expect(dir, LOCOCO_ERROR_VERSION, {"schema_version", "expected 1", "got 2"},
         replaced("\"schema_version\": 1", "\"schema_version\": 2"));
  expect(dir, LOCOCO_ERROR_UNSUPPORTED, {"batch_size"}, replaced("\"batch_size\": 1", "\"batch_size\": 2"));
  expect(dir, corrupt, {"bundle_id"},
         replaced("\"mem_size\": 4,", "\"mem_size\": 5,")
             .replace(original.find("\"capacity\": 6"), 13, "\"capacity\": 7"));
  expect(dir, corrupt, {"from 6 to 6"}, replaced("\"capacity\": 6", "\"capacity\": 7"));
  expect(dir, corrupt, {"bundle_id", "edited"}, replaced("10000.0", "10001.0"));
  expect(dir, corrupt, {"bundle_id"}, replaced("\"bundle_id\": \"", "\"bundle_id\": \"0"));
  expect(dir, corrupt, {"dtype"}, replaced("\"dtype\": \"float16\"", "\"dtype\": \"int64\""));
  expect(dir, corrupt, {"dtype"}, replaced("\"dtype\": \"float16\"", "\"dtype\": \"float8\""));
  expect(dir, corrupt, {"tensor"}, replaced("\"name\": \"past_length\"", "\"name\": \"length\""));
  expect(dir, corrupt, {"tensor"}, replaced("\"nbytes\": 44", "\"nbytes\": 45"));
  expect(dir, corrupt, {"from 248 to 248"}, replaced("\"nbytes\": 248", "\"nbytes\": 249"));
  expect(dir, corrupt, {"\"vocab_size\""}, replaced("\"vocab_size\"", "\"other\""));
  for (const char* value : {"0", "-1", "1e3", "99999999999", "9223372036854775807", "\"11\"", "null"}) {
    expect(dir, corrupt, {"an integer from 1"},
           replaced("\"vocab_size\": 11", std::string("\"vocab_size\": ") + value));
    expect(dir, corrupt, {"an integer from 1"}, replaced("\"num_layers\": 1", std::string("\"num_layers\": ") + value));
    expect(dir, corrupt, {"an integer from 1"}, replaced("\"block_size\": 3", std::string("\"block_size\": ") + value));
  }
  expect(dir, corrupt, {"graph kind"}, replaced("\"kind\": \"lm_head\"", "\"kind\": \"tail\""));
  expect(dir, corrupt, {"an integer from 1 to 3"}, replaced("\"tokens\": 3", "\"tokens\": 4"));
  expect(dir, corrupt, {"among \"files\""}, replaced("\"file\": \"decoder_1.onnx\"", "\"file\": \"decoder_2.onnx\""));
  const size_t graphs = original.find("\"graphs\": [");
  const size_t files = original.find("  \"files\": [");
  expect(dir, corrupt, {"decoder of 1 token"},
         original.substr(0, graphs) + "\"graphs\": [],\n" + original.substr(files));
  for (const char* value : {"1", "0", "1025", "2.0", "null"}) {
    expect(dir, corrupt, {"an integer from 2 to 1024"}, replaced("\"batch\": 2", std::string("\"batch\": ") + value));
  }
  expect(dir, corrupt, {"tensor"}, replaced("\"batch\": 2", "\"batch\": 3"));
  const size_t batched = original.rfind("    {", original.find("\"decoder_1_batch_2\""));
  const std::string graph = original.substr(batched, original.rfind("\n  ],", files) - batched);
  expect(dir, corrupt, {"at most one"}, original.substr(0, batched) + graph + ",\n" + original.substr(batched));
  for (const char* path : {"/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", "a/", "..", "a\\\\b", "a\\u0000b"}) {
    expect(dir, corrupt, {"inside the bundle"},
           replaced("\"path\": \"tokenizer/tokenizer.json\"", std::string("\"path\": \"") + path + "\""));
  }
  const std::string sha = "\"sha256\": \"";
  expect(dir, corrupt, {"64 lower-case hex digits"}, replaced(sha, sha + "0"));
  // every prefix, and every byte flipped, is read or refused, never anything worse
  for (size_t n = 0; n < original.size(); n += 97) expect(dir, corrupt, {}, original.substr(0, n));
  for (size_t i = 0; i < original.size(); i += 13) {
    std::string text = original;
    text[i] = static_cast<char>(text[i] ^ (1 << (i % 8)));
    write_text(dir / "lococo.json", text);
    try {
      (void)read_manifest(dir.path());
    } catch (const lococo::Error&) {
    }
    CHECK(true);
  }
}

void checks_files(const TempDir& dir) {
  write_text(dir / "lococo.json", original);
  const Manifest m = read_manifest(dir.path());
  std::filesystem::create_directory(dir / "tokenizer");
  for (const auto& f : m.files) write_text(dir / f.path, f.path);  // as make_manifest.py assumes
  check_files(m, false);
  const std::string path = dir / "fusion_1.onnx";
  write_text(path, "fusion_1.onnX");
  check_files(m, true);
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, (path.c_str(), "sha256", "expected", "got"), check_files(m, false));
  write_text(path, "fusion_1");
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, (path.c_str(), "expected 13 bytes, got 8"), check_files(m, true));
  std::filesystem::remove(path);
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, (path.c_str()), check_files(m, true));
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("absent", "lococo-export"), (void)read_manifest(dir / "absent"));
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("lococo.json"), (void)read_manifest(dir / "tokenizer"));
}

}  // namespace

int main(int argc, char** argv) {
  original = read_text(argc > 1 ? argv[1] : "data/lococo.json");
  CHECK(!original.empty());
  const TempDir dir;
  reads(dir);
  refuses(dir);
  checks_files(dir);
  return finish();
}
