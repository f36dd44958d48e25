#include "trt/engines.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <utility>

#include "error.h"
#include "files.h"
#include "json.h"

namespace lococo::trt {
namespace {

constexpr int kSchemaVersion = 1;
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr uint64_t kAlignment = 256;                 // that TensorRT asks of device addresses
constexpr int32_t kJetson[] = {72, 87, 101, 110};    // "ampere+" plans do not run there
constexpr const char* kAdvice = "run lococo-build";  // mends all of this

using Release = std::array<int, 3>;

// (8, 6, 0) of "8.6.0" and of "8.6.0.12".
Release release(const std::string& version) {
  Release r{};
  (void)std::sscanf(version.c_str(), "%d.%d.%d", &r[0], &r[1], &r[2]);
  return r;
}

Dtype dtype_from(const json::Value& text) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16, Dtype::kInt32}) {
    if (text.as_string() == dtype_name(dtype)) return dtype;
  }
  fail(LOCOCO_ERROR_CORRUPT, "line %d: dtype: expected float32, float16, bfloat16 or int32, got \"%.40s\"", text.line,
       text.as_string().c_str());
}

GraphKind kind_from(const json::Value& text) {
  const std::string& name = text.as_string();
  if (name == "decoder") return GraphKind::kDecoder;
  if (name == "fusion") return GraphKind::kFusion;
  if (name == "lm_head") return GraphKind::kLmHead;
  fail(LOCOCO_ERROR_CORRUPT, "line %d: kind: expected decoder, fusion or lm_head, got \"%.40s\"", text.line,
       name.c_str());
}

WeightInput read_weight(const json::Value& value, const Engines& engines) {
  WeightInput w{{value.at("name").as_string(), {}, dtype_from(value.at("dtype"))}, 0};
  for (const json::Value& n : value.at("shape").as_array()) w.tensor.shape.push_back(n.as_int(1, kMaxInt32));
  w.offset = static_cast<uint64_t>(value.at("offset").as_int(0, kMaxInt64));
  const auto nbytes = static_cast<uint64_t>(value.at("nbytes").as_int(0, kMaxInt64));
  const uint64_t end = engines.weights_offset + engines.weights_bytes;  // below 2^63 each, so no sum overflows
  if (nbytes != w.tensor.nbytes() || w.offset < engines.weights_offset || w.offset + nbytes > end ||
      (w.offset - engines.weights_offset) % kAlignment != 0) {
    fail(LOCOCO_ERROR_CORRUPT, "line %d: weight %.100s: %llu bytes at %llu contradict its shape or weights_bytes",
         value.line, w.tensor.name.c_str(), static_cast<unsigned long long>(nbytes),
         static_cast<unsigned long long>(w.offset));
  }
  return w;
}

Plan read_plan(const json::Value& value, const Engines& engines) {
  Plan p{};
  p.name = value.at("name").as_string();
  p.kind = kind_from(value.at("kind"));
  p.tokens = static_cast<int32_t>(value.at("tokens").as_int(1, kMaxInt32));
  const std::string& file = value.at("plan").as_string();
  if (file.empty() || file[0] == '.' || file.find('/') != std::string::npos || file.find('\0') != std::string::npos) {
    fail(LOCOCO_ERROR_CORRUPT, "line %d: plan: expected a file name, got \"%.200s\"", value.line, file.c_str());
  }
  p.path = engines.directory + "/" + file;
  p.nbytes = static_cast<uint64_t>(value.at("nbytes").as_int(1, kMaxInt64));
  if (!from_hex(value.at("sha256").as_string(), p.sha256)) {
    fail(LOCOCO_ERROR_CORRUPT, "line %d: sha256: expected 64 lower-case hex digits", value.line);
  }
  const json::Value& workspace = value.at("workspace_bytes");
  p.workspace_bytes = workspace.is_null() ? 0 : static_cast<uint64_t>(workspace.as_int(0, kMaxInt64));
  for (const json::Value& w : value.at("weights").as_array()) p.weights.push_back(read_weight(w, engines));
  return p;
}

// The plans' graphs are those of the bundle as it is now, and there are enough of them.
void check_graphs(const json::Value& plans, const Manifest& m, Engines& engines) {
  for (const json::Value& value : plans.as_array()) {
    const std::string& onnx = value.at("onnx").as_string();
    const std::string& sha256 = value.at("onnx_sha256").as_string();
    const auto entry = std::find_if(m.files.begin(), m.files.end(), [&](const FileEntry& f) { return f.path == onnx; });
    if (entry == m.files.end() || to_hex(entry->sha256) != sha256) {
      fail(LOCOCO_ERROR_CORRUPT, "built from another version of %.200s; %s --force on this bundle", onnx.c_str(),
           kAdvice);
    }
    engines.plans.push_back(read_plan(value, engines));
    const Plan& p = engines.plans.back();
    if (m.graph(p.kind, p.tokens).file != onnx) {
      fail(LOCOCO_ERROR_CORRUPT, "line %d: %.100s: expected it to be built from %s, got %.200s", value.line,
           p.name.c_str(), m.graph(p.kind, p.tokens).file.c_str(), onnx.c_str());
    }
  }
  const auto has = [&](GraphKind kind, int32_t tokens) {
    return std::any_of(engines.plans.begin(), engines.plans.end(),
                       [&](const Plan& p) { return p.kind == kind && p.tokens == tokens; });
  };
  for (const int32_t width : m.widths) {
    if (has(GraphKind::kDecoder, width) && has(GraphKind::kFusion, width)) engines.widths.push_back(width);
  }
  if (engines.widths.empty() || engines.widths.front() != 1 || engines.widths.back() != m.block_size) {
    fail(LOCOCO_ERROR_CORRUPT, "expected a decoder and a fusion of 1 and of %d tokens; %s --force", m.block_size,
         kAdvice);
  }
  engines.has_lm_head = has(GraphKind::kLmHead, m.block_size);
}

void read_document(const json::Value& d, const Manifest& m, const Target& target, Engines& engines) {
  const json::Value* name = d.find("format");
  if (name == nullptr || name->type != json::Value::Type::kString || name->text != "lococo-engines") {
    fail(LOCOCO_ERROR_CORRUPT, "expected \"format\": \"lococo-engines\"; %s --force", kAdvice);
  }
  const json::Value& schema = d.at("schema_version");
  if (schema.type != json::Value::Type::kInteger || schema.integer != kSchemaVersion) {
    fail(LOCOCO_ERROR_VERSION, "schema_version: expected %d, got %.40s; %s of this release", kSchemaVersion,
         schema.text.c_str(), kAdvice);
  }
  if (d.at("bundle_id").as_string() != m.bundle_id) {
    fail(LOCOCO_ERROR_CORRUPT, "built for bundle %.16s, found in bundle %.16s; %s --force on this bundle",
         d.at("bundle_id").text.c_str(), m.bundle_id.c_str(), kAdvice);
  }
  engines.tensorrt_version = d.at("tensorrt_version").as_string();
  engines.plan_version = d.at("plan_version").as_string();
  for (const json::Value& sm : d.at("sm").as_array()) {
    engines.sm.push_back(static_cast<int32_t>(sm.as_int(1, kMaxInt32)));
  }
  const json::Value& options = d.at("options");
  engines.version_compatible = options.at("version_compatible").as_bool();
  engines.runs_on_newer_sm = options.at("hardware_compatibility_level").as_string() == "ampere+";

  const std::string& flavour = d.at("flavour").as_string();
  if (flavour != "tensorrt") {
    fail(LOCOCO_ERROR_VERSION, "built with %.40s, found TensorRT %s", flavour.c_str(), target.tensorrt_version.c_str());
  }
  const Release here = release(target.tensorrt_version);
  const Release there = release(engines.tensorrt_version);
  if (here != there && !(engines.version_compatible && here >= there)) {
    fail(LOCOCO_ERROR_VERSION, "built with TensorRT %.40s, found TensorRT %s; install that version, or %s here",
         engines.tensorrt_version.c_str(), target.tensorrt_version.c_str(), kAdvice);
  }
  const bool exact = std::find(engines.sm.begin(), engines.sm.end(), target.sm) != engines.sm.end();
  const bool jetson = std::find(std::begin(kJetson), std::end(kJetson), target.sm) != std::end(kJetson);
  if (!exact && !(engines.runs_on_newer_sm && target.sm >= 80 && !jetson)) {
    std::string names;
    for (const int32_t sm : engines.sm) names += format("%ssm%d", names.empty() ? "" : ", ", sm);
    fail(LOCOCO_ERROR_UNSUPPORTED, "built for %s, found %s; %s on this device", names.c_str(), target.device.c_str(),
         kAdvice);
  }
  if (const json::Value& layers = options.at("num_layers"); !layers.is_null()) {
    fail(LOCOCO_ERROR_UNSUPPORTED, "built with --num-layers %s of %d, for debugging; %s without it",
         layers.text.c_str(), m.num_layers, kAdvice);
  }
  engines.weights_offset = static_cast<uint64_t>(d.at("weights_offset").as_int(0, kMaxInt64));
  engines.weights_bytes = static_cast<uint64_t>(d.at("weights_bytes").as_int(0, kMaxInt64));
  check_graphs(d.at("plans"), m, engines);
}

Engines read_engines(const std::string& directory, const Manifest& m, const Target& target) {
  const std::string path = directory + "/engines.json";
  InputFile file(path);
  std::string text(std::min<uint64_t>(file.size(), (16u << 20) + 1), '\0');  // the JSON reader refuses more
  text.resize(file.read(text.data(), text.size()));
  Engines engines;
  engines.directory = directory;
  read_document(json::parse(text), m, target, engines);
  return engines;
}

// bundle/engines/*, without hidden ones: they are being built.
std::vector<std::string> list_directories(const std::string& folder) {
  std::vector<std::string> found;
  std::error_code ignored;  // no folder: no engines
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name[0] != '.' && entry.is_directory(ignored)) found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

Engines choose_engines(const Manifest& m, const Target& target) {
  const std::string folder = m.directory + "/engines";
  std::vector<Engines> fitting;
  std::string reasons;
  lococo_status status = LOCOCO_ERROR_NOT_FOUND;
  for (const std::string& directory : list_directories(folder)) {
    try {
      fitting.push_back(read_engines(directory, m, target));
    } catch (const Error& e) {
      reasons += "\n  " + directory + ": " + e.what();
      status = e.status();
    }
  }
  if (fitting.empty()) {
    fail(status, "%s: expected engines for TensorRT %s on %s, found %s%s\nRun on this machine: lococo-build %s",
         folder.c_str(), target.tensorrt_version.c_str(), target.device.c_str(),
         reasons.empty() ? "none" : "none that fit:", reasons.c_str(), m.directory.c_str());
  }
  // Those made for exactly this device and version are the fastest.
  const auto distance = [&](const Engines& e) {
    return (std::find(e.sm.begin(), e.sm.end(), target.sm) == e.sm.end() || e.runs_on_newer_sm ? 2 : 0) +
           (release(e.tensorrt_version) == release(target.tensorrt_version) ? 0 : 1);
  };
  return *std::min_element(fitting.begin(), fitting.end(),
                           [&](const Engines& a, const Engines& b) { return distance(a) < distance(b); });
}

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  size_ = InputFile(path_).size();  // and the error texts of a file that is not there
  if (size_ == 0) return;
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  void* memory = fd < 0 ? MAP_FAILED : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  const int code = errno;
  if (fd >= 0) ::close(fd);
  if (memory == MAP_FAILED) {
    fail(code == ENOMEM ? LOCOCO_ERROR_OUT_OF_MEMORY : LOCOCO_ERROR_IO, "%s: cannot map %llu bytes: %s (errno %d)",
         path_.c_str(), static_cast<unsigned long long>(size_), std::strerror(code), code);
  }
  data_ = static_cast<const uint8_t*>(memory);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

// The layout is what `trtexec --getPlanVersionOnly` reads: a tag, 0, and the version's four numbers at byte 24.
std::string plan_version(const uint8_t* plan, uint64_t size) {
  if (size < 28 || std::memcmp(plan + 1, "trt", 3) != 0 || std::memcmp(plan + 4, "\0\0\0\0", 4) != 0) return "";
  return format("%d.%d.%d.%d", plan[24], plan[25], plan[26], plan[27]);
}

void check_plan(const Engines& engines, const Plan& plan, const MappedFile& file, bool skip_hash) {
  if (file.size() != plan.nbytes) {
    fail(LOCOCO_ERROR_CORRUPT, "%s: expected %llu bytes, got %llu; it was cut short or is another, %s --force",
         plan.path.c_str(), static_cast<unsigned long long>(plan.nbytes), static_cast<unsigned long long>(file.size()),
         kAdvice);
  }
  const std::string version = plan_version(file.data(), file.size());
  if (version != engines.plan_version) {
    fail(LOCOCO_ERROR_VERSION, "%s: expected the header of TensorRT %s, got %s; %s --force", plan.path.c_str(),
         engines.plan_version.empty() ? "of an unknown layout" : engines.plan_version.c_str(),
         version.empty() ? "one of an unknown layout" : version.c_str(), kAdvice);
  }
  if (!version.empty() && !engines.version_compatible && release(version) != release(engines.tensorrt_version)) {
    fail(LOCOCO_ERROR_VERSION, "%s: its header says TensorRT %s, engines.json says %s; %s --force", plan.path.c_str(),
         version.c_str(), engines.tensorrt_version.c_str(), kAdvice);
  }
  if (skip_hash) return;
  Sha256 sha;
  sha.update(file.data(), file.size());
  const Digest got = sha.digest();
  if (got != plan.sha256) {
    fail(LOCOCO_ERROR_CORRUPT, "%s: expected sha256 %s, got %s; the file was changed or damaged, %s --force",
         plan.path.c_str(), to_hex(plan.sha256).c_str(), to_hex(got).c_str(), kAdvice);
  }
}

}  // namespace lococo::trt
