// One plugin class serves every op: its fields are the numbers of ops/op.h, the dtypes of inputs and outputs, and the
// shapes of the outputs. Version 2 of TensorRT's plugin interface, which 8.6 to 11 have in common.
#include "trt/plugin.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"
#include "trt/ops/op.h"

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // deprecated since 10, and the only one that 8.6 has

namespace lococo::trt {
namespace {

using nvinfer1::DataType;

constexpr const char* kType = "LococoOp";
constexpr const char* kVersion = "1";  // of the fields and of what is serialized
constexpr const char* kNamespace = "lococo";

// Everything about a node, as 32-bit words: what a plan stores.
struct Node {
  OpParameters op{};
  std::vector<int32_t> dtypes;               // of inputs, then of outputs: 0 float32, 1 float16, 2 bfloat16, 3 int32
  std::vector<std::vector<int32_t>> shapes;  // of outputs

  [[nodiscard]] size_t inputs() const { return dtypes.size() - shapes.size(); }

  [[nodiscard]] std::vector<int32_t> words() const {
    std::vector<int32_t> w(op.numbers.begin(), op.numbers.end());
    w.resize(w.size() + 2);
    std::memcpy(&w[w.size() - 2], &op.eps, sizeof(float));
    std::memcpy(&w[w.size() - 1], &op.score_decay, sizeof(float));
    w.push_back(static_cast<int32_t>(dtypes.size()));
    w.insert(w.end(), dtypes.begin(), dtypes.end());
    for (const auto& shape : shapes) {
      w.push_back(static_cast<int32_t>(shape.size()));
      w.insert(w.end(), shape.begin(), shape.end());
    }
    return w;
  }

  // From words; false if they are not such a node.
  bool parse(const int32_t* w, size_t count) {
    const int32_t* const end = w + count;
    if (count < kOpNumbers + 3) return false;
    std::copy_n(w, kOpNumbers, op.numbers.begin());
    w += kOpNumbers;
    std::memcpy(&op.eps, w++, sizeof(float));
    std::memcpy(&op.score_decay, w++, sizeof(float));
    const int32_t tensors = *w++;
    if (tensors < 0 || tensors > end - w) return false;
    dtypes.assign(w, w + tensors);
    w += tensors;
    while (w < end) {
      const int32_t rank = *w++;
      if (rank < 1 || rank > nvinfer1::Dims::MAX_DIMS || rank > end - w) return false;
      shapes.emplace_back(w, w + rank);
      w += rank;
    }
    return unsupported(op).empty() && static_cast<int32_t>(shapes.size()) == num_outputs(op) &&
           tensors == num_inputs(op) + num_outputs(op);
  }
};

bool is_dtype(DataType type, int32_t code) {
  switch (code) {
    case 0:
      return type == DataType::kFLOAT;
    case 1:
      return type == DataType::kHALF;
#if NV_TENSORRT_MAJOR >= 9
    case 2:
      return type == DataType::kBF16;
#endif
    case 3:
      return type == DataType::kINT32;
    default:
      return false;
  }
}

DataType data_type(int32_t code) {
  if (code == 1) return DataType::kHALF;
#if NV_TENSORRT_MAJOR >= 9
  if (code == 2) return DataType::kBF16;
#endif
  return code == 3 ? DataType::kINT32 : DataType::kFLOAT;
}

class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  explicit Plugin(Node node) : node_(std::move(node)) {}

  // --- what it is ---
  nvinfer1::AsciiChar const* getPluginType() const noexcept override { return kType; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(nvinfer1::AsciiChar const* /*name*/) noexcept override {}
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(node_.shapes.size()); }
  nvinfer1::DataType getOutputDataType(int32_t index, DataType const* /*types*/,
                                       int32_t inputs) const noexcept override {
    return data_type(node_.dtypes[static_cast<size_t>(inputs + index)]);
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t index, nvinfer1::DimsExprs const* /*inputs*/, int32_t /*count*/,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    const auto& shape = node_.shapes[static_cast<size_t>(index)];
    nvinfer1::DimsExprs dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = builder.constant(shape[i]);
    return dims;
  }
  bool supportsFormatCombination(int32_t position, nvinfer1::PluginTensorDesc const* tensors, int32_t /*inputs*/,
                                 int32_t /*outputs*/) noexcept override {
    const auto& tensor = tensors[position];
    return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
           is_dtype(tensor.type, node_.dtypes[static_cast<size_t>(position)]);
  }

  // --- running ---
  size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const* /*inputs*/, int32_t /*num_inputs*/,
                          nvinfer1::PluginTensorDesc const* /*outputs*/,
                          int32_t /*num_outputs*/) const noexcept override {
    return workspace_bytes(node_.op);
  }
  int32_t enqueue(nvinfer1::PluginTensorDesc const* /*inputs_desc*/, nvinfer1::PluginTensorDesc const* /*outputs_desc*/,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    const cudaError_t code = run(node_.op, inputs, outputs, workspace, stream);
    if (code == cudaSuccess) return 0;
    log_line(LOCOCO_LOG_ERROR, std::string("a kernel does not start: ") + cudaGetErrorString(code));
    return 1;
  }
  void configurePlugin(nvinfer1::DynamicPluginTensorDesc const* /*inputs*/, int32_t /*num_inputs*/,
                       nvinfer1::DynamicPluginTensorDesc const* /*outputs*/,
                       int32_t /*num_outputs*/) noexcept override {}

  [[nodiscard]] std::string slow() const { return trt::slow(node_.op); }

  // --- life ---
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override { return new (std::nothrow) Plugin(node_); }
  size_t getSerializationSize() const noexcept override { return node_.words().size() * sizeof(int32_t); }
  void serialize(void* buffer) const noexcept override {
    const std::vector<int32_t> words = node_.words();
    std::memcpy(buffer, words.data(), words.size() * sizeof(int32_t));
  }

 private:
  Node node_;
};

class Creator final : public nvinfer1::IPluginCreator {
 public:
  Creator() {
    for (const char* name : {"numbers", "dtypes", "shapes"}) {
      fields_.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 0);
    }
    fields_.emplace_back("floats", nullptr, nvinfer1::PluginFieldType::kFLOAT32, 0);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return kType; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(nvinfer1::AsciiChar const* /*name*/) noexcept override {}
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  // numbers, floats, dtypes and shapes, one after another, are what is serialized.
  nvinfer1::IPluginV2* createPlugin(nvinfer1::AsciiChar const* /*name*/,
                                    nvinfer1::PluginFieldCollection const* given) noexcept override {
    std::vector<int32_t> words;
    for (const char* name : {"numbers", "floats", "dtypes", "shapes"}) {
      const auto* const end = given->fields + given->nbFields;
      const auto* const field =
          std::find_if(given->fields, end, [&](const auto& f) { return std::strcmp(f.name, name) == 0; });
      if (field == end) return nullptr;
      const auto* const data = static_cast<const int32_t*>(field->data);
      if (std::strcmp(name, "dtypes") == 0) words.push_back(field->length);
      words.insert(words.end(), data, data + field->length);
    }
    Plugin* const plugin = make(words.data(), words.size());
    if (plugin != nullptr) say(plugin->slow());
    return plugin;
  }
  nvinfer1::IPluginV2* deserializePlugin(nvinfer1::AsciiChar const* /*name*/, void const* data,
                                         size_t nbytes) noexcept override {
    std::vector<int32_t> words(nbytes / sizeof(int32_t));
    std::memcpy(words.data(), data, words.size() * sizeof(int32_t));
    return make(words.data(), words.size());
  }

 private:
  // Once, however many nodes it is true of.
  void say(const std::string& note) {
    if (note.empty() || note == said_) return;
    log_line(LOCOCO_LOG_WARNING, "LococoOp: " + note);
    said_ = note;
  }

  static Plugin* make(const int32_t* words, size_t count) {
    Node node;
    if (!node.parse(words, count)) {
      const std::string reason = count > kOpNumbers ? unsupported(node.op) : "";
      log_line(LOCOCO_LOG_ERROR, "LococoOp: " + (reason.empty() ? "its fields contradict each other" : reason));
      return nullptr;
    }
    return new (std::nothrow) Plugin(std::move(node));
  }

  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::string said_;
};

}  // namespace

void register_plugin(nvinfer1::IPluginRegistry& registry) {
  static auto* const creator = new Creator;  // never freed: TensorRT keeps a pointer to it
  static const bool registered = registry.registerCreator(*creator, kNamespace);
  if (!registered) fail(LOCOCO_ERROR_BACKEND, "TensorRT: it refuses the plugin %s of namespace %s", kType, kNamespace);
}

}  // namespace lococo::trt
