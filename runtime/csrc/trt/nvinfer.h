// nvinfer.h - in liblococo_trt: TensorRT as one interface over its versions. Only nvinfer.cc sees TensorRT's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "module.h"

namespace nvinfer1 {
class IRuntime;
class ICudaEngine;
class IExecutionContext;
}  // namespace nvinfer1

namespace lococo::trt {

// Loads libnvinfer and compares versions, once for the process; returns its version, such as "8.6.0". NOT_FOUND,
// VERSION, UNSUPPORTED.
const char* load_tensorrt(const lococo_module_host* host);

struct Deleter {
  void operator()(nvinfer1::IRuntime* p) const;
  void operator()(nvinfer1::ICudaEngine* p) const;
  void operator()(nvinfer1::IExecutionContext* p) const;
};

// One graph in the making: addresses, then work. Belongs to one thread at a time.
class Context {
 public:
  Context(nvinfer1::IExecutionContext* context, std::string name) : context_(context), name_(std::move(name)) {}

  void set_workspace(void* memory, uint64_t nbytes);
  void bind(const char* tensor, void* address);
  void enqueue(cudaStream_t stream);

 private:
  std::unique_ptr<nvinfer1::IExecutionContext, Deleter> context_;
  std::string name_;
};

// A plan on the device.
class Engine {
 public:
  // Precondition: load_tensorrt, and the plan was checked. BACKEND, CORRUPT if its tensors are not those of graph.
  Engine(nvinfer1::IRuntime& runtime, const lococo_module_graph& graph);

  [[nodiscard]] uint64_t workspace_bytes() const;
  // Without device memory of its own.
  [[nodiscard]] Context create_context() const;

 private:
  void check_tensors(const lococo_module_graph& graph) const;

  std::unique_ptr<nvinfer1::ICudaEngine, Deleter> engine_;
  std::string name_;
};

// host_code_allowed: version-compatible plans carry a runtime of their own.
std::unique_ptr<nvinfer1::IRuntime, Deleter> create_runtime(bool host_code_allowed);

}  // namespace lococo::trt
