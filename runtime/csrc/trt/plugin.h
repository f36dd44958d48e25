// plugin.h - in liblococo_trt: the ops of ops/op.h as a TensorRT plugin, for building engines and for running them.
#pragma once

namespace nvinfer1 {
class IPluginRegistry;
}

namespace lococo::trt {

// Makes plugin "LococoOp" of namespace "lococo" known to TensorRT, once for the process. BACKEND if it refuses.
void register_plugin(nvinfer1::IPluginRegistry& registry);

}  // namespace lococo::trt
