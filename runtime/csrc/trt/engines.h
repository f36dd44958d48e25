// engines.h - in liblococo: engines.json of a bundle, which of the engines fit, and the files behind them. Everything
// that can be known is checked here, before TensorRT sees a plan.
#pragma once

#include <string>
#include <vector>

#include "manifest.h"
#include "sha256.h"

namespace lococo::trt {

// A weight that a plan takes as an input: bytes offset..offset+nbytes of model.onnx.data.
struct WeightInput {
  TensorSpec tensor;
  uint64_t offset;
};

struct Plan {
  GraphKind kind;
  int32_t tokens;
  std::string name;  // "decoder_1"
  std::string path;
  uint64_t nbytes;
  Digest sha256;
  uint64_t workspace_bytes;  // 0: not known
  std::vector<WeightInput> weights;
};

// One directory bundle/engines/KEY.
struct Engines {
  std::string directory;
  std::string tensorrt_version;  // "8.6.0", or with more numbers
  std::string plan_version;      // of the plans' headers; "": of a layout that is not known
  bool version_compatible = false;
  bool runs_on_newer_sm = false;  // hardware compatibility "ampere+"
  std::vector<int32_t> sm;
  uint64_t weights_offset = 0;  // the part of model.onnx.data that one device copy must hold
  uint64_t weights_bytes = 0;
  std::vector<Plan> plans;
  std::vector<int32_t> widths;  // with a decoder and a fusion, ascending; from 1 to block_size
  bool has_lm_head = false;
};

// What would run them.
struct Target {
  std::string tensorrt_version;
  int32_t sm = 0;
  std::string device;  // for messages
};

// The engines of the bundle that run on target. NOT_FOUND: none were built; VERSION, UNSUPPORTED, CORRUPT: none fit,
// with the reason for each.
Engines choose_engines(const Manifest& manifest, const Target& target);

// A file in memory, read-only. NOT_FOUND, IO, OUT_OF_MEMORY.
class MappedFile {
 public:
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  [[nodiscard]] const uint8_t* data() const { return data_; }
  [[nodiscard]] uint64_t size() const { return size_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

// Size, header and, unless skip_hash, sha256. CORRUPT, VERSION.
void check_plan(const Engines& engines, const Plan& plan, const MappedFile& file, bool skip_hash);

// The TensorRT version in a plan's header, such as "8.6.0.12"; "" if the layout is not the known one.
std::string plan_version(const uint8_t* plan, uint64_t size);

}  // namespace lococo::trt
